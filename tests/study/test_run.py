"""The study end to end on the fake model: its files, its numbers against the ledgers', errors and interruptions."""

import asyncio
import csv
import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from support.fakes import FakeModel, FakeTokenizer
from support.study_cases import Digits, Length

import treedecode as td
from treedecode.cli import main as cli
from treedecode.cli import study as command
from treedecode.common.intervals import mean_interval
from treedecode.search.journal import Journal
from treedecode.strategies import ChainOfThought, SelfConsistency, Strategy, TreeOfThoughts
from treedecode.study import analysis, machine, plan, plots, report, rows, run
from treedecode.study.laws import Curve
from treedecode.study.pool import ChainPool
from treedecode.study.rows import Conditions, Entry
from treedecode.study.unshared_baseline import UnsharedDecoder

PLAN = [
    Entry("chain", "One chain", "chain_of_thought"),
    Entry(
        "longer",
        "Longer",
        "chain_of_thought",
        {"wait": "a", "answer_prompt": ","},
        {"min_tokens": 1.5, "max_tokens": 3.0},
    ),
    Entry("tree_of_thoughts", "Tree", "tree_of_thoughts", {"depth": 2, "width": 3, "keep": 2}),
    Entry("votes_2", "Two", "self_consistency", {"num_samples": 2}, curve="dynamic_allocation"),
    Entry("votes_4", "Four", "self_consistency", {"num_samples": 4}, curve="dynamic_allocation"),
    Entry("chain_pool", "Pool", "chain_pool", {"num_samples": 8}),
]


@dataclasses.dataclass(frozen=True)
class Broken(Strategy):
    name = "broken"

    @property
    def num_branches(self):
        return 4

    async def solve(self, search):
        with await search.root() as root, root.fork(3) as chains:
            await search.step(chains)
            raise ArithmeticError("no luck")


@pytest.fixture(scope="module")
def conditions():
    model = FakeModel()
    decoder = td.Decoder(model, FakeTokenizer(), kv_memory=800 * 4 * 2 * 2 * 16 * 4, page_size=4, max_branches=64)
    task = Digits()
    yield Conditions(
        decoder, UnsharedDecoder.like(decoder), task, task.problems(6), verifier=Length(), seed=3, latency_problems=2
    )
    assert decoder.num_branches == 0


@pytest.fixture(scope="module")
def study(conditions, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "out"
    work = run.run_study(conditions, PLAN, out, command="treedecode study", model="a fake", num_resamples=20)
    result = conditions.decoder.run(work)
    drawn = plots.draw(result, out)
    report.write(result, out, [path.stem for path in drawn if path.suffix == ".png"])
    return result, out


def test_rows_are_what_the_strategies_did(study, conditions):
    result, _ = study
    by_key = {row["key"]: row for row in result["rows"]}
    assert list(by_key) == [entry.key for entry in PLAN]
    strategies = {
        "chain": ChainOfThought(),
        "tree_of_thoughts": TreeOfThoughts(depth=2, width=3, keep=2),
        "votes_4": SelfConsistency(4),
        "chain_pool": ChainPool(8),
    }
    settings = {"task": conditions.task, "verifier": Length(), "seed": 3}
    base, answers = None, {}
    for key, strategy in strategies.items():
        conditions.decoder.forget()
        solved = td.solve(conditions.decoder, conditions.problems, strategy=strategy, **settings)
        spent = solved.ledger.problems.values()
        tokens = sum(s.generated_tokens for s in spent)
        base = base or spent
        row, answers[key] = by_key[key], [solution.answer for solution in solved.solutions]
        assert row["accuracy"] == solved.accuracy
        assert row["correct"] == [int(solution.correct) for solution in solved.solutions]
        assert row["accuracy_ci"] == list(mean_interval(row["correct"]))
        assert row["tokens"] == tokens / 6
        assert row["tokens_x"] == pytest.approx(tokens / sum(s.generated_tokens for s in base))
        assert row["kv_bytes_x"] == pytest.approx(sum(s.kv_bytes for s in spent) / sum(s.kv_bytes for s in base))
        assert row["kv_bytes_copied_x"] == pytest.approx(
            sum(s.kv_bytes_copied for s in spent) / sum(s.kv_bytes for s in base)
        )
        if sum(row["correct"]):
            assert row["cost_per_correct"]["tokens"] == pytest.approx(tokens / sum(row["correct"]))
        else:
            assert row["cost_per_correct"] == {"tokens": None, "flops": None, "seconds": None}
    chain = by_key["chain"]
    assert chain["tokens_x"] == chain["flops_x"] == chain["latency_x"] == 1.0
    assert chain["efficiency_ratio"] is None
    assert chain["over_baseline"] is None
    four = by_key["votes_4"]
    assert four["efficiency_ratio"] == pytest.approx((four["accuracy"] - chain["accuracy"]) / (four["tokens_x"] - 1))
    assert four["over_baseline"]["estimate"] == pytest.approx(four["accuracy"] - chain["accuracy"])
    pairs = zip(answers["chain"], answers["votes_4"], strict=True)
    assert four["changed_answers"] == sum(one != other for one, other in pairs) > 0
    assert chain["changed_answers"] is None
    assert four["budget"] is four["passes"] is None
    longer = by_key["longer"]["settings"]
    assert f"min_tokens={round(1.5 * chain['tokens'])}" in longer
    assert f"max_tokens={round(3 * chain['tokens'])}" in longer


def test_times_are_measured(study):
    *timed, pool = study[0]["rows"]
    assert pool["latency_s"] is pool["latency_x"] is pool["one_after_another"] is None, "the pool is no strategy"
    assert pool["batched_s"] > 0
    for row in timed:
        assert row["latency_s"] > 0
        assert row["batched_s"] > 0
        assert 0 < row["occupancy"] <= 1
        apart = row["one_after_another"]
        assert apart["problems"] == 2
        assert apart["same_texts"]
        assert apart["latency_ratio"] == pytest.approx(apart["latency_s"] / row["latency_s"])
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["batched_s"])
        assert apart["tokens_per_s"] == pytest.approx(apart["tokens"] / apart["per_problem_s"])
        assert apart["throughput_ratio"] == pytest.approx(row["tokens_per_s"] / apart["tokens_per_s"])
        assert not row["is_resumed"]
        assert row["joules"] is None or row["energy_source"] in ("rapl", "nvml")


