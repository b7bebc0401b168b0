"""Forecasts of the cost of runs against the cost of runs."""

import numpy as np
import pytest
from support.fake_task import Digits, rate, talkative_decoder
from support.gates import known_costs

import treedecode as td
from treedecode.allocation.cost_quantiles import LEVELS, prompt_vector
from treedecode.allocation.gate import Gate
from treedecode.allocation.provenance import Provenance
from treedecode.allocation.training.fit import train
from treedecode.allocation.training.fit_costs import fit_costs
from treedecode.allocation.training.rollouts import Rollouts, collect
from treedecode.cli import main as cli
from treedecode.cli.outputs import forecast_summary
from treedecode.reporting.tree_page import in_bytes
from treedecode.strategies import MCTS, BestOfN, ChainOfThought, DynamicAllocation, SelfConsistency, TreeOfThoughts
from treedecode.tasks.base import Problem

WORDS = ["cat", "dog", "end", "mat", "hat"]
PROBLEMS = [Problem(f"p{i}", f"the {WORDS[i % 5]} {'sat ' * (i % 3)}on {i}", str(i % 10)) for i in range(900)]
TRAINING, FRESH = PROBLEMS[:800], PROBLEMS[800:]


class Long(Digits):
    """Solutions whose lengths differ much."""

    max_new_tokens = 30


@pytest.fixture(scope="module")
def gate():
    """A gate trained on runs of the model that the tests use."""
    with talkative_decoder() as dec:
        settings = {"tree_search": TreeOfThoughts, "menu": [(2, 2, 1)], "seed": 3}
        data = collect(dec, TRAINING, task=Long(), num_chains=4, verifier=rate, **settings)
    trained, _ = train(data, max_chains=3, max_epochs=2)
    return trained


def exact(gate, tokens=12):
    """Returns the gate, sure that every chain has so many tokens."""
    costs = known_costs(gate.config.hidden_size, [tokens] * 3)
    return Gate(gate.config, gate.network, gate.mean, gate.std, gate.calibrators, costs)


