"""Journals: a run goes on with the solutions of the same run alone, and with everything that it has spent."""

import asyncio
import itertools
import json
from dataclasses import dataclass, replace

import pytest
from support.counting import MEASURED, Count
from support.fake_task import FakeTask, Lines, Recorder, rate, talkative_decoder
from support.fakes import FakeModel
from torch import nn

import treedecode as td
from treedecode.accounting import energy
from treedecode.accounting.ledger import RunSpending
from treedecode.accounting.meter import Spending
from treedecode.search import run as search_run
from treedecode.search.journal import Journal, num_solutions
from treedecode.search.solve import solve_async
from treedecode.strategies import BestOfN, SelfConsistency
from treedecode.tasks import Problem
from treedecode.verify import TextScorer, Vote


@dataclass(frozen=True)
class Weighted:
    """A scorer that holds a function, whose repr has an address."""

    function: object
    probability = False

    async def __call__(self, frontier, problem):
        return await frontier.score(lambda texts: [self.function(text) for text in texts])


def length():
    """Makes a new function each time, as every process does."""

    def measure(text):
        return len(text)

    return measure


@pytest.fixture
def run(make_decoder, tmp_path):
    def run(name=None, weight=1.0, answer=None, prompt=None, verifier=None, **options):
        decoder = make_decoder(**options)
        decoder.model.module = nn.Linear(20, 10)
        decoder.model.module.name_or_path = name
        nn.init.constant_(decoder.model.module.weight, weight)
        nn.init.zeros_(decoder.model.module.bias)
        work = solve_async(
            decoder,
            [Problem("one", "make one", answer), Problem("two", "make two")],
            strategy=SelfConsistency(num_samples=2),
            task=Lines(),
            verifier=verifier,
            prompt=prompt,
            journal=str(tmp_path / "journal.jsonl"),
        )
        before = decoder.stats.num_forwards
        asyncio.run(work)
        return decoder.stats.num_forwards - before

    return run


def test_a_function_is_the_same_in_the_next_process(run):
    first, second = Weighted(length()), Weighted(length())
    assert repr(first) != repr(second)
    assert run(verifier=first) > 0
    assert run(verifier=second) == 0


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (
            {"prompt": lambda problem: "an example, then " + problem.prompt},
            "has solutions of 2 problems with another question, .*template or worked examples, the first is 'one'",
        ),
        ({"answer": "one"}, "has solutions of 1 problems with another question, .*, the first is 'one'"),
        ({"name": "another/model"}, r"is of another run: the model was \[None, .* and is \['another/model'"),
        ({"weight": 1.001}, r"is of another run: the model's weights differ\. Give the arguments of that run"),
        ({"num_pages": 20}, "of another run: the number of tokens that .* have room for was 512 and is 80"),
    ],
)
def test_weights_prompts_answers_and_lengths_tell_runs_apart(run, changed, named):
    assert run() > 0
    with pytest.raises(ValueError, match=f"journal: .*{named}"):
        run(**changed)
    assert run() == 0


def test_prompts_are_compared_as_tokens(run):
    tokens = {"one": [2, 3], "two": [4, 5]}
    assert run(prompt=lambda problem: tokens[problem.id]) > 0
    assert run(prompt=lambda problem: tuple(tokens[problem.id])) == 0
    with pytest.raises(ValueError, match=r"solutions of 1 problems with another question, .* first is 'two'"):
        run(prompt=lambda problem: tokens["one"])


# -- a finished run grows --


def test_a_finished_run_takes_more_problems(make_decoder, tmp_path):
    journal = tmp_path / "journal.jsonl"
    options = {"strategy": SelfConsistency(num_samples=2), "task": TASK}
    whole = td.solve(make_decoder(), PROBLEMS, **options)
    first = td.solve(make_decoder(), PROBLEMS[1:3], journal=str(journal), **options)
    grown = td.solve(make_decoder(), PROBLEMS, journal=str(journal), **options)
    assert [solution.to_json()["tree"] for solution in grown.solutions] == [
        solution.to_json()["tree"] for solution in whole.solutions
    ]
    assert grown.ledger.total.generated_tokens == whole.ledger.total.generated_tokens
    assert [solution.seconds for solution in grown.solutions[1:3]] == [s.seconds for s in first.solutions]
    assert num_solutions(journal) == len(PROBLEMS)
    with pytest.raises(ValueError, match=r"solutions of 1 problems that are not among these, the first is 'test/0'"):
        td.solve(make_decoder(), PROBLEMS[1:], journal=str(journal), **options)


