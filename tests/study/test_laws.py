"""Laws: fits recover the parameters that data were made from, and refuse data that determine none, with the reason."""

import numpy as np
import pytest

from treedecode.study import laws
from treedecode.study.laws import COVERAGE, LAWS, LOG_LINEAR, LOGISTIC, POWER, CannotFit, Curve
from treedecode.study.slopes import saturation, slopes

COSTS = 2.0 ** np.arange(9)
TRUTH = {
    "power": ({"E_inf": 0.2, "A": 0.55, "b": 0.7}, lambda c: 1 - 0.2 - 0.55 * c**-0.7),
    "logistic": ({"a": -1.0, "k": 0.6}, lambda c: 1 / (1 + np.exp(1.0 - 0.6 * np.log(c)))),
    "log-linear": ({"a": 0.15, "k": 0.09}, lambda c: 0.15 + 0.09 * np.log2(c)),
    "coverage": ({"a": 1.6, "b": 0.45}, lambda c: np.exp(-1.6 * c**-0.45)),
}


def sampled(accuracy, num_problems=500, seed=0, costs=COSTS):
    """Right or wrong, problem by problem, with the chances of a law."""
    rng = np.random.default_rng(seed)
    return Curve(costs, (rng.random((num_problems, len(costs))) < accuracy(costs)).astype(float))


@pytest.mark.parametrize("law", [*LAWS, COVERAGE], ids=lambda law: law.name)
def test_fits_recover_the_parameters(law):
    truth, accuracy = TRUTH[law.name]
    fit = laws.fit(law, sampled(accuracy), num_resamples=100)
    assert set(fit.parameters) == set(truth) == set(fit.intervals)
    for name, value in truth.items():
        low, high = fit.intervals[name]
        assert low <= value <= high
        assert low <= fit.parameters[name] <= high
        assert high - low < 0.8 * max(abs(value), 0.3)
    low, high = fit.band(COSTS)
    assert ((low <= accuracy(COSTS)) & (accuracy(COSTS) <= high)).mean() > 0.7
    np.testing.assert_allclose(fit.accuracy(COSTS), accuracy(COSTS), atol=0.05)


@pytest.mark.parametrize("law", [*LAWS, COVERAGE], ids=lambda law: law.name)
def test_exact_shares_give_the_exact_parameters(law):
    truth, accuracy = TRUTH[law.name]
    costs = 3 * COSTS[:-1]  # the lowest cost need not be 1
    fit = laws.fit(law, Curve(costs, np.tile(accuracy(costs), (4, 1))), num_resamples=2)
    assert fit.parameters == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("law", [*LAWS, COVERAGE], ids=lambda law: law.name)
def test_derivatives(law):
    rng = np.random.default_rng(0)
    low, high = np.array(law.bounds).clip(-3, 3).T
    for _ in range(5):
        params = low + (high - low) * rng.uniform(0.1, 0.9, len(low))
        _, grad = law.predict(params, COSTS, COSTS[[0, -1]])
        for i in range(len(params)):
            step = np.eye(len(params))[i] * 1e-6
            up, down = (law.predict(params + s, COSTS, COSTS[[0, -1]])[0] for s in (step, -step))
            np.testing.assert_allclose(grad[i], (up - down) / 2e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "others"),
    [("power", ["log-linear"]), ("logistic", ["power", "log-linear"]), ("log-linear", ["power"])],
)
def test_the_law_behind_the_data_predicts_best(name, others):
    accuracy = TRUTH[name][1]
    if name == "logistic":  # steep enough that both bends are in the data

        def accuracy(c):
            return 1 / (1 + np.exp(4 - 1.5 * np.log(c)))

    results = laws.compare(sampled(accuracy, num_problems=2000))
    order = [result.law for result in results]
    assert order.index(name) < min(order.index(other) for other in others)
    assert results[0].behind is None
    for result in results[1:]:
        assert result.behind.estimate == pytest.approx(results[0].log_likelihood - result.log_likelihood)
        assert result.behind.low <= result.behind.estimate <= result.behind.high
    by_law = {result.law: result for result in results}
    for other in others:
        if by_law[name].behind is None:
            assert by_law[other].behind.low > 0


def test_a_law_that_rules_out_what_happened_loses_a_bounded_amount():
    curve = sampled(lambda c: np.where(c < 3, 0.02, 0.98), num_problems=50)
    for result in laws.compare(curve):
        assert -np.log(2 * 51) <= result.log_likelihood < 0


def test_a_curve_saturates_where_the_next_budget_gains_nothing():
    rng = np.random.default_rng(0)
    costs = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    difficulty = rng.random((400, 1))
    accuracy = (difficulty < np.array([0.3, 0.5, 0.7, 0.7, 0.7])).astype(float)
    measured = slopes(Curve(costs, accuracy))
    assert [slope.low_cost for slope in measured] == [1, 2, 4, 8]
    assert measured[0].per_doubling.estimate == pytest.approx((accuracy[:, 1] - accuracy[:, 0]).mean())
    assert saturation(measured) == 4.0
    assert saturation(measured[:2]) is None