@pytest.mark.parametrize(
    ("strategy", "verifier"),
    [
        (ChainOfThought(), None),
        (SelfConsistency(num_samples=5), None),
        (BestOfN(num_samples=4), rate),
        (TreeOfThoughts(depth=2, width=2, keep=1), rate),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
@pytest.mark.parametrize("unit", ["tokens", "kv_bytes"])
def test_runs_cost_what_was_forecast(gate, strategy, verifier, unit):
    with talkative_decoder() as dec:
        predicted = td.forecast(dec, [p.prompt for p in FRESH], strategy=strategy, gate=gate, unit=unit)
        assert dec.num_branches == 0
        result = td.solve(dec, FRESH, strategy=strategy, task=Long(), verifier=verifier, seed=5)
    field = {"tokens": "generated_tokens", "kv_bytes": "kv_bytes"}[unit]
    spent = np.array([getattr(solution.spending, field) for solution in result.solutions])
    # the mean of 100 problems is known better than a problem is, but not better than the gate learned it from 800
    middle = predicted.quantile(0.5)
    assert spent.sum() == pytest.approx(middle, rel={"tokens": 0.12, "kv_bytes": 0.2}[unit])
    for level in (0.1, 0.5, 0.9):
        below = (spent <= predicted.problem_quantile(level)).mean()
        assert below == pytest.approx(level, abs=0.17)


def test_lengths_that_are_known_give_exact_costs(gate):
    class Fixed(Digits):
        end, max_new_tokens = (), 12

    sure, never_ending = exact(gate), td.Sampling(ignore_eos=True)
    for strategy in (BestOfN(num_samples=5), SelfConsistency(num_samples=3), ChainOfThought()):
        with talkative_decoder() as dec:
            prompts = [p.prompt for p in FRESH[:4]]
            forecasts = {
                unit: td.forecast(dec, prompts, strategy=strategy, gate=sure, unit=unit)
                for unit in ("tokens", "kv_bytes")
            }
            result = td.solve(
                dec, FRESH[:4], strategy=strategy, task=Fixed(), verifier=rate, sampling=never_ending, seed=5
            )
        total = result.ledger.total
        assert (
            forecasts["tokens"].quantile(0.01)
            == forecasts["tokens"].quantile(0.99)
            == pytest.approx(total.generated_tokens)
        )
        assert forecasts["kv_bytes"].quantile(0.5) == pytest.approx(total.kv_bytes)


def test_prompts_are_computed_once_for_all_units(gate):
    strategy, prompts, shown, computed = BestOfN(num_samples=4), [p.prompt for p in FRESH[:9]], {}, {}
    for unit in ("tokens", "kv_bytes"):
        with talkative_decoder() as dec:
            predicted = td.forecast(dec, prompts, strategy=strategy, gate=gate, unit=unit)
            shown[unit], computed[unit] = predicted.quantile(0.5), sum(map(sum, dec.model.forwards))
    with talkative_decoder() as dec:
        lines = list(forecast_summary(dec, dec.prompt_ids(prompts), strategy, gate, td.Budget()))
        assert sum(map(sum, dec.model.forwards)) == computed["tokens"] == computed["kv_bytes"]
    assert [line.split()[0] for line in lines] == ["forecast", "tokens", "kv_bytes"]
    assert f"{shown['tokens']:,.0f}" in lines[1].split()
    assert in_bytes(shown["kv_bytes"]) in lines[2]


def test_a_budget_is_enough_as_often_as_the_forecast_says(gate):
    strategy, prompts = BestOfN(num_samples=4), [p.prompt for p in FRESH[:5]]
    with talkative_decoder() as dec:
        predicted = td.forecast(dec, prompts, strategy=strategy, gate=gate, num_draws=4000)
        assert predicted.draws.shape == (5, 4000)
        limit = float(predicted.quantile(0.3))
        assert predicted.within(limit) == pytest.approx(0.3, abs=0.02)
        assert (predicted.within(0), predicted.within(1e9)) == (0, 1)
        np.testing.assert_array_equal(
            predicted.draws, td.forecast(dec, prompts, strategy=strategy, gate=gate, num_draws=4000).draws
        )
        totals = []
        for seed in range(60):
            result = td.solve(dec, FRESH[:5], strategy=strategy, task=Long(), verifier=rate, seed=seed)
            totals.append(result.ledger.total.generated_tokens)
    assert (np.array(totals) <= limit).mean() == pytest.approx(0.3, abs=0.25)


def test_dynamic_allocation_costs_its_budget(gate):
    strategy = DynamicAllocation(budget=3, gate=gate, probes=1)
    with talkative_decoder() as dec:
        predicted = td.forecast(dec, [p.prompt for p in FRESH], strategy=strategy)
        result = td.solve(dec, FRESH, strategy=strategy, task=Long(), verifier=rate, seed=5)
        with pytest.raises(ValueError, match=r"unit: dynamic allocation divides tokens"):
            td.forecast(dec, ["the cat"], strategy=strategy, unit="kv_bytes")
    low, high = predicted.quantile([0.025, 0.975])
    assert low * 0.9 <= result.ledger.total.generated_tokens <= high


def test_quantiles_are_calibrated_and_rise():
    """Lengths whose distribution the prompt tells: fitted on some, measured on others."""

    def rollouts(seed, count=400):
        rng = np.random.default_rng(seed)
        entropy = rng.uniform(0, 2, count)
        tokens = (
            np.exp(2 + entropy[:, None] + 0.3 * (1 + entropy[:, None]) * rng.normal(size=(count, 6))).astype(int) + 1
        )
        zeros = np.zeros((count, 6))
        return entropy, Rollouts(
            ids=np.arange(count).astype(str),
            groups=np.full(count, ""),
            prompt_tokens=np.full(count, 20),
            prompt_entropy=entropy,
            hidden=np.zeros((count, 0), np.float32),
            classes=zeros.astype(int),
            scores=zeros,
            tokens=tokens,
            logprobs=zeros,
            worst_logprobs=zeros,
            right=zeros.astype(bool),
            tree_tokens=np.zeros((count, 0)),
            tree_kv_bytes=np.zeros((count, 0)),
            menu=np.zeros((0, 3), int),
            provenance=Provenance("scores", "lengths", 64, 2),
        )

    costs = fit_costs(rollouts(0)[1], rollouts(1)[1], 0)
    entropy, fresh = rollouts(2)
    quantiles = costs(np.stack([prompt_vector(fresh.prompt(i), 0) for i in range(len(fresh))]))
    assert (np.diff(quantiles, axis=-1) >= 0).all()
    for level in (2, 10, 17):
        share = (np.log1p(fresh.tokens) <= quantiles[:, 0, level, None]).mean()
        assert share == pytest.approx(LEVELS[level], abs=0.04)
    # not only over all problems: among the widest too
    wide = entropy > 1.5
    assert (np.log1p(fresh.tokens[wide]) <= quantiles[wide, 0, 17, None]).mean() == pytest.approx(LEVELS[17], abs=0.06)


def test_forecasts_that_cannot_be_made_say_why(gate):
    with talkative_decoder() as dec:
        for strategy, message in (
            (MCTS(), r"strategy: what mcts with these settings costs does not follow"),
            (ChainOfThought(min_tokens=5), r"strategy: what chain_of_thought with these settings"),
            (TreeOfThoughts(depth=3, width=5, keep=5), r"strategy: the gate has seen no tree search .*\(2, 2, 1\)"),
            (TreeOfThoughts(depth=2, width=2, keep=1, order="dfs"), r"strategy: what tree_of_thoughts with"),
        ):
            with pytest.raises(ValueError, match=message):
                td.forecast(dec, ["the cat"], strategy=strategy, gate=gate)
        with pytest.raises(ValueError, match=r"gate: best_of_n has none of its own"):
            td.forecast(dec, ["the cat"], strategy=BestOfN())
        with pytest.raises(ValueError, match=r"unit: expected one of 'tokens', 'kv_bytes', got 'joules'"):
            td.forecast(dec, ["the cat"], strategy=BestOfN(), gate=gate, unit="joules")
        with pytest.raises(ValueError, match=r"num_draws: expected at least 1, got 0"):
            td.forecast(dec, ["the cat"], strategy=BestOfN(), gate=gate, num_draws=0)
        with pytest.raises(ValueError, match=r"prompts: is empty"):
            td.forecast(dec, [], strategy=BestOfN(), gate=gate)
        with pytest.raises(ValueError, match=r"prompts\[70\]: is empty"):
            td.forecast(dec, ["the cat"] * 70 + [""], strategy=BestOfN(), gate=gate)
        assert dec.num_branches == 0


def test_a_gate_keeps_its_costs_in_its_file(gate, tmp_path):
    gate.save(tmp_path / "gate.safetensors")
    again = Gate.load(tmp_path / "gate.safetensors")
    features = np.random.default_rng(0).normal(size=(5, len(gate.costs.mean))).astype(np.float32)
    np.testing.assert_array_equal(again.costs(features), gate.costs(features))
    assert repr(again) == repr(gate)


def test_the_command_forecasts_and_runs_nothing(capsys):
    arguments = ["solve", "--strategy", "best_of_n:num_samples=4", "--verifier", "value_head", "--num-problems", "5"]
    assert cli.main([*arguments, "--forecast", "--budget", "tokens=1e6"]) == 0
    head, tokens, budget, kv_bytes = capsys.readouterr().out.splitlines()
    assert head.split() == ["forecast", "5%", "25%", "50%", "75%", "95%"]
    values = [int(value.replace(",", "")) for value in tokens.split()[1:]]
    assert values == sorted(values)
    assert budget.strip() == "a budget of 1,000,000 is enough with probability 1.00"
    assert kv_bytes.startswith("kv_bytes")
    assert cli.main(["solve", "--strategy", "mcts", "--verifier", "value_head", "--forecast"]) == 2
    assert "does not follow from how long chains are" in capsys.readouterr().err
