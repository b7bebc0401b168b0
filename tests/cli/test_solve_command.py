import json
import re
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from support.paths import ROOT
from support.tiny_model import save_tiny_model

from treedecode.cli import errors
from treedecode.cli import main as cli
from treedecode.cli import solve as command
from treedecode.cli.outputs import Outputs, file_name
from treedecode.cli.verifiers import Oracle, verifier_named
from treedecode.search.journal import num_solutions
from treedecode.strategies import STRATEGIES, SelfConsistency, TreeOfThoughts
from treedecode.tasks import Problem

QUESTIONS = ["2 + 2?", "3 + 4?", "a </script> b?", "1 + 0?"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": q, "answer": "4"}) + "\n" for q in QUESTIONS))
    return str(path)


@pytest.fixture
def solve(model, data, capsys):
    """Runs the command; returns its exit status, standard output and standard error."""

    def run(*more, strategy="self_consistency:num_samples=3"):
        arguments = ["solve", "--strategy", strategy, "--budget-per-problem", "tokens=40", "--dtype", "float32"]
        arguments += ["--kv-memory", "4MiB", "--max-branches", "32"]
        for name, value in (("--model", model), ("--data", data)):
            arguments += [] if name in more or (name == "--data" and "--task" in more) else [name, value]
        capsys.readouterr()
        status = cli.main([*arguments, *more])
        return status, *capsys.readouterr()

    return run


def table(out):
    """Returns the lines of a summary by their first words."""
    return {line[:12].strip(): line[12:].strip() for line in out.splitlines()}


def test_a_run_and_what_it_writes(solve, tmp_path):
    out = tmp_path / "out"
    status, text, err = solve(
        "--out",
        str(out),
        "--trees",
        "3",
        "--verifier",
        "likelihood",
        strategy="tree_of_thoughts:depth=2,width=2,keep=2",
    )
    assert (status, err) == (0, "")
    lines = (out / "solutions.jsonl").read_text().splitlines()
    solutions = [json.loads(line) for line in lines[1:]]
    assert {solution["id"] for solution in solutions} == {f"questions-{i}" for i in range(1, 5)}
    ledger = json.loads((out / "ledger.json").read_text(), parse_constant=pytest.fail)
    assert ledger["problems"].keys() == {solution["id"] for solution in solutions}
    total = ledger["total"]["generated_tokens"]
    assert total == sum(solution["spending"]["generated_tokens"] for solution in solutions)
    assert sorted(path.name for path in (out / "trees").iterdir()) == sorted(
        f"questions-{i}.{end}" for i in (1, 2, 3) for end in ("html", "json")
    )
    tree = json.loads((out / "trees" / "questions-3.json").read_text(), parse_constant=pytest.fail)
    assert "a </script> b?" in tree["nodes"][0]["text"]
    assert (out / "trees" / "questions-3.html").read_text().count("</script>") == 2
    rows = table(text)
    assert rows["strategy"].startswith("TreeOfThoughts(depth=2, width=2, keep=2")
    assert rows["problems"] == "4"
    assert rows["accuracy"] == "0.0%, 0 of 4"
    assert rows["tokens"].startswith(f"{total:,} generated, ")
    apart = ledger["total"]["without_sharing"]["forwards"]
    assert rows["forwards"].split()[:2] == [f"{ledger['total']['forwards']:,}", f"{apart:,}"]
    assert apart > ledger["total"]["forwards"]


def test_the_same_command_goes_on_where_it_ended(solve, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert solve("--out", str(whole))[0] == 0
    part.mkdir()
    lines = (whole / "solutions.jsonl").read_text().splitlines(keepends=True)
    (part / "solutions.jsonl").write_text("".join(lines[:3]) + lines[3][:50])  # killed while it wrote
    status, text, err = solve("--out", str(part), "--trees", "4")
    assert status == 0
    assert err == f"resuming: 2 of 4 problems are solved in {part}/solutions.jsonl\n"
    assert table(text)["problems"] == "4, 2 of them solved before"
    assert len(list((part / "trees").glob("*.html"))) == 4

    def comparable(folder):
        found = [json.loads(line) for line in (folder / "solutions.jsonl").read_text().splitlines()]
        return {one.get("id"): {k: v for k, v in one.items() if k != "seconds"} for one in found}

    same = comparable(whole), comparable(part)
    for solutions in same:
        for solution in solutions.values():
            solution.pop("spending", None)  # who shares a forward with whom differs
            solution.pop("spent", None)
    assert same[0] == same[1]
    before = {name: (part / name).read_bytes() for name in ("solutions.jsonl", "ledger.json")}
    status, text, err = solve("--out", str(part))
    assert (status, err) == (0, f"resuming: 4 of 4 problems are solved in {part}/solutions.jsonl\n")
    assert {name: (part / name).read_bytes() for name in before} == before
    spent = json.loads((part / "solutions.jsonl").read_text().splitlines()[-1])["spent"]
    assert table(text)["seconds"].startswith(f"{spent['seconds']:.1f}, {spent['seconds'] / 4:.2f} a problem; ")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (("--seed", "1"), "is of another run: the seed was 0 and is 1. Give the arguments of that run"),
        (("--shots", "2", "--few-shot"), "has solutions of 4 problems with another question"),
    ],
)
def test_another_run_is_not_mixed_in(solve, tmp_path, changed, named):
    examples = tmp_path / "examples.jsonl"
    examples.write_text('{"question": "1 + 1?", "answer": "2"}\n' * 1 + '{"question": "1 + 2?", "answer": "3"}\n')
    changed = [*changed, str(examples)] if changed[-1] == "--few-shot" else changed
    assert solve("--out", str(tmp_path / "out"))[0] == 0
    status, _, err = solve("--out", str(tmp_path / "out"), *changed)
    assert status == errors.USAGE_ERROR
    assert f"solutions.jsonl {named}" in err
    assert len(err.splitlines()) == 1


