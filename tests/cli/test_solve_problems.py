"""`treedecode solve`: what the model reads, how branches sample, what is graded and what was cut."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
from support.paths import ROOT
from support.tiny_model import save_tiny_model

from treedecode.cli import errors
from treedecode.cli import main as cli
from treedecode.search import run as search_run

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
STRATEGIES = '''
from dataclasses import dataclass
from treedecode.strategies import Strategy

@dataclass(frozen=True)
class OneChain(Strategy):
    """One chain.

    Args:
        short: stop after a step.
    """

    short: bool = False
    name = "one_chain"
    num_branches = 1

    async def solve(self, search):
        with await search.root() as chain:
            await (search.step if self.short else search.complete)(chain)
            return search.outcome(chain, 0)

@dataclass(frozen=True)
class Unsized(Strategy):
    name = "unsized"

made = OneChain(short=True)
number = 3

def length(problem, text):
    return float(len(text))
'''


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = save_tiny_model(tmp_path_factory.mktemp("model"))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "eos_token_id": 0}
    (path / "generation_config.json").write_text(json.dumps(config))
    return str(path)


@pytest.fixture
def solve(model, tmp_path, monkeypatch, capsys):
    """Runs the command on rows; returns its exit status, its summary by first words, and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(rows, *more, strategy="self_consistency:num_samples=2"):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        capsys.readouterr()
        options = ["--data", "rows.jsonl", "--model", model, "--strategy", strategy, "--dtype", "float32"]
        status = cli.main(["solve", *options, "--max-new-tokens", "12", "--kv-memory", "4MiB", *more])
        out, err = capsys.readouterr()
        return status, {line[:12].strip(): line[12:].strip() for line in out.splitlines()}, err

    return run


@pytest.fixture
def prompts(monkeypatch):
    """Collects the prompts of runs as text, by problem."""
    read = {}
    checked = search_run.checked_prompts

    def record(decoder, prompts, **options):
        ids = checked(decoder, prompts, **options)
        read.update({key: decoder.tokenizer.decode(tokens) for key, tokens in ids.items()})
        return ids

    monkeypatch.setattr(search_run, "checked_prompts", record)
    return read


ROWS = [{"question": "2 + 2?", "answer": "4"}, {"question": "3 + 4?", "answer": "7"}]
UNKNOWN = {"question": "5 + 5?", "answer": None}


def test_the_template_of_the_command(solve, prompts, tmp_path):
    assert solve(ROWS, "--prompt-template", r"Q: {question}\nA:")[0] == 0
    assert prompts == {"rows-1": "Q: 2 + 2?\nA:", "rows-2": "Q: 3 + 4?\nA:"}
    (tmp_path / "template.txt").write_text("Think.\n{question}\n")
    assert solve(ROWS, "--prompt-template", "@template.txt")[0] == 0
    assert prompts["rows-1"] == "Think.\n2 + 2?\n"


def test_chat_asks_for_a_box(solve, prompts):
    assert solve(ROWS[:1], "--chat", "--system-prompt", "Be brief.")[0] == 0
    request = "Please reason step by step, and put your final answer within \\boxed{}."
    assert prompts == {"rows-1": f"<system>Be brief.<user>2 + 2?\n\n{request}<assistant>"}


def test_fields_by_name(solve, prompts):
    rows = [{"frage": "2 + 2?", "zahl": 4, "key": "sum"}]
    options = ("--question-field", "frage", "--answer-field", "zahl", "--id-field", "key")
    assert solve(rows, *options)[0] == 0
    assert prompts == {"sum": "Question: 2 + 2?\nAnswer:"}


def test_problems_without_an_answer(solve, tmp_path):
    status, rows, _ = solve([*ROWS, UNKNOWN], "--out", "out")
    assert status == 0
    assert rows["accuracy"] == "0.0%, 0 of 2; 1 have no reference answer"
    solutions = [json.loads(line) for line in (tmp_path / "out/solutions.jsonl").read_text().splitlines()[1:]]
    assert {line["id"]: line["correct"] for line in solutions} == {"rows-1": False, "rows-2": False, "rows-3": None}
    assert solve([UNKNOWN])[1]["accuracy"] == "not graded: the problems have no reference answers"
    status, _, err = solve([*ROWS, UNKNOWN], "--verifier", "task")
    assert status == errors.USAGE_ERROR
    assert "verifier: 1 of 3 problems have no reference answer, the first is 'rows-3'" in err


