"""Calibration: isotonic regression against its min-max formula, and the figures on forecasts that are known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treedecode.allocation.calibration import auc, expected_calibration_error, fit_isotonic


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.floats(0, 1), st.floats(0.1, 5)), min_size=1, max_size=12))
def test_isotonic_regression_is_the_min_max_formula(rows):
    """fit(x_i) = max over j <= i of min over k >= i of the mean of j..k (Barlow et al., 1972)."""
    x, y, weights = (np.array(column, np.float64) for column in zip(*rows, strict=True))
    fitted = fit_isotonic(x, y, weights)
    positions = np.unique(x)
    for i, value in enumerate(positions):
        intervals = [(x >= low) & (x <= high) for low in positions[: i + 1] for high in positions[i:]]
        averages = np.reshape([np.average(y[rows], weights=weights[rows]) for rows in intervals], (i + 1, -1))
        assert fitted(value) == pytest.approx(averages.min(axis=1).max(), abs=1e-9)
    assert (np.diff(fitted.y) >= 0).all()
    assert (np.diff(fitted.x) >= 0).all()


def test_between_knots_it_is_linear_and_beyond_them_constant():
    fitted = fit_isotonic(np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 0.6, 0.4, 1.0]))
    np.testing.assert_allclose(
        fitted(np.array([0, 1, 1.5, 2, 2.5, 3, 3.5, 4, 9])), [0, 0, 0.25, 0.5, 0.5, 0.5, 0.75, 1, 1]
    )
    with pytest.raises(ValueError, match=r"x: is empty"):
        fit_isotonic(np.zeros(0), np.zeros(0))


def test_a_perfect_forecast_has_no_calibration_error_and_a_biased_one_has_its_bias():
    rng = np.random.default_rng(0)
    p = rng.beta(0.5, 1.0, 200_000)
    happened = (rng.random(len(p)) < p).astype(float)
    # of 15 bins of 13,333, each off by about sqrt(2 p (1 - p) / (pi n)) < 0.0035
    assert expected_calibration_error(p, happened) < 0.0035
    assert expected_calibration_error(p * 0.5, happened) == pytest.approx(p.mean() / 2, abs=0.004)
    assert expected_calibration_error(fit_isotonic(p**3, happened)(p**3), happened) < 0.0035


def test_equal_predictions_share_a_bin_and_weights_are_of_outcomes():
    predicted = np.full(100, 0.5)
    assert expected_calibration_error(predicted, np.r_[np.zeros(50), np.ones(50)]) == 0
    off = expected_calibration_error(np.array([0.2, 0.8]), np.array([0.2, 0.3]), np.array([9.0, 1.0]))
    assert off == pytest.approx(0.05)


def test_auc_counts_pairs():
    rng = np.random.default_rng(1)
    predicted, happened = rng.integers(0, 5, 60) / 5, rng.random(60) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a in predicted[happened] for b in predicted[~happened]]
    assert auc(predicted, happened) == pytest.approx(np.mean(pairs))
    assert np.isnan(auc(predicted, np.ones(60, bool)))