def test_worked_examples_are_one_prefix(solve, tmp_path):
    examples = tmp_path / "examples.jsonl"
    examples.write_text("".join(json.dumps({"question": f"{i} + 1?", "answer": f"{i + 1}"}) + "\n" for i in range(3)))
    out = tmp_path / "out"
    status, _, _ = solve("--few-shot", str(examples), "--shots", "2", "--out", str(out), "--trees", "2")
    assert status == 0
    first, second = (json.loads((out / "trees" / f"questions-{i}.json").read_text())["nodes"][0] for i in (1, 2))
    for root, question in ((first, QUESTIONS[0]), (second, QUESTIONS[1])):
        before, _, _ = root["text"].partition(question)
        assert re.findall(r"\d \+ 1\?", before) == ["0 + 1?", "1 + 1?"]
    assert first["text"].partition(QUESTIONS[0])[0] == second["text"].partition(QUESTIONS[1])[0]


def test_an_oracle_is_called_one(solve):
    status, text, _ = solve("--verifier", "task", strategy="tree_of_thoughts:depth=1,width=2,keep=1")
    assert status == 0
    assert table(text)["verifier"] == "the task's own check, an ORACLE that knows the answers"
    assert "a bound, not a result" in table(text)["accuracy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--strategy", "guess"), "strategy: no 'guess'; there are .*tree_of_thoughts"),
        (("--strategy", "self_consistency:samples=3"), "has no setting 'samples'; it has confidence, num_samples"),
        (("--strategy", "self_consistency:num_samples=0"), "num_samples: expected a number >= 1, got 0"),
        (("--strategy", "tree_of_thoughts"), "verifier: tree_of_thoughts scores branches and needs one"),
        (("--strategy", "self_consistency:num_samples=99"), "needs 100 branches for a problem, and the decoder has 32"),
        (("--budget", "tokens=-1"), "budget: tokens: expected more than 0, got -1"),
        (("--budget", "tonkens=1"), "budget: has no setting 'tonkens'"),
        (("--budget-per-problem", "joules=1"), "energy is measured of a whole run"),
        (("--temperature", "-1"), "temperature: expected a number >= 0"),
        (("--data", "nowhere.jsonl"), "data: No such file or directory: 'nowhere.jsonl'"),
        (("--data", "problems.txt"), "data: expected .* the path of a .jsonl file; got 'problems.txt'"),
        (("--task", "crosswords"), "task: expected 'countdown', 'reasoning_gym:<dataset>'"),
        (("--num-problems", "5"), "num_problems: .* has 4, got 5"),
        (("--split", "train"), "split: expected it with --task alone; a file has no splits"),
        (("--model", "./nowhere"), "model: expected a folder, .* there is no './nowhere'"),
        (("--model", "a/folder/nowhere"), "model: expected a folder, .* there is no 'a/folder/nowhere'"),
        (("--model", "nowhere.gguf"), "model: expected a folder, .* there is no 'nowhere.gguf'"),
        (("--model", ""), "model: expected a folder, .* there is no ''"),
        (("--model", "countdown/nowhere", "--task", "reasoning_gym:"), "task: expected"),
        (("--few-shot", "nowhere.jsonl"), "few-shot: expected a file of examples, and there is no 'nowhere.jsonl'"),
        (("--gate", "nowhere.safetensors", "--forecast"), "gate: .* there is none at nowhere.safetensors"),
        (("--gate", "nowhere.safetensors"), "gate: self_consistency has none, so expected it with --forecast alone"),
        (("--strategy", "dynamic_allocation:budget=4"), "gate: .* there is none beside the model, .*gate.safetensors"),
        (("--budget", "joules=5"), "budget: joules are limited, and energy is not measured"),
        (("--kv-memory", "8000000GiB"), "kv_memory: 8000000GiB, max_branches: 32 take more memory than there is"),
        (("--verifier", "value_head"), "verifier: no value head at .*value_head.safetensors"),
        (("--verifier", "value_head:x.safetensors"), "verifier: no value head at x.safetensors"),
        (("--chat",), "chat: expected a tokenizer with a chat template"),
        (("--device", "warp"), "device: 'warp' cannot be used"),
        (("--kv-memory", "10"), "kv_memory: 10 is less than one page"),
        (("--trees", "2"), "trees: expected --out DIR"),
        (("--metrics-port", "-1"), "metrics-port: expected 0 to 65535, got -1"),
    ],
)
def test_mistakes_are_a_line(solve, arguments, message):
    status, out, err = solve(*arguments)
    assert (status, out) == (errors.USAGE_ERROR, "")
    assert re.fullmatch(f"treedecode solve: error: .*{message}.*\n", err), err