def test_solutions_that_ran_out_of_tokens(solve, tmp_path):
    status, rows, _ = solve(ROWS, "--out", "out", strategy="chain_of_thought")
    assert status == 0
    solutions = [json.loads(line) for line in (tmp_path / "out/solutions.jsonl").read_text().splitlines()[1:]]
    assert [line["is_cut"] for line in solutions] == [True, True]
    assert rows["cut short"] == "2 of 2 at 12 tokens (--max-new-tokens): rows-1, rows-2"
    rows = solve(ROWS, "--budget-per-problem", "tokens=4")[1]
    assert rows["cut short"] == "2 of 2 at 12 tokens (--max-new-tokens) or by the budget: rows-1, rows-2"


def test_sampling_is_that_of_the_checkpoint(solve):
    assert solve(ROWS)[1]["sampling"] == (
        "temperature=0.6, top_p=0.9, top_k=0, repetition_penalty=1.1 (of the model's generation_config)"
    )
    assert solve(ROWS, "--temperature", "1.2", "--top-k", "5")[1]["sampling"].startswith(
        "temperature=1.2, top_p=0.9, top_k=5, "
    )
    given = solve(ROWS, "--temperature", "1", "--top-k", "0", "--top-p", "1")[1]["sampling"]
    assert given == "temperature=1, top_p=1, top_k=0, repetition_penalty=1.1"
    assert solve(ROWS, strategy="self_consistency:num_samples=2,sampling.temperature=0.3")[1]["sampling"] == (
        "temperature=0.3, top_p=1, top_k=0 (of the strategy)"
    )


def test_a_run_grows(solve, tmp_path):
    rows = [*ROWS, {"question": "1 + 1?", "answer": "2"}]
    assert solve(rows, "--out", "out", "--num-problems", "2")[0] == 0
    status, shown, err = solve(rows, "--out", "out")
    assert (status, shown["problems"]) == (0, "3, 2 of them solved before")
    assert err == "resuming: 2 of 3 problems are solved in out/solutions.jsonl\n"
    status, _, err = solve(rows, "--out", "out", "--num-problems", "2")
    assert status == errors.USAGE_ERROR
    assert "A run can have more problems than before, but not others or fewer" in err


def test_a_run_takes_more_samples(solve, tmp_path):
    assert solve(ROWS, "--out", "out", strategy="self_consistency:num_samples=2")[0] == 0
    status, shown, err = solve(ROWS, "--out", "out", strategy="self_consistency:num_samples=3")
    assert (status, shown["problems"]) == (0, "2")
    assert err == "resuming: 0 of 2 problems are solved in out/solutions.jsonl, 2 more with fewer samples\n"
    whole = solve(ROWS, "--out", "whole", strategy="self_consistency:num_samples=3")[1]
    assert [shown[name] for name in ("accuracy", "answers")] == [whole[name] for name in ("accuracy", "answers")]
    status, _, err = solve(ROWS, "--out", "out", strategy="self_consistency:num_samples=2")
    assert status == errors.USAGE_ERROR
    assert "has solutions of 3 samples, and num_samples is 2. A run can have more samples than before" in err


def test_examples_among_the_problems(solve, tmp_path):
    (tmp_path / "shots.jsonl").write_text(json.dumps({"question": "3 +  4?", "answer": "7"}) + "\n")
    status, _, err = solve(ROWS, "--few-shot", "shots.jsonl", "--shots", "1")
    assert status == errors.USAGE_ERROR
    assert err == (
        "treedecode solve: error: few-shot: 1 of the problems are among them, whose answers they give away: the first "
        "is 'rows-2'\n"
    )


