"""Sentences of the report, each from numbers that leave one thing to say."""

import numpy as np
import pytest

from treedecode.study import analysis, report
from treedecode.study.laws import Curve

COSTS = 2.0 ** np.arange(5)


def laws_from(shares, costs=COSTS, num_problems=400):
    """What is said of a curve with these accuracies; a problem that is solved stays so."""
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
            "Every budget up to 16x gained measurably on the one before, but for the steps from 1x to 2x.",
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