def test_the_examples_are_not_the_problems(solve, data):
    status, _, err = solve("--few-shot", data)
    assert status == errors.USAGE_ERROR
    assert "few-shot: is the file of the problems itself" in err


def test_a_prompt_without_room(solve, tmp_path):
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"question": "x" * 300, "answer": "1"}) + "\n")
    status, _, err = solve("--data", str(long))
    assert status == errors.USAGE_ERROR
    assert re.search(
        r"problems: prompts leave no room for a solution in the 256 tokens there are: 'long-1' \(\d+ tokens\)", err
    )


def test_an_error_of_the_search_keeps_its_traceback(solve, monkeypatch):
    async def broken(self, search):
        raise ValueError("a mistake in a strategy")

    monkeypatch.setattr(SelfConsistency, "solve", broken)
    with pytest.raises(ValueError, match="a mistake") as caught:
        solve()
    assert "while solving the problem 'questions-1'" in caught.value.__notes__


def test_help_lists_strategies_and_verifiers(solve):
    status, out, _ = solve(strategy="help")
    assert status == 0
    for name, strategy in STRATEGIES.items():
        assert re.search(rf"^{name}{' .needs --verifier.' if strategy.needs_verifier else ''}$", out, re.MULTILINE)
    assert "    depth=3  steps chosen by search" in out
    status, out, _ = solve("--verifier", "help")
    assert status == 0
    assert re.search(r"^task +.*oracle", out, re.MULTILINE)