def test_strategies_and_verifiers_of_a_file(solve, tmp_path):
    (tmp_path / "mine.py").write_text(STRATEGIES)
    status, rows, err = solve(ROWS, "--verifier", "mine.py:length", strategy="best_of_n:num_samples=2")
    assert (status, err) == (0, "")
    assert rows["verifier"] == "mine.py:length"
    for strategy, shown in (
        ("mine.py:OneChain", "OneChain(short=False)"),
        ("mine.py:OneChain:short=true", "OneChain(short=True)"),
        ("mine.py:made", "OneChain(short=True)"),
    ):
        status, rows, err = solve(ROWS, strategy=strategy)
        assert (status, err, rows["strategy"]) == (0, "", shown)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--strategy", "mine.py:Unsized"), "strategy: Unsized has no num_branches, the most branches that it holds"),
        (("--strategy", "mine.py:number"), "strategy: expected a class of .*Strategy, or one made, got 3"),
        (("--strategy", "mine.py:Nothing"), "strategy: mine.py has no 'Nothing'"),
        (("--strategy", "mine.py:OneChain:long=true"), "strategy OneChain: has no setting 'long'; it has short"),
        (("--strategy", "nowhere.py:OneChain"), "strategy: there is no file 'nowhere.py'"),
        (("--strategy", "broken.py:x"), "strategy: broken.py cannot be imported: ZeroDivisionError: division by zero"),
        (("--verifier", "mine.py:number"), "verifier: expected a function of .problem, text. or a scorer, got 3"),
        (("--verifier", "mine.py:length:x"), "verifier: expected FILE.py:NAME, and 'mine.py:length:x' goes on"),
        (("--prompt-template", "Q:"), r"prompt-template: expected a text with .question. in it, got 'Q:'"),
        (("--prompt-template", "@nowhere"), "prompt-template: No such file or directory: 'nowhere'"),
        (("--system-prompt", "Be brief."), "system-prompt: expected chat, whose first message it is"),
        (("--question-field", "q"), "data: rows.jsonl, line 1: question_field: there is no 'q'"),
        (("--out", "rows.jsonl"), "out: expected a folder to write to, and .*rows.jsonl is none"),
        (("--trees", "-1"), "trees: expected a whole number from 0 on, got '-1'"),
        (("--num-problems", "0"), "num-problems: expected at least 1, got 0"),
        (("--out", ""), "out: expected a folder, got ''"),
    ],
)
def test_mistakes_are_a_line(solve, tmp_path, capsys, arguments, message):
    (tmp_path / "mine.py").write_text(STRATEGIES)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    try:
        status, rows, err = solve(ROWS, *arguments)
    except SystemExit as error:  # of argparse
        status, rows, err = error.code, {}, capsys.readouterr().err
    assert (status, rows) == (errors.USAGE_ERROR, {})
    assert re.search(f"^treedecode solve: error: .*{message}", err), err
    assert len(err.splitlines()) == 1


def test_options_of_a_file_with_a_task(capsys):
    for option, value in (("--question-field", "q"), ("--prompt-template", "{question}")):
        assert cli.main(["solve", "--strategy", "chain_of_thought", option, value]) == errors.USAGE_ERROR
        assert f"{option[2:]}: expected it with --data alone" in capsys.readouterr().err


def test_a_strategy_has_to_be_named(capsys):
    assert cli.main(["solve"]) == errors.USAGE_ERROR
    assert "strategy: expected the name of one (--strategy help lists them)" in capsys.readouterr().err
    assert cli.main(["solve", "--verifier", "help"]) == 0
    assert capsys.readouterr().out.startswith("none ")


def test_a_full_disk_is_a_line(solve, monkeypatch, tmp_path):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("treedecode.search.journal.os.fsync", full)
    status, rows, err = solve(ROWS, "--out", "out")
    assert (status, rows) == (errors.FAILED, {})
    assert err == "treedecode solve: error: No space left on device: 'out/solutions.jsonl'\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_a_line(solve, tmp_path, name):
    broken = save_tiny_model(tmp_path / "broken")
    path = broken / name
    path.write_bytes(path.read_bytes()[:-100])
    status, _, err = solve(ROWS, "--model", str(broken))
    assert status == errors.USAGE_ERROR
    assert err.startswith(f"treedecode solve: error: model: a file of {broken} is damaged: ")
    assert len(err.splitlines()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_sigterm_ends_a_run_as_ctrl_c_does(tmp_path):
    program = "import sys; from treedecode.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "solve", "--strategy", "self_consistency:num_samples=8", "--task"]
    command += ["countdown", "--num-problems", "2000", "--max-branches", "16", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    journal, end = tmp_path / "out/solutions.jsonl", time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == errors.TERMINATED
    assert err == f"treedecode solve: interrupted; the same command goes on from {journal}\n"
