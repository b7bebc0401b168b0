"""Training and evaluation of a gate, on problems whose success rates are known."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.fake_task import Digits

from treedecode.allocation.allocators import Policy
from treedecode.allocation.chains import Chain, confidence, selected
from treedecode.allocation.features import FEATURE_NAMES, PromptFeatures, feature_vector
from treedecode.allocation.gate import Gate, GateNetwork
from treedecode.allocation.provenance import Provenance
from treedecode.allocation.training.evaluate import evaluate, table
from treedecode.allocation.training.fit import beta_binomial_nll, make_examples, measure, train
from treedecode.allocation.training.rollouts import Rollouts, collect
from treedecode.allocation.training.simulate import Replay, random_orders
from treedecode.cli.main import main
from treedecode.common.intervals import wilson
from treedecode.strategies import TreeOfThoughts
from treedecode.tasks.base import Problem


def population(num_problems=400, num_chains=24, *, seed=0, trees=0, verifier=True):
    """Problems with rates from Beta(0.4, 0.8), which the prompt's entropy tells up to noise; and the rates.

    The verifier scores right chains above 0.5 and wrong ones below. A tree search succeeds at rate sqrt(p).
    """
    rng = np.random.default_rng(seed)
    p = rng.beta(0.4, 0.8, num_problems)
    count = num_chains + trees
    right = rng.random((num_problems, count)) < p[:, None]
    right[:, num_chains:] = rng.random((num_problems, trees)) < np.sqrt(p)[:, None]
    # wrong answers are all different, right ones equal
    classes = np.where(right, 0, 1 + np.arange(count))
    scores = np.where(right, 0.5, 0.0) + rng.random(right.shape) / 2 if verifier else np.full(right.shape, np.nan)
    tokens = rng.integers(8, 24, (num_problems, num_chains))
    return p, Rollouts(
        ids=np.array([f"{i}" for i in range(num_problems)]),
        groups=np.array([["even", "odd"][i % 2] for i in range(num_problems)]),
        prompt_tokens=np.full(num_problems, 12),
        prompt_entropy=np.log(p + 0.01) - np.log(1.01 - p) + rng.normal(0, 0.5, num_problems),
        hidden=np.zeros((num_problems, 0), np.float32),
        classes=classes,
        scores=scores,
        tokens=tokens,
        logprobs=-rng.random(tokens.shape),
        worst_logprobs=-1 - rng.random(tokens.shape),
        right=right,
        tree_tokens=np.full((num_problems, trees), 2.0),
        tree_kv_bytes=np.full((num_problems, trees), 2.0),
        menu=np.array([[3, 5, 5]] * trees, np.int64).reshape(-1, 3),
        provenance=Provenance("scores" if verifier else "", "population", 64, 2),
    )


@pytest.fixture(scope="module")
def trained():
    _, data = population()
    return train(data, max_chains=12, max_epochs=15)


# -- what a gate reads --


def test_confidence_is_the_mean_and_the_worst_window():
    logprobs = np.array([-1.0, -2, -3, -4, -5, -6, -7, -8, -1, -1])
    windows = [logprobs[i : i + 8].mean() for i in range(3)]
    assert confidence(logprobs) == pytest.approx((logprobs.mean(), min(windows)))
    assert confidence(np.array([-1.0, -3.0])) == (-2.0, -2.0)
    assert confidence(np.zeros(0)) == (0.0, 0.0)


def chain(score=None, tokens=5, logprob=-1.0, worst=-2.0):
    return Chain("", None, score, tokens, logprob, worst)


def test_selection_is_by_score_or_by_votes_and_answers_come_first():
    scored = [chain(0.9), chain(0.5), chain(0.7), chain(0.7)]
    assert selected(scored, np.array([-1, 0, 1, 1])) == 2
    assert selected(scored, np.array([-1, -1, -1, -1])) == 0
    voting = [chain() for _ in range(5)]
    assert selected(voting, np.array([-1, 0, 1, 1, 0])) == 1  # a tie: the answer given first
    assert selected(voting, np.array([0, 1, -1, 1, -1])) == 1
    assert selected(voting, np.full(5, -1)) == 0


def test_features_are_what_their_names_say():
    prompt = PromptFeatures(10, 1.5, np.array([7.0, 8.0], np.float32))
    chains = [
        chain(0.2, 4, -1.0, -2.0),
        chain(0.9, 6, -0.5, -3.0),
        chain(0.95, 8, -3.0, -4.0),
        chain(0.4, 2, -1.5, -2.5),
    ]
    values = feature_vector(prompt, chains, np.array([0, 1, -1, 0]))
    named = dict(zip(FEATURE_NAMES, values.tolist(), strict=False))
    expected = {
        "log_prompt_tokens": np.log(10),
        "prompt_entropy": 1.5,
        "log_chains": np.log(4),
        "share_answered": 0.75,
        "share_majority": 0.5,
        "share_classes": 0.5,
        "mean_logprob": -1.5,
        "best_logprob": -0.5,
        "mean_worst_logprob": -2.875,
        "best_worst_logprob": -2.0,
        "log_tokens": np.log(6),
        "selected_share": 0.25,
        "selected_logprob": -0.5,
        "selected_worst_logprob": -3.0,
        "best_score": 0.9,
        "mean_score": 0.6125,
        "other_score": 0.4,
    }
    assert named == pytest.approx(expected)
    assert values[len(FEATURE_NAMES) :].tolist() == [7.0, 8.0]
    assert np.isfinite(feature_vector(prompt, [chain()], np.array([-1]))).all()


# -- fitting --


def test_the_beta_binomial_likelihood_sums_to_one_and_has_its_mean():
    k = torch.arange(11).double()
    for alpha, beta in ((0.3, 0.7), (4.0, 2.0)):
        pair = (torch.full_like(k, alpha), torch.full_like(k, beta))
        p = (-beta_binomial_nll(k, torch.full_like(k, 10), *pair)).exp()
        assert float(p.sum()) == pytest.approx(1)
        assert float((p * k).sum()) == pytest.approx(10 * alpha / (alpha + beta))


def test_examples_count_the_unseen_chains_that_correct_the_answer():
    _, data = population(30, trees=1)
    examples = make_examples(data, min_chains=2, max_chains=9, per_problem=5, rng=np.random.default_rng(0))
    assert len(examples) == 150
    assert ((examples.trials >= 24 - 9) & (examples.trials <= 24 - 2)).all()
    total = np.repeat(data.right[:, :24].sum(axis=1), 5)
    # with this verifier a right chain always beats a wrong one, and an answer is right if any chain was
    np.testing.assert_array_equal(examples.hits[~examples.solved], total[~examples.solved])
    np.testing.assert_array_equal(
        examples.trees[~examples.solved, 0], np.repeat(data.right[:, 24], 5)[~examples.solved]
    )
    with pytest.raises(ValueError, match=r"max_chains: expected from min_chains = 2 to less than the 24 chains"):
        make_examples(data, min_chains=2, max_chains=24, per_problem=1, rng=np.random.default_rng(0))


def test_a_gate_is_calibrated_and_better_than_a_constant(trained):
    gate, figures = trained
    assert sum(figures["problems"].values()) == 400
    _, other = population(seed=9)
    examples = make_examples(other, min_chains=2, max_chains=12, per_problem=4, rng=np.random.default_rng(1))
    on_others = measure(gate, examples)
    for measured in (figures, on_others):
        for name in ("solved", "chains"):
            assert measured[name]["log_likelihood"] > measured[name]["log_likelihood_of_a_constant"]
            assert measured[name]["auc"] > 0.7
    assert on_others["solved"]["ece"] < 0.03
    assert on_others["chains"]["ece"] < 0.06


def test_a_network_is_drawn_anew_from_the_generator():
    network, drawn = GateNetwork(5, 2), []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        network.reset_parameters()
        drawn.append(torch.cat([parameter.detach().flatten() for parameter in network.parameters()]))
    assert drawn[0].equal(drawn[2])
    assert (drawn[0] != drawn[1]).float().mean() > 0.9


def test_a_gate_comes_back_from_its_file(trained, tmp_path):
    gate, _ = trained
    gate.save(tmp_path / "gate.safetensors")
    again = Gate.load(tmp_path / "gate.safetensors")
    x = np.random.default_rng(0).normal(size=(5, gate.config.num_features)).astype(np.float32)
    for name, values in vars(gate.believe(x)).items():
        np.testing.assert_array_equal(getattr(again.believe(x), name), values)
    assert (again.config, repr(again)) == (gate.config, repr(gate))
    (tmp_path / "other").write_bytes(b"not a gate")
    with pytest.raises(ValueError, match=r"path: .*other is no gate"):
        Gate.load(tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        Gate.load(tmp_path / "missing")
    assert gate.config.prices
    newer = Gate(replace(gate.config, features=99), gate.network, gate.mean, gate.std, gate.calibrators, gate.costs)
    newer.save(tmp_path / "newer")
    with pytest.raises(ValueError, match=r"reads version 99 of the features"):
        Gate.load(tmp_path / "newer")


def test_rollouts_come_back_from_their_file(tmp_path):
    _, data = population(25)
    data.save(tmp_path / "rollouts.npz")
    for name, values in vars(Rollouts.load(tmp_path / "rollouts.npz")).items():
        np.testing.assert_array_equal(values, getattr(data, name))
    np.savez(tmp_path / "other.npz", ids=data.ids)
    with pytest.raises(ValueError, match=r"holds no rollouts: \['classes'"):
        Rollouts.load(tmp_path / "other.npz")


def test_collected_rollouts_are_what_the_decoder_did(make_decoder, tmp_path):
    problems = [Problem(f"p{i}", f"the cat {i}", str(i), group="a" if i else None) for i in range(3)]
    journal = str(tmp_path / "journal")
    menu = {"tree_search": TreeOfThoughts, "menu": [(2, 2, 1)]}
    settings = {"task": Digits(), "num_chains": 5, **menu, "seed": 3, "journal": journal}

    def verifier(problem, text):
        return len(text) / 100

    dec = make_decoder()
    data = collect(dec, problems, verifier=verifier, **settings)
    assert data.ids.tolist() == ["p0", "p1", "p2"]
    assert data.groups.tolist() == ["", "a", "a"]
    assert (data.classes.shape, data.right.shape, data.tokens.shape) == ((3, 6), (3, 6), (3, 5))
    assert data.hidden.shape == (3, 0)
    assert data.has_scores
    verifier_name = "TextScorer(fn=<function test_collected_rollouts_are_what_the_decoder_did.<locals>.verifier>, "
    assert data.provenance == Provenance(verifier_name + "probability=False, workers=0)", "digits", 52, 2)
    searched = np.rint(data.tree_tokens[:, 0] * data.tokens.mean(axis=1))
    solutions = [json.loads(line) for line in (tmp_path / "journal").read_text().splitlines()[1:]]
    for solution in solutions:
        i = data.ids.tolist().index(solution["id"])
        nodes = [node for node in solution["tree"]["nodes"] if node["kind"] == "generated"][:5]
        assert data.tokens[i].sum() + searched[i] == solution["spending"]["generated_tokens"]
        digits = [next((c for c in node["text"] if c.isdigit()), None) for node in nodes]
        done = [node["text"].endswith("\n") for node in nodes]
        assert data.tokens[i].tolist() == [node["num_tokens"] for node in nodes]
        np.testing.assert_allclose(
            data.logprobs[i], [node["logprob"] / node["num_tokens"] for node in nodes], rtol=1e-5
        )
        assert data.right[i, :5].tolist() == [digit == str(i) for digit in digits]
        assert (data.classes[i, :5] >= 0).tolist() == [
            d and digit is not None for d, digit in zip(done, digits, strict=True)
        ]
    again = collect(make_decoder(), problems, verifier=verifier, **settings)
    for name, values in vars(data).items():
        np.testing.assert_array_equal(getattr(again, name), values)
    with pytest.raises(ValueError, match=r"menu: tree searches score branches and need a verifier"):
        collect(dec, problems, **settings)


@pytest.mark.parametrize("trees", [0, 1])
def test_the_command_trains_and_judges(tmp_path, capsys, trees):
    _, data = population(80, 8, trees=trees)
    data.save(tmp_path / "rollouts.npz")
    out, rollouts = str(tmp_path / "out"), str(tmp_path / "rollouts.npz")
    assert main(["gate", "train", "--rollouts", rollouts, "--max-chains", "6", "--out", out]) == 0
    figures = json.loads((tmp_path / "out" / "gate.json").read_text())
    gate = str(tmp_path / "out" / "gate.safetensors")
    assert figures["gate"] == repr(Gate.load(gate))
    capsys.readouterr()
    judge = ["gate", "eval", gate, "--rollouts", rollouts, "--budgets", "3", "--repeats", "1", "--out", out]
    assert main(judge) == 0
    report = json.loads((tmp_path / "out" / "gate_report.json").read_text())
    shown = table(report)
    assert shown in capsys.readouterr().out
    lines = [line for line in shown.splitlines() if line.startswith("tree ")]
    assert len(lines) == len(report["calibration"]["trees"]) == trees
    assert report["budgets"][0]["uniform_at_twice"] is not None
    assert main(["gate", "eval", str(tmp_path / "none"), "--rollouts", rollouts, "--out", out]) == 2
    assert "treedecode gate: error: " in capsys.readouterr().err


# -- replay --


def test_a_replay_spends_what_it_may_and_counts_what_was_right():
    _, data = population(60, trees=1)
    replay = Replay(data, random_orders(data, np.random.default_rng(0)))
    uniform = replay.uniform(5)
    in_order = np.take_along_axis(data.right[:, :24], replay.orders, axis=1)
    np.testing.assert_array_equal(uniform.right, in_order[:, :5].any(axis=1))
    np.testing.assert_array_equal(
        uniform.cost, np.take_along_axis(data.tokens, replay.orders, axis=1)[:, :5].sum(axis=1)
    )
    both = replay.result(np.full(60, 2), np.zeros(60, np.int64))
    np.testing.assert_array_equal(both.right, in_order[:, :2].any(axis=1) | data.right[:, 24])
    best = replay.offline(replay.oracle_bidder(), Policy(4.0, 20, 4, 0), 2)
    assert best.multiple == pytest.approx(4, rel=0.1)
    solved = in_order[:, :2].any(axis=1)
    assert (best.chains[solved] == 2).all(), "the oracle spends nothing on what is right already"


def test_dynamic_beats_uniform_and_comes_near_the_oracle(trained):
    gate, _ = trained
    _, data = population(300, seed=5)
    report = evaluate(
        gate, data, budgets=(4,), probes=2, wave=4, repeats=1, examples_per_problem=2, permutations=99, floors=(0, 3)
    )
    [row] = report["budgets"]
    assert row["spent"] == pytest.approx(4, rel=0.05)
    assert row["gain_over_uniform"] > 0.03
    assert 0 <= row["regret_to_oracle"] < row["gain_over_uniform"] / 2
    assert row["gain_over_uniform_at_twice"] > -0.02, "half the compute for what uniform allocation comes to"
    assert json.loads(json.dumps(report)) == report
    assert "odd" in table(report)
    for name in ("accuracy", "oracle", "gain_over_uniform", "regret_to_oracle"):
        low, high = row[f"{name}_interval"]
        assert low <= row[name] <= high <= low + 0.15
    free, floored = report["audits"][0]["floors"]
    for floor in (free, floored):  # two tests each, so four of the report
        assert all(group["p_value_holm"] >= group["p_value"] for group in floor["groups"].values())
    assert floored["worst_false_low_budget_rate"] is not None
    assert all(group["spend"] >= 2 for group in free["groups"].values())


def test_policies_that_agree_on_all_problems_may_differ_on_others(trained):
    gate, _ = trained
    _, data = population(60, seed=5)
    [row] = evaluate(
        gate, data, budgets=(2,), probes=2, repeats=1, examples_per_problem=2, permutations=9, floors=(0,)
    )["budgets"]
    assert row["gain_over_uniform"] == 0, "with the probes the budget is spent"
    low, high = row["gain_over_uniform_interval"]
    assert low == -high == pytest.approx(-wilson(0, 60).high)


@pytest.mark.parametrize("budget", [2.0, 4.0, 7.0])
def test_the_price_of_a_budget_meets_it(trained, budget):
    gate, _ = trained
    costs, prices = np.array(gate.config.prices).T
    assert (np.diff(costs) > 0).all()
    assert (np.diff(prices) < 0).all()
    _, data = population(300, seed=7)
    replay = Replay(data, random_orders(data, np.random.default_rng(0)))
    result = replay.at_price(replay.gate_bidder(gate, 1), Policy(budget, 13, 1, 0), gate.price(budget), 1)
    # 60 problems told the price; spends of a problem differ by about 4 chains
    assert result.multiple == pytest.approx(min(budget, costs[-1]), abs=3 * 4 / np.sqrt(60))


def test_tree_searches_are_used_where_they_pay():
    _, data = population(trees=1)
    gate, figures = train(data, max_chains=12, max_epochs=8)
    assert figures["trees"][0]["auc"] > 0.6
    _, other = population(200, seed=6, trees=1)
    replay = Replay(other, random_orders(other, np.random.default_rng(0)))
    result = replay.offline(replay.gate_bidder(gate, 4), Policy(5.0, 16, 4, 0), 2)
    searched = result.trees >= 0
    assert 0.02 < searched.mean() < 0.9
    assert result.multiple == pytest.approx(5, rel=0.1)


def test_a_gate_without_verifier_goes_by_votes():
    _, data = population(200, verifier=False)
    gate, figures = train(data, max_chains=12, max_epochs=5)
    assert not gate.config.uses_verifier
    assert figures["solved"]["auc"] > 0.7
    with pytest.raises(ValueError, match=r"verifier: Gate\(\w+\) was trained with no verifier, and the run has scores"):
        evaluate(gate, population(30)[1])