def test_strategies_by_name():
    assert command.strategy_named("tree_of_thoughts:depth=2,width=4") == TreeOfThoughts(depth=2, width=4)
    assert command.strategy_named("self_consistency") == SelfConsistency()


def test_progress_is_shown_on_request_only(solve):
    assert solve()[2] == ""
    _, out, err = solve("--progress")
    assert "4/4" in err
    assert re.search(r"\d+ branches, [\d,]+ tokens/s, pages \d+/\d+", err)
    assert "4/4" not in out


def test_ctrl_c_leaves_what_can_be_resumed(model, data, tmp_path):
    """Interrupts a process when its first solution is on the disk."""
    out = tmp_path / "out"
    program = "import sys; from treedecode.cli.main import main; sys.exit(main(sys.argv[1:]))"
    # one problem at a time, and each long enough to be interrupted in
    arguments = ["solve", "--strategy", "self_consistency:num_samples=12", "--model", model, "--data", data]
    arguments += ["--out", str(out), "--max-branches", "13", "--dtype", "float32"]
    root = ROOT
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": root}
    # a test run in the background may have inherited that Ctrl-C is ignored
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], **options)
    journal = out / "solutions.jsonl"
    end = time.monotonic() + 120
    while num_solutions(journal) < 1:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert stdout == ""
    *warnings, last = stderr.splitlines()
    assert last == f"treedecode solve: interrupted; the same command goes on from {journal}"
    assert [warning.partition(": there are")[0] for warning in warnings] == [
        "treedecode solve: warning: 4 of 4 prompts leave a solution fewer than the 512 tokens it may have"
    ]
    assert 1 <= num_solutions(journal) < len(QUESTIONS)
    last = json.loads(journal.read_text().splitlines()[-1])
    assert last.keys() == {"spent"}, "what the interrupted search has cost is known"
    assert last["spent"]["seconds"] > 0


def test_metrics_are_served_while_it_runs(solve, monkeypatch):
    pytest.importorskip("prometheus_client")
    pages = []
    add = Outputs.add

    def look(self, solution):
        add(self, solution)
        pages.append(urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=10).read().decode())

    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(Outputs, "add", look)
    assert solve("--metrics-port", str(port))[0] == 0
    assert 'treedecode:problems_total{strategy="self_consistency"} 4.0' in pages[-1]
    assert "treedecode:pages_max" in pages[0]
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=10)


@pytest.mark.parametrize(
    ("problem_id", "name"),
    [
        ("questions-1", "questions-1"),
        ("../../etc/x", "..%2F..%2Fetc%2Fx"),
        ("a b", "a b"),
        ("%2F", "%252F"),
        ("é", "%C3%A9"),
    ],
)
def test_file_names(problem_id, name):
    assert file_name(problem_id) == name


def test_long_ids_have_file_names_of_their_own():
    names = {file_name("é" * 200 + str(i)) for i in range(20)}
    assert len(names) == 20
    assert all(len(name) < 200 for name in names)


def test_verifiers(data, model):
    from treedecode import tasks

    task = tasks.load(data)
    assert verifier_named("none", task, model) is None
    oracle = verifier_named("task", task, model)
    assert isinstance(oracle, Oracle)
    [problem] = task.problems(1)
    assert oracle(problem, " 2 and 2\n#### 4\n") == 1.0
    assert oracle(problem, "#### 5\n") == 0.0
    with pytest.raises(ValueError, match="the task cannot check the problem 'x', which has no answer"):
        oracle(Problem("x", "?", answer=None), "#### 5\n")
    assert verifier_named("judge", task, model).num_samples == 3


def test_a_limit_of_new_tokens(tmp_path):
    from treedecode.cli.models import task_for

    path = tmp_path / "sums.jsonl"
    path.write_text('{"question": "1 + 1?", "answer": "2"}\n')
    tasks = [task_for(str(path), "data", limit) for limit in (None, 2000, 50)]
    assert [(task.max_new_tokens, task.max_step_tokens) for task in tasks] == [(512, 128), (2000, 128), (50, 50)]