def test_a_gain_that_comes_later_is_no_saturation():
    # a majority of two is one chain: no gain from 1 to 2, and one at every later doubling
    difficulty = np.random.default_rng(0).random((400, 1))
    accuracy = (difficulty < np.array([0.3, 0.3, 0.5, 0.7, 0.7])).astype(float)
    measured = slopes(Curve(np.array([1.0, 2.0, 4.0, 8.0, 16.0]), accuracy))
    assert [slope.per_doubling.low > 0 for slope in measured] == [False, True, True, False]
    assert saturation(measured) == 8.0
    assert saturation(measured[:3]) is None
    assert saturation([]) is None


def test_a_parameter_at_its_bound_is_not_determined():
    # log-linear data, which tend to no error above 0 as far as a power law can tell
    curve = sampled(lambda c: 0.35 + 0.06 * np.log2(c))
    fit = laws.fit(POWER, curve, num_resamples=50)
    assert fit.parameters["E_inf"] == pytest.approx(0, abs=1e-6)
    assert fit.intervals["E_inf"] is None
    assert fit.intervals["b"].low < fit.parameters["b"] < fit.intervals["b"].high
    assert fit.to_json()["intervals"]["E_inf"] is None
    assert None not in laws.fit(POWER, sampled(TRUTH["power"][1]), num_resamples=20).intervals.values()


def test_equal_leads_on_all_problems_have_an_interval():
    curve = Curve(np.array([1.0, 2.0, 4.0, 8.0]), np.tile([[0.3, 0.5, 0.6, 0.7]], (5, 1)))
    few, many = (laws.compare(Curve(curve.costs, np.tile(curve.accuracy, (times, 1))))[1:] for times in (1, 400))
    for held in (*few, *many):
        assert held.behind.low < held.behind.estimate < held.behind.high
    assert all(held.behind.low < 0 for held in few)  # five problems prove nothing
    widths = [[result.behind.high - result.behind.low for result in results] for results in (few, many)]
    assert all(wide > 10 * narrow for wide, narrow in zip(*widths, strict=True))


def test_slopes_are_per_doubling_and_skip_equal_costs():
    accuracy = np.tile([0.2, 0.6, 0.6], (30, 1))
    (slope,) = slopes(Curve(np.array([1.0, 4.0, 4.0]), accuracy))
    assert slope.per_doubling.estimate == pytest.approx(0.2)


@pytest.mark.parametrize("law", [*LAWS, COVERAGE], ids=lambda law: law.name)
@pytest.mark.parametrize(
    ("curve", "why"),
    [
        (Curve(np.array([1.0]), np.array([[0.0], [1.0]])), "1 different budgets, and at least"),
        (Curve(np.full(6, 2.0), np.tile([[0.0], [1.0]], 6)), "1 different budgets, and at least"),
        (Curve(COSTS, np.ones((5, 9))), "every problem is right at every budget"),
        (Curve(COSTS, np.zeros((5, 9))), "every problem is wrong at every budget"),
    ],
)
def test_what_determines_nothing_is_refused(law, curve, why):
    with pytest.raises(CannotFit, match=f"cannot be fitted: {why}"):
        laws.fit(law, curve)
    with pytest.raises(CannotFit, match=r"^cannot be fitted: "):
        laws.compare(curve)


def test_a_falling_curve_has_no_power_law_but_slopes():
    curve = sampled(lambda c: 0.6 - 0.04 * np.log2(c))
    for law in (POWER, COVERAGE):
        with pytest.raises(CannotFit, match="accuracy does not rise with compute"):
            laws.fit(law, curve)
    assert laws.fit(LOGISTIC, curve, num_resamples=50).intervals["k"].high < 0
    assert laws.fit(LOG_LINEAR, curve, num_resamples=50).flat_share == 1.0
    assert saturation(slopes(curve)) == 1.0


def test_one_problem_fits_as_well_as_it_can():
    fit = laws.fit(POWER, Curve(COSTS, np.array([[0, 0, 0, 1, 0, 1, 1, 1, 1]], float)), num_resamples=5)
    assert all(np.isfinite(value) for value in fit.parameters.values())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((np.array([1.0, 2.0]), np.ones((3, 3))), "accuracy: expected"),
        ((np.array([2.0, 1.0]), np.ones((3, 2))), "costs: expected ascending"),
        ((np.array([0.0, 1.0]), np.ones((3, 2))), "costs: expected ascending numbers above 0"),
        ((np.array([1.0, 2.0]), np.full((3, 2), 1.5)), "accuracy: expected shares"),
    ],
)
def test_bad_curves(arguments, error):
    with pytest.raises(ValueError, match=error):
        Curve(*arguments)