def outcomes(result):
    """Everything of a run's solutions but what they cost."""
    free = ("spending", "seconds")
    return [{key: v for key, v in solution.to_json().items() if key not in free} for solution in result.solutions]


@pytest.mark.parametrize(
    "strategy",
    [
        BestOfN(),
        BestOfN(answer="weighted"),
        SelfConsistency(),
        SelfConsistency(stop="beta", window=2),
        SelfConsistency(stop="window", window=3),
    ],
    ids=["best", "weighted", "majority", "beta", "window"],
)
def test_a_finished_run_takes_more_samples(strategy, tmp_path):
    journal = tmp_path / "journal.jsonl"
    options = {"task": TASK, "verifier": TextScorer(rate, probability=True), "seed": 4}

    def solve(num_samples, journal=None):
        sized = replace(strategy, num_samples=num_samples)
        return td.solve(talkative_decoder(max_branches=24), PROBLEMS, strategy=sized, journal=journal, **options)

    whole = solve(8)
    first = solve(3, str(journal))
    grown = solve(5, str(journal))
    assert num_solutions(journal) == num_solutions(journal, 5) == len(PROBLEMS)
    assert num_solutions(journal, 3) == 0
    more = solve(8, str(journal))
    assert outcomes(more) == outcomes(whole)
    assert outcomes(grown) == outcomes(solve(5))
    for name in ("generated_tokens", "branch_forwards"):
        assert getattr(more.ledger.total, name) - getattr(whole.ledger.total, name) in range(3 * len(PROBLEMS))
    assert more.ledger.lost_tokens == 0
    assert all(a.seconds > b.seconds for a, b in zip(more.solutions, first.solutions, strict=True))
    again = solve(8, str(journal))
    assert (outcomes(again), again.ledger.total) == (outcomes(more), more.ledger.total)
    with pytest.raises(ValueError, match=r"has solutions of 8 samples, and num_samples is 5\. A run can have more"):
        solve(5, str(journal))


def test_samples_are_not_added_where_it_would_change_the_others(make_decoder, tmp_path):
    options = {"task": TASK, "journal": str(tmp_path / "journal.jsonl")}
    for settings in ({"verifier": Vote()}, {"verifier": rate, "budget": td.Budget(tokens=99)}):
        settings["journal"] = str(tmp_path / str(len(settings)))
        td.solve(make_decoder(), PROBLEMS[:2], strategy=BestOfN(num_samples=2), task=TASK, **settings)
        changed = r"the strategy was BestOfN\(num_samples=2, .* and is BestOfN\(num_samples=4, "
        with pytest.raises(ValueError, match=changed):
            td.solve(make_decoder(), PROBLEMS[:2], strategy=BestOfN(num_samples=4), task=TASK, **settings)
    td.solve(make_decoder(), PROBLEMS[:2], strategy=SelfConsistency(num_samples=2), **options)
    changed = r"the strategy was SelfConsistency\(num_samples=any, stop='never', .* and is Self.*'beta'"
    with pytest.raises(ValueError, match=changed):
        td.solve(make_decoder(), PROBLEMS[:2], strategy=SelfConsistency(num_samples=4, stop="beta"), **options)


@pytest.mark.parametrize("changed", [{"budget": td.Budget(tokens=10**6)}, {"strategy": "shares"}])
def test_a_run_whose_problems_share_something_keeps_them(make_decoder, tmp_path, changed):
    @dataclass(frozen=True)
    class Shares(SelfConsistency):
        def share(self, problems, notes):
            return len(problems)

    options = {"strategy": SelfConsistency(num_samples=2), "task": TASK, "journal": str(tmp_path / "journal.jsonl")}
    options |= {"strategy": Shares(num_samples=2)} if "strategy" in changed else changed
    td.solve(make_decoder(), PROBLEMS[:2], **options)
    assert len(td.solve(make_decoder(), PROBLEMS[:2], **options).solutions) == 2
    with pytest.raises(ValueError, match=r"is of another run: the problems differ\. Give the arguments of that run"):
        td.solve(make_decoder(), PROBLEMS, **options)


# -- what a run has spent, over all its processes --

TASK = FakeTask()
PROBLEMS = TASK.problems(5)
STRATEGY = BestOfN(num_samples=2)
SUMS = ("computed_tokens", "generated_tokens", "prompt_tokens", "flops", "kv_bytes_copied", "branch_forwards")