def test_curves_and_laws(study):
    result, _ = study
    laws, by_key = result["laws"], {row["key"]: row for row in result["rows"]}
    assert set(laws) == {"self_consistency", "best_of_n", "coverage", "dynamic_allocation"}
    pool = by_key["chain_pool"]
    assert [p["cost"] for p in laws["coverage"]["points"]] == [1, 2, 4, 8]
    last = laws["self_consistency"]["points"][-1]
    assert last["cost"] == pytest.approx(pool["tokens_x"])
    assert last["accuracy"] == pytest.approx(pool["accuracy"])
    costs = [p["cost"] for p in laws["self_consistency"]["points"]]
    assert costs == pytest.approx([pool["tokens_x"] * k / 8 for k in (1, 2, 4, 8)])
    assert [p["accuracy"] for p in laws["dynamic_allocation"]["points"]] == pytest.approx(
        [by_key[key]["accuracy"] for key in ("chain", "votes_2", "votes_4")]
    )
    # two budgets and the baseline determine a law, and leave none to be left out
    assert laws["dynamic_allocation"]["held_out"]["cannot_be_fitted"].startswith(
        "cannot be fitted: 3 different budgets"
    )
    covered = [p["accuracy"] for p in laws["coverage"]["points"]]
    assert covered == sorted(covered)
    assert all(
        a >= b - 1e-12 for a, b in zip(covered, [p["accuracy"] for p in laws["best_of_n"]["points"]], strict=True)
    )


