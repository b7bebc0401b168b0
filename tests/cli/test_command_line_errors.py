"""Mistakes on the command line: a line names the wrong argument, and nothing is written."""

import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import huggingface_hub
import pytest
from huggingface_hub.utils import httpx
from support.fakes import VOCAB
from support.gates import gate
from support.paths import ROOT
from support.tiny_model import save_tiny_model

from treedecode.allocation.gate import Gate
from treedecode.cli import errors, models
from treedecode.cli import main as cli
from treedecode.cli.solve import strategy_named
from treedecode.models.value_head import ValueHead
from treedecode.search.journal import Journal
from treedecode.tasks.countdown import Countdown, model_path
from treedecode.verify import Likelihood, Value

GATE = model_path() / "gate.safetensors"


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Saves a model, which the gate and the value head of the countdown model do not fit."""
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder that has to refuse it; returns the message behind "error: "."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        capsys.readouterr()
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as error:  # argparse, below its usage
            status = error.code
        out, err = capsys.readouterr()
        assert (status, out) == (errors.USAGE_ERROR, "")
        *usage, line = err.splitlines()
        assert not usage or usage[0].startswith("usage: "), err
        assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}, "something was written"
        return re.fullmatch(r"treedecode [a-z ]+: error: (.+)", line)[1]

    return run


CHAIN = ("solve", "--strategy", "chain_of_thought", "--num-problems", "2", "--out", "out")
DYNAMIC = ("solve", "--strategy", "dynamic_allocation:budget=4", "--num-problems", "2", "--out", "out")


@pytest.mark.parametrize("option", ["--num-problems", "--max-branches"])
def test_counts_on_the_command_line_start_at_one(refused, option):
    assert refused("solve", "--strategy", "chain_of_thought", option, "0") == (
        f"{option[2:]}: expected at least 1, got 0"
    )
    assert refused("solve", "--strategy", "chain_of_thought", option, "-1").endswith(
        "a whole number from 0 on, got '-1'"
    )


@pytest.mark.parametrize("command", [CHAIN, ("study", "--out", "out"), ("gate", "train", "--out", "out")])
def test_every_command_names_what_is_wrong(refused, tmp_path, command):
    (tmp_path / "broken.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n{"question": "1 + \n')
    (tmp_path / "empty.jsonl").write_text("\n")
    source = "--task" if command[0] == "gate" else "--data"
    name = source[2:]
    assert refused(*command, source, "nowhere.jsonl") == f"{name}: No such file or directory: 'nowhere.jsonl'"
    assert refused(*command, source, "broken.jsonl").startswith(f"{name}: broken.jsonl, line 2: ")
    assert refused(*command, source, "empty.jsonl").startswith(f"{name}: empty.jsonl: expected problems")
    assert refused(*command, source, "problems.txt").startswith(f"{name}: expected 'countdown'")
    assert refused(*command, "--model", "./nowhere").startswith("model: expected a folder, a hub name or a .gguf")
    assert refused(*command, "--seed", "-1").startswith("seed: expected a whole number")
    assert refused(*command, "--temperature", "-1").startswith("temperature: expected")
    assert refused(*command, "--verifier", "./nowhere").startswith("verifier: ")
    assert refused(*command, "--verifier", f"value_head:{GATE}").startswith("verifier: ")
    assert refused(*command, "--verifier", "value_head:broken.jsonl").startswith(
        "verifier: broken.jsonl holds no value"
    )
    for out in ("broken.jsonl", "broken.jsonl/sub"):
        assert refused(*command[:-1], out) == (
            f"out: expected a folder to write to, and {tmp_path / 'broken.jsonl'} is none"
        )


def test_a_value_head_of_another_model(refused, other, tmp_path):
    ValueHead(48).save(tmp_path / "head.safetensors")
    for command in (CHAIN, ("study", "--out", "out", "--problems", "1")):
        assert refused(*command, "--model", other, "--verifier", "value_head:head.safetensors") == (
            "verifier: the value head reads hidden states of 48, and those of this model have 32"
        )


def test_a_gate_of_another_model(refused, other):
    known = gate(Likelihood(), Countdown())
    known.save("gate.safetensors")
    said = (
        f"model: {known!r} was trained on one of {VOCAB} tokens and 2 layers, and the run's has 258 tokens and "
        "1 layers; train a gate for it (`treedecode gate train`)"
    )
    with_other = ("--model", other, "--verifier", "likelihood")
    assert refused(*DYNAMIC, *with_other, "--gate", "gate.safetensors") == said
    assert refused(*CHAIN, *with_other, "--forecast", "--gate", "gate.safetensors") == said
    assert refused("gate", "eval", "gate.safetensors", *with_other, "--out", "out") == said
    study = ("study", "--gate", "gate.safetensors", "--out", "out", "--problems", "1", *with_other)
    assert refused(*study, "--strategies", "dynamic_allocation") == said


def test_a_gate_without_its_verifier(refused):
    value = Value(model_path() / "value_head.safetensors")
    said = (
        f"verifier: {Gate.load(GATE)!r} was trained with {value!r}, and the run has none; train a gate for it "
        "(`treedecode gate train`)"
    )
    assert refused(*DYNAMIC) == said
    assert refused("gate", "eval", "--out", "out") == said


def test_files_that_are_no_gate(refused, tmp_path):
    (tmp_path / "text").write_text("a gate")
    for path, said in (
        ("nowhere", "gate: "),
        (tmp_path, "gate: "),
        ("text", "gate: text is no gate"),
        (model_path() / "value_head.safetensors", "gate: .* has the schema None"),
    ):
        assert re.match(said, refused("gate", "eval", path, "--verifier", "value_head", "--out", "out"))
        assert re.match(said, refused("study", "--gate", path, "--out", "out"))
        assert re.match(said, refused(*CHAIN, "--forecast", "--gate", path))


def test_the_gate_beside_the_model_is_the_default():
    assert repr(strategy_named("dynamic_allocation:budget=4", lambda: str(GATE)).gate) == repr(Gate.load(GATE))
    with pytest.raises(ValueError, match=r"expected budget=..., which has no default"):
        strategy_named("dynamic_allocation", lambda: str(GATE))
    assert strategy_named("chain_of_thought", lambda: pytest.fail("it has no gate")).name == "chain_of_thought"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "--num-problems", "19"), "num_problems: expected at least 20 to split, got 19"),
        (("train", "--chains", "16"), "max_chains: expected from min_chains = 1 to less than the 16 chains"),
        (("train", "--menu", "2,4"), "menu: expected DEPTH,WIDTH,KEEP, three numbers, got '2,4'"),
        (("train", "--menu", "0,4,2", "--verifier", "task"), r"menu: \(0, 4, 2\): depth: expected"),
        (("train", "--menu", "2,4,2"), "menu: tree searches score branches and need a verifier"),
        (("train", "--rollouts", "nowhere.npz"), "rollouts: no file nowhere.npz"),
        (("train", "--rollouts", GATE), "rollouts: .* is no npz file"),
        (("train", "--chains", "0"), "chains: expected at least 1, got 0"),
        (("eval", "--budgets", "3", "0"), "budgets: expected numbers from the 1 of the probes on, got 0.0"),
        (("eval", "--budgets", "nan"), "budgets: expected numbers"),
        (("eval", "--chains", "1"), "chains: expected at least 2 of a problem, got 1"),
        (("eval", "--probes", "99"), "probes: expected from 1 to 16, got 99"),
        (("eval", "--wave", "0"), "wave: expected at least 1, got 0"),
        (("eval", "--floors", "-1"), "floors: expected a whole number from 0 on, got '-1'"),
    ],
)
def test_a_gate_is_refused_before_anything_is_sampled(refused, arguments, said):
    assert re.match(said, refused("gate", *arguments, "--out", "out"))


def test_a_study_of_fewer_problems_than_it_times_alone(refused):
    said = "latency-problems: expected at most 2, the problems there are, got 3"
    assert refused("study", "--problems", "2", "--latency-problems", "3", "--out", "out") == said


def with_hub(port, tmp_path, *arguments):
    """Runs a command in a process for which the hub is at a port of this machine; returns its message."""
    places = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
    environment = {**os.environ, **places, "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    program = "import sys; from treedecode.cli.main import main; sys.exit(main(sys.argv[1:]))"
    root = ROOT
    found = subprocess.run(
        [sys.executable, "-c", program, *CHAIN[:-1], str(tmp_path / "out"), *arguments],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (found.returncode, found.stdout) == (errors.USAGE_ERROR, "")
    assert not (tmp_path / "out").exists()
    return found.stderr


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached(tmp_path):
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        # one line, and none of the client's on trying again
        assert with_hub(port, tmp_path, "--model", "nowhere/nothing") == (
            f"treedecode solve: error: model: there is no folder 'nowhere/nothing', and http://127.0.0.1:{port} "
            "cannot be reached: [Errno 111] Connection refused\n"
        )


@pytest.mark.slow
def test_a_hub_that_is_slow_to_say_that_it_has_no_such_model(tmp_path):
    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            time.sleep(1)
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        said = with_hub(server.server_port, tmp_path, "--model", "nowhere/nothing")
        server.shutdown()
    assert "error: model: nowhere/nothing is not a local folder and is not a valid model identifier" in said


@pytest.mark.parametrize("argument", ["model", "verifier"])
def test_the_argument_that_names_a_model_of_the_hub(refused, monkeypatch, argument):
    asked = []

    def fail(url):
        asked.append(url)
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)
    monkeypatch.setattr(models, "_PAUSE", 0.0)
    said = refused(*CHAIN, f"--{argument}", "nowhere/nothing")
    assert re.fullmatch(rf"{argument}: there is no folder 'nowhere/nothing', and .+ cannot be reached: no route", said)
    assert len(asked) == 2


@pytest.mark.parametrize("error", [httpx.ReadTimeout("slow"), httpx.ConnectTimeout("slow"), httpx.ProxyError("no")])
def test_a_hub_that_may_be_there_is_asked_again_by_its_client(monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)
    models.require_hub("nowhere/nothing", "model")


@pytest.mark.parametrize("name", ["plan.json", "study.json"])
def test_a_folder_that_holds_a_study(refused, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("{}\n")
    assert refused(*CHAIN) == "out: out holds a study; choose another folder"


def test_another_run_is_told_in_a_line_one_can_read(tmp_path):
    path = tmp_path / "journal.jsonl"
    run = {"seed": 0, "strategy": "BestOfN(4)", "weights": "0123"}
    Journal(path, run, {}).close()
    advice = r"\. Give the arguments of that run to go on with it, or another file to begin anew$"
    with pytest.raises(ValueError, match=r"of another run: the seed was 0 and is 1; the strategy was .*\(8\)" + advice):
        Journal(path, {**run, "seed": 1, "strategy": "BestOfN(8)"}, {})
    with pytest.raises(ValueError, match="of another run: the model's weights differ" + advice):
        Journal(path, {**run, "weights": "4567"}, {})


@pytest.mark.parametrize("line", ['{"id": "one", ', '{"id": "one"}', "[]", "3"])
def test_a_line_of_a_journal_that_cannot_be_read(tmp_path, line):
    path = tmp_path / "journal.jsonl"
    Journal(path, {"seed": 0}, {"zero": "digest"}).close()
    with open(path, "a") as file:
        file.write('{"id": "zero", "spent": {}}\n' + line + "\n")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=re.escape(f"journal: {path}, line 3, cannot be read")):
        Journal(path, {"seed": 0}, {"zero": "digest"})
    assert path.read_bytes() == before


def test_ctrl_c_in_the_training_of_a_gate(tmp_path):
    """Interrupts a process when its first problem is on the disk; the same command goes on."""
    program = "import sys; from treedecode.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "gate", "train", "--num-problems", "300", "--chains", "4"]
    command += ["--max-chains", "2", "--out", str(tmp_path / "out")]
    root = ROOT
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": root}
    # a test run in the background may have inherited that Ctrl-C is ignored
    process = subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options)
    journal = tmp_path / "out" / "rollouts-train.jsonl"
    end = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (errors.INTERRUPTED, "")
    assert stderr == f"treedecode gate: interrupted; the same command goes on from {tmp_path / 'out'}\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [journal.name]
    assert all(json.loads(line) for line in journal.read_bytes().splitlines()[:-1])