class Killed(Exception):
    """Ends a process that had the time to release its branches."""


def best(dec, journal=None, **settings):
    settings = {"verifier": Recorder(), "journal": journal and str(journal), **settings}
    return td.solve(dec, PROBLEMS, strategy=STRATEGY, task=TASK, **settings)


def killed(dec, journal, after, **settings):
    """Runs until solution number `after`."""
    count = itertools.count(1)

    def kill(solution):
        if next(count) == after:
            raise Killed

    with pytest.raises(Killed):
        best(dec, journal, callback=kill, **settings)


def entries(journal, torn=False):
    """Reads the lines of a journal after the first; `torn` leaves the last one out."""
    return [json.loads(line) for line in journal.read_text().splitlines()[1 : -1 if torn else None]]


@pytest.fixture
def make(make_decoder):
    """Makes decoders with branches for two problems at a time."""
    return lambda: make_decoder(FakeModel(eos_logit=1.5), max_branches=4)


@pytest.mark.parametrize("after", [1, 3])
def test_a_resumed_ledger_is_what_both_processes_did(tmp_path, monkeypatch, after):
    first, second = talkative_decoder(max_branches=4), talkative_decoder(max_branches=4)
    journal = tmp_path / "journal"
    whole = best(talkative_decoder(max_branches=4)).ledger
    assert whole.lost_tokens == 0
    with monkeypatch.context() as patch:
        count = Count(first, patch)
        killed(first, journal, after)
    before = entries(journal)
    known = [entry for entry in before if "id" in entry]
    assert before == [*known, before[-1]], "solutions, then what the rest had cost"
    assert after <= len(known) < len(PROBLEMS)
    with monkeypatch.context() as patch:
        other = Count(second, patch)
        ledger = best(second, journal).ledger
    done = vars(count.spent[None] + other.spent[None])
    assert {name: getattr(ledger.total, name) for name in MEASURED} == {name: done[name] for name in MEASURED}
    assert ledger.total.generated_tokens == sum(count.sampled[None]) + sum(other.sampled[None])
    # problems that were solved count once, as they cost then, and the others as often as they were begun
    assert [ledger.problems[entry["id"]] for entry in known] == [Spending(**entry["spending"]) for entry in known]
    for name in ("generated_tokens", "prompt_tokens"):
        mine, others = ([getattr(one, name) for one in run.problems.values()] for run in (ledger, whole))
        assert mine == others
        assert getattr(ledger.total, name) > getattr(whole.total, name) == sum(others)
    assert ledger.lost_tokens == ledger.total.generated_tokens - whole.total.generated_tokens
    assert ledger.total_seconds > before[-1]["spent"]["seconds"] > 0
    assert ledger.busy_seconds > before[-1]["spent"]["busy_seconds"] > 0


def test_the_last_line_of_a_killed_process_says_what_it_spent(make, tmp_path, monkeypatch):
    monkeypatch.setattr(search_run, "_SPENT_SECONDS", 0.0)  # it notes what it has spent at every turn
    journal, copies = tmp_path / "journal", []

    def rating(problem, text):
        copies.append(journal.read_bytes())
        return rate(problem, text)

    whole = best(make(), journal, verifier=Recorder(rating))
    monkeypatch.undo()
    noted = 0
    for i, copy in enumerate(dict.fromkeys(copies)):
        torn = tmp_path / f"{i}"
        torn.write_bytes(copy + b'{"spent": {"spending": {"prompt_to')
        last = entries(torn, torn=True)[-1]
        noted += "id" not in last
        known = {entry["id"] for entry in entries(torn, torn=True) if "id" in entry}
        ledger = best(make(), torn).ledger
        rest = sum(spent.generated_tokens for name, spent in ledger.problems.items() if name not in known)
        assert ledger.total.generated_tokens == last["spent"]["spending"]["generated_tokens"] + rest
        assert ledger.lost_tokens == ledger.total.generated_tokens - whole.ledger.total.generated_tokens >= 0
        assert ledger.total_seconds > last["spent"]["seconds"]
    assert noted > 1


def test_a_run_that_is_done_costs_nothing_more(make_decoder, tmp_path):
    journal = tmp_path / "journal"
    ledger = best(make_decoder(), journal).ledger
    written = journal.read_bytes()
    again = best(make_decoder(), journal).ledger
    assert journal.read_bytes() == written
    assert (again.problems, again.total) == (ledger.problems, ledger.total)
    assert again.total_seconds >= entries(journal)[-1]["spent"]["seconds"]