def test_files(study):
    result, out = study
    assert json.loads((out / "study.json").read_text()) == result
    assert result["schema"] == "treedecode.study/2"
    assert {"rows", "laws", "bars", "machine", "versions", "command", "commit", "seed", "problems"} <= result.keys()
    with open(out / "rows.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [line["key"] for line in table] == [entry.key for entry in PLAN]
    assert float(table[2]["tokens_x"]) == result["rows"][2]["tokens_x"]
    text = (out / "report.md").read_text()
    assert all(f"| {entry.label} |" in text for entry in PLAN)
    assert "nan" not in text.lower().split()
    for name in ("accuracy", "latency", "coverage"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        svg = (out / f"{name}.svg").read_text()
        assert "<svg" in svg
        assert f"({name}.svg)" in text
        before = (out / f"{name}.svg").read_bytes()
        plots.draw(result, out)
        assert (out / f"{name}.svg").read_bytes() == before  # a plot is a function of the study


def test_the_report_says_what_the_numbers_say(study):
    result, _ = study
    quiet = {**result, "machine": {**result["machine"], "other_cores": 0.1, "cores": 2}}
    busy = {**result, "machine": {**result["machine"], "other_cores": 0.9, "cores": 2}}
    unknown = {**result, "machine": {**result["machine"], "other_cores": None}}
    assert not any("Other work" in sentence for sentence in report.sentences(unknown))
    said = list(report.sentences(quiet))
    assert not any("Other work" in sentence for sentence in said)
    assert any("Other work took 0.9 of 2 cores meanwhile" in sentence for sentence in report.sentences(busy))
    best = max(result["rows"][1:-1], key=lambda row: row["accuracy"])
    assert any(f"The most accurate is {best['label']}: {100 * best['accuracy']:.1f}%" in sentence for sentence in said)
    rest = result["rows"][1:-1]  # the pool is no strategy
    lost = [{**row, "correct": [2] * 6, "over_baseline": {"estimate": -0.2, "low": -0.3, "high": -0.1}} for row in rest]
    said = list(report.sentences({**quiet, "rows": [result["rows"][0], *lost]}))
    assert f"Below the baseline: {', '.join(row['label'] for row in rest)}." in said
    assert not any("gains most per compute" in sentence for sentence in said)


def test_a_row_that_fails_is_told_and_the_rest_goes_on(conditions, tmp_path, monkeypatch):
    monkeypatch.setitem(rows.STRATEGIES, "broken", Broken)
    entries = [
        PLAN[0],
        Entry("broken", "Broken", "broken"),
        Entry("missing", "Missing", "no_such"),
        Entry("wrong", "Wrong", "self_consistency", {"num_samples": 0}),
        PLAN[3],
    ]
    result = conditions.decoder.run(run.run_study(conditions, entries, tmp_path, num_resamples=10))
    errors = [row["error"] for row in result["rows"]]
    assert errors[0] is errors[4] is None
    assert errors[1].startswith("ArithmeticError: no luck")
    assert "while solving the problem" in errors[1]
    assert errors[2].startswith("ValueError: strategy: expected one of")
    assert errors[3].startswith("ValueError: num_samples")
    assert conditions.decoder.num_branches == 0
    drawn = plots.draw(result, tmp_path)
    report.write(result, tmp_path, [path.stem for path in drawn if path.suffix == ".png"])
    text = (tmp_path / "report.md").read_text()
    assert "* Broken: ArithmeticError: no luck" in text
    with open(tmp_path / "rows.csv", newline="") as file:
        assert [line["accuracy"] == "" for line in csv.DictReader(file)] == [False, True, True, True, False]


def test_without_its_baseline_there_is_no_study(conditions, tmp_path, monkeypatch):
    monkeypatch.setitem(rows.STRATEGIES, "broken", Broken)
    with pytest.raises(ArithmeticError):
        conditions.decoder.run(run.run_study(conditions, [Entry("broken", "Broken", "broken")], tmp_path))


def test_an_interrupted_study_goes_on_where_it_was(conditions, tmp_path):
    def interrupt(entry, solution):
        if entry.key == "votes_4" and solution is not None:
            seen.append(solution)
            if len(seen) == 3:
                raise asyncio.CancelledError

    seen, entries = [], [PLAN[0], PLAN[4], PLAN[5]]
    work = run.run_study(conditions, entries, tmp_path / "a", callback=interrupt, num_resamples=10)
    with pytest.raises(asyncio.CancelledError):
        conditions.decoder.run(work)
    with pytest.raises(ValueError, match="holds a study; go on with it"):
        conditions.decoder.run(run.run_study(conditions, entries, tmp_path / "a"))
    with pytest.raises(ValueError, match="another study, which differs in plan"):
        conditions.decoder.run(run.run_study(conditions, entries[:2], tmp_path / "a", resume=True))
    timing = (tmp_path / "a/rows/chain.timing.json").read_text()
    first = conditions.decoder.run(run.run_study(conditions, entries, tmp_path / "a", resume=True, num_resamples=10))
    whole = conditions.decoder.run(run.run_study(conditions, entries, tmp_path / "b", num_resamples=10))
    assert (tmp_path / "a/rows/chain.timing.json").read_text() == timing
    assert [row["correct"] for row in first["rows"]] == [row["correct"] for row in whole["rows"]]
    assert [row["tokens"] for row in first["rows"]] == [row["tokens"] for row in whole["rows"]]
    assert [row["is_resumed"] for row in first["rows"]] == [False, True, False]
    assert first["laws"] == whole["laws"]
    again = conditions.decoder.run(run.run_study(conditions, entries, tmp_path / "a", resume=True, num_resamples=10))
    assert again["rows"] == first["rows"]
    # interrupted after its problems, while it was timed: what they took side by side is in the journal
    (tmp_path / "a/rows/chain.timing.json").unlink()
    timed = conditions.decoder.run(run.run_study(conditions, entries, tmp_path / "a", resume=True, num_resamples=10))
    assert not timed["rows"][0]["is_resumed"]
    last = json.loads((tmp_path / "a/rows/chain.jsonl").read_text().splitlines()[-1])
    assert timed["rows"][0]["batched_s"] >= last["spent"]["seconds"] / 6


def test_a_folder_with_other_things_in_it_is_left_alone(conditions, tmp_path):
    (tmp_path / "thesis.tex").write_text("!")
    with pytest.raises(ValueError, match="is not empty and holds no study"):
        conditions.decoder.run(run.run_study(conditions, PLAN, tmp_path))
    with pytest.raises(ValueError, match="plan: expected entries"):
        conditions.decoder.run(run.run_study(conditions, [PLAN[0], PLAN[0]], tmp_path / "new"))


def test_accuracy_between_two_budgets_is_on_the_log_scale():
    curve = Curve(np.array([1.0, 4.0]), np.array([[0.0, 1.0], [0.2, 0.2]]))
    np.testing.assert_allclose(analysis.accuracy_at(curve, 2.0), [0.5, 0.2])
    np.testing.assert_allclose(analysis.accuracy_at(curve, 4.0), [1.0, 0.2])
    assert analysis.accuracy_at(curve, 4.5) is None


def test_efficiency_ratio():
    assert rows.efficiency_ratio(0.7, 0.4, 4.0) == pytest.approx(0.1)
    assert rows.efficiency_ratio(0.3, 0.4, 2.0) == pytest.approx(-0.1)
    assert rows.efficiency_ratio(0.7, 0.4, 1.0) is None


def test_the_default_plan_is_chosen_from_by_key_or_strategy():
    entries = plan.default_plan("gate", follows_instructions=True)
    assert [e.key for e in plan.choose(entries, ["mcts", "chain_scaling"])] == ["chain", "chain_scaling", "mcts"]
    assert [e.key for e in plan.choose(entries, ["dynamic_allocation"])] == [
        "chain",
        *(f"dynamic_allocation_{budget}x" for budget in plan.BUDGETS),
    ]
    with pytest.raises(ValueError, match="strategies: expected some of"):
        plan.choose(entries, ["mcst"])
    with pytest.raises(ValueError, match="key: expected"):
        Entry("a/b", "", "chain_of_thought")


def test_the_command(conditions, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "conditions_of", lambda arguments, task, model: conditions)
    arguments = ["study", "--out", str(tmp_path / "out"), "--model", "somewhere", "--strategies"]
    assert cli.main([*arguments, "self_consistency,dynamic_allocation_4x"]) == 1
    out, err = capsys.readouterr()
    assert "Dynamic allocation (budget 4) failed: " in err
    assert "* Baseline: one chain solves" in out
    assert str(tmp_path / "out" / "report.md") in out
    result = json.loads((tmp_path / "out" / "study.json").read_text())
    assert result["command"].startswith("treedecode study --out")
    assert cli.main([*arguments, "self_consistency"]) == 2
    assert "holds a study" in capsys.readouterr().err
    assert cli.main(["study", "--out", str(tmp_path / "two"), "--model", "m", "--strategies", "self_consistency"]) == 0
    assert cli.main(["study", "--out", str(tmp_path / "x"), "--model", "m", "--strategies", "nonsense"]) == 2
    assert "strategies: expected some of" in capsys.readouterr().err


def test_the_command_line_loads_nothing_before_it_runs():
    heavy = "torch", "scipy", "matplotlib", "tqdm"
    code = f"import sys, treedecode.cli.main; print(sorted({set(heavy)} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_journals_are_those_of_solve(study):
    _, out = study
    lines = (out / "rows/votes_4.jsonl").read_text().splitlines()
    assert len(lines) == 7
    problems = {line["id"]: line["problem"] for line in map(json.loads, lines[1:]) if "id" in line}
    assert len(problems) == 6
    Journal(out / "rows/votes_4.jsonl", json.loads(lines[0])["run"], problems).close()


def test_another_task_needs_a_model(tmp_path, capsys):
    data = tmp_path / "questions.jsonl"
    data.write_text('{"question": "2 + 2?", "answer": "4"}\n')
    assert cli.main(["study", "--data", str(data), "--out", str(tmp_path / "out"), "--problems", "1"]) == 2
    assert f"model: expected a folder, a hub name or a .gguf file for the task {data}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_others_use_of_the_machine_is_told_from_its_own(tmp_path, monkeypatch):
    stat, now, own = tmp_path / "stat", 100.0, [1.0, 0.5, 0.0, 0.0, 9e9]
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now)
    monkeypatch.setattr(machine.os, "times", lambda: own)
    monkeypatch.setattr(machine.os, "sysconf", {"SC_CLK_TCK": 100}.get)
    #           user nice system idle iowait irq softirq steal guest guest_nice
    stat.write_text("cpu  1000 100 200 5000 300 10 20 30 77 7\ncpu0 1 1 1 1\n")
    background = machine.BackgroundLoad(stat)
    now, own[:4] = 110.0, [7.0, 1.5, 1.0, 0.0]  # 8 seconds of its own in 10
    stat.write_text("cpu  1700 200 300 9000 800 20 40 250 999 99\ncpu0 1 1 1 1\n")  # 11.5 in all
    assert background.mean_cores == pytest.approx((11.5 - 8.0) / 10)
    stat.unlink()
    assert background.mean_cores is None
    assert machine.BackgroundLoad(tmp_path / "none").mean_cores is None
