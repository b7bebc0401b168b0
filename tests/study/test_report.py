"""Sentences of the report, each from numbers that leave one thing to say."""

import numpy as np
import pytest

from treedecode.study import analysis, report
from treedecode.study.laws import Curve

MACHINE = {"other_cores": None, "cores": 2}
ROW = {
    "error": None,
    "strategy": "chain_of_thought",
    "accuracy_ci": [0.3, 0.7],
    "problems": 4,
    "tokens_x": 1.0,
    "latency_x": None,
    "one_after_another": None,
    "efficiency_ratio": None,
    "budget": None,
    "passes": None,
    "num_cut": 0,
}
COSTS = 2.0 ** np.arange(5)


def laws_from(shares, costs=COSTS, num_problems=400):
    """Analyses a curve with these accuracies, of problems that stay solved at larger budgets."""
    difficulty = np.random.default_rng(0).random((num_problems, 1))
    curve = Curve(np.asarray(costs), (difficulty < np.array(shares)).astype(float))
    return analysis.laws_of(curve, num_resamples=30, seed=0)


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ([0.1, 0.3, 0.5, 0.7, 0.9], "Every budget up to 16x gained measurably on the one before."),
        ([0.3, 0.5, 0.7, 0.7, 0.7], "Beyond 4x no budget gained measurably on the one before."),
        (
            [0.3, 0.3, 0.5, 0.6, 0.7],
            "Every budget up to 16x gained measurably on the one before, except from 1x to 2x.",
        ),
    ],
)
def test_saturation(shares, said):
    assert report._law_sentence("Votes", laws_from(shares)).endswith(said)


def test_of_one_budget_nothing_is_said_to_gain():
    said = report._law_sentence("Votes", laws_from([0.4], costs=[1.0]))
    assert "gained" not in said
    assert said.startswith("Votes: no law was compared (cannot be fitted: 1 different budgets")
    assert said.endswith(").")


def test_an_error_at_its_bound_is_not_determined():
    laws = laws_from([0.35, 0.41, 0.47, 0.53, 0.59])
    assert laws["fits"]["power"]["intervals"]["E_inf"] is None
    level = {**laws, "held_out": [{"law": "power", "log_likelihood": -0.6, "behind": None}]}
    assert "its error tends to a value that is not determined (at its bound)" in report._law_sentence("Votes", level)
    assert "E_inf not determined (at its bound, 0)" in "\n".join(report._laws(laws))


def test_a_limit_is_told_only_of_a_law_that_is_not_behind():
    laws = laws_from([0.4, 0.6, 0.7, 0.75, 0.77])
    law = {"law": "power", "log_likelihood": -0.6}
    best = {"law": "logistic", "log_likelihood": -0.5, "behind": None}
    for low, is_told in ((-0.01, True), (0.01, False)):
        held = [best, {**law, "behind": {"estimate": 0.1, "low": low, "high": 0.2}}]
        said = report._law_sentence("Votes", {**laws, "held_out": held})
        assert ("as a power law its error tends to" in said) == is_told


def row(label, correct, changed_answers=None, **fields):
    gap = {"estimate": 0.1, "low": -0.1, "high": 0.3}
    said = {"label": label, "correct": correct, "accuracy": np.mean(correct), "changed_answers": changed_answers}
    return {**ROW, **said, "over_baseline": gap, **fields}


def said_of(*rows):
    base = row("One chain", [1, 0, 1, 0])
    return list(report.sentences({"rows": [base, *rows], "laws": {}, "machine": MACHINE}))


@pytest.mark.parametrize(("changed", "where", "what"), [(0, "answer to", "answer"), (3, "verdict on", "verdict")])
def test_a_row_that_decides_as_the_baseline_does_is_not_compared(changed, where, what):
    said = said_of(row("Longer", [1, 0, 1, 0], changed, tokens_x=7.26))
    words = f"Longer gave the baseline's {where} every problem, at 7.26x the tokens: what it generated besides"
    assert said[1:] == [f"{words} changed no {what} here."]
    said = said_of(row("Longer", [1, 0, 1, 0], 0), row("Votes", [1, 1, 1, 0], 1))
    assert any(one.startswith("The most accurate is Votes: 75.0%") for one in said)
    assert "Not to be told from the baseline with so many problems: Votes." in said


def test_the_pool_of_chains_is_no_strategy():
    said = said_of(row("Pool", [1, 1, 1, 1], 2, strategy="chain_pool"))
    assert said == ["One chain solves 50.0% of 4 problems (30.0 to 70.0)."]


def test_a_budget_that_was_not_used_up_is_told():
    def spent(tokens_x):
        return said_of(row("Budget 8", [1, 1, 1, 0], 1, budget=8.0, tokens_x=tokens_x))

    assert any("A budget was not used up by Budget 8, which spent 5.35x:" in one for one in spent(5.35))
    assert not any("not used up" in one for one in spent(7.9))


def test_passes_are_told():
    assert "Refined made 4.9 passes on average." in said_of(row("Refined", [1, 1, 1, 0], 1, passes=4.9))


def test_every_column_of_the_table_has_a_name():
    head, line, *_ = report._table([])
    names = [cell.strip() for cell in head.strip("|").split("|")]
    assert all(names)
    assert line.count("|") == len(names) + 1


def criterion(name, evidence, verdict="holds"):
    return {"bar": name, "verdict": verdict, "evidence": evidence}


def test_what_a_part_of_the_rows_cannot_tell_is_said_once():
    bars = [
        criterion("a", "no row mcts", "cannot be told"),
        criterion("b", "2.1x (0.1 s)"),
        criterion("c", "no row tree_of_thoughts", "cannot be told"),
        criterion("d", "no row tree_of_thoughts", "cannot be told"),
        criterion("e", "5.0x", "does not hold"),
    ]
    assert list(report._criteria(bars)) == [
        "* b: holds (2.1x (0.1 s))",
        "* e: **does not hold** (5.0x)",
        "* 3 others cannot be told without the rows mcts, tree_of_thoughts",
    ]
    assert list(report._criteria(bars[1:2])) == ["* b: holds (2.1x (0.1 s))"]