def test_a_budget_goes_on_from_what_was_spent(make, tmp_path):
    for limit in (60, 100):
        journal, budget, decoders = tmp_path / f"{limit}", td.Budget(tokens=limit), [make(), make()]
        killed(decoders[0], journal, 1, budget=budget)
        result = best(decoders[1], journal, budget=budget)
        total = result.ledger.total.generated_tokens
        assert limit <= total < limit + 4
        if decoders[0].engine.runner.graphs is None:  # else there are tokens that nobody took, of steps ahead
            assert total == sum(dec.stats.num_sampled_tokens for dec in decoders)
        assert result.ledger.lost_tokens > 0
        assert any(solution.is_cut for solution in result.solutions)


@pytest.mark.parametrize("limit", ["seconds", "joules"])
def test_time_and_energy_of_earlier_processes_count(make, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(energy, "_open_counter", lambda device: (itertools.count(0, 0.001).__next__, "a meter"))
    journal, budget = tmp_path / "journal", td.Budget(**{limit: 900})
    too_long = sum(solution.is_cut for solution in best(make()).solutions)
    killed(make(), journal, 1, budget=budget)
    lines = journal.read_text().splitlines()
    last, num_left = json.loads(lines[-1]), len(PROBLEMS) - num_solutions(journal)
    for spent, is_over in ((600, False), (900, True)):  # a busy machine takes seconds for the rest
        last["spent"][limit] = spent
        journal.write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
        dec = make()
        result = best(dec, journal, budget=budget)
        num_cut = sum(solution.is_cut for solution in result.solutions)
        assert num_cut >= num_left if is_over else num_cut == too_long
        assert (dec.stats.num_sampled_tokens == 0) == is_over
        found = {"seconds": result.ledger.total_seconds, "joules": result.ledger.joules}[limit]
        assert spent <= found < spent + 1 if limit == "joules" else spent <= found
        assert result.ledger.energy_source == "a meter"
        journal.write_text("\n".join(lines) + "\n")


def test_energy_that_is_known_in_part_is_not_known():
    measured, other = RunSpending(Spending(), 1.0, 0.5, 3.0, "rapl"), RunSpending(Spending(), 1.0, 0.5, 4.0, "nvml")
    unknown = RunSpending(Spending(), 2.0, 0.25, None, "not measured (no RAPL counters)")
    assert measured + measured == RunSpending(Spending(), 2.0, 1.0, 6.0, "rapl")
    assert measured + other == RunSpending(Spending(), 2.0, 1.0, 7.0, "rapl, nvml")
    for both in (measured + unknown, unknown + measured):
        assert both == RunSpending(Spending(), 3.0, 0.75, None, "not measured (no RAPL counters)")


def test_a_journal_that_does_not_say_what_was_spent_is_refused(run, tmp_path):
    run()
    journal = tmp_path / "journal.jsonl"
    text = journal.read_text()
    journal.write_text(text.replace("treedecode.journal/5", "treedecode.journal/1"))
    with pytest.raises(ValueError, match=r"has the schema 'treedecode.journal/1', not .*another version of treedecode"):
        run()
    journal.write_text(text.replace('"spent"', '"sent"'))
    with pytest.raises(ValueError, match="line 2, cannot be read"):
        run()
    for name, error in (
        ("answer", "KeyError.'answer'"),
        ("spending", "KeyError.'spending'"),
        ("generated_tokens", "TypeError.*'other'"),
    ):
        journal.write_text(text.replace(f'"{name}"', '"other"'))
        with pytest.raises(ValueError, match=f"journal: .*journal.jsonl has a line that cannot be read: {error}"):
            run()


def test_solutions_are_counted_without_reading_them(tmp_path):
    path = tmp_path / "journal"
    assert num_solutions(path) == 0
    book = Journal(path, {"a": 1}, dict.fromkeys("xyz", "digest"))
    for name in "xyz":
        book.add_spent({})
        book.add({"text": 'id"', "id": name}, {})
    book.close()
    assert num_solutions(path) == 3
    path.write_bytes(path.read_bytes()[:-1])  # the last one is not whole
    assert num_solutions(path) == 2
    assert Journal(path, {"a": 1}, dict.fromkeys("xyz", "digest")).solutions.keys() == {"x", "y"}
