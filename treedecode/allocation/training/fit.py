"""Fits a gate to rollouts."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from treedecode.allocation.calibration import Isotonic, auc, expected_calibration_error, fit_isotonic
from treedecode.allocation.chains import selected
from treedecode.allocation.features import feature_vector
from treedecode.allocation.gate import Gate, GateConfig, GateNetwork, TreeSearch, raw_beliefs
from treedecode.allocation.training.early_stopping import fit_until_best
from treedecode.allocation.training.fit_costs import fit_costs, measure_costs
from treedecode.allocation.training.fit_prices import fit_prices
from treedecode.allocation.training.rollouts import Rollouts
from treedecode.allocation.training.simulate import KNOWN_RATE

_MIN_PROBLEMS = 20


@dataclass(frozen=True)
class Examples:
    """Training examples, each a problem after some of its chains in some order.

    Attributes:
        features: `[n, num_features]` float32.
        solved: `[n]` bool: the answer selected from those chains is right.
        trials, hits: `[n]` numbers of the other chains, and of those among them that correct the answer.
        trees: `[n, m]` bool: the tree searches that correct it.
    """

    features: np.ndarray
    solved: np.ndarray
    hits: np.ndarray
    trials: np.ndarray
    trees: np.ndarray

    def __len__(self) -> int:
        return len(self.features)


def make_examples(
    data: Rollouts, *, min_chains: int, max_chains: int, per_problem: int, rng: np.random.Generator
) -> Examples:
    """Makes examples after `min_chains` to `max_chains` chains, few as often as many (log-uniform).

    Raises:
        ValueError: no chain would be left to learn from.
    """
    _check_chains(data.num_chains, min_chains, max_chains)
    features, solved, hits, trees = [], [], [], []
    shape = (len(data), per_problem)
    sizes = np.exp(rng.uniform(np.log(min_chains), np.log(max_chains + 1), shape)).astype(np.int64)
    for problem in range(len(data)):
        chains, prompt = data.chains(problem), data.prompt(problem)
        for size in sizes[problem]:
            order = rng.permutation(data.num_chains)
            seen, unseen = order[:size], order[size:]
            first_chains, classes = [chains[i] for i in seen], data.classes[problem, seen]
            chosen = int(seen[selected(first_chains, classes)])
            corrects = data.corrects(problem, chosen)
            features.append(feature_vector(prompt, first_chains, classes))
            solved.append(data.right[problem, chosen])
            hits.append(corrects[unseen].sum())
            trees.append(corrects[data.num_chains :])
    trials = data.num_chains - sizes.ravel()
    return Examples(np.array(features), np.array(solved), np.array(hits), trials, np.array(trees, bool))


def check_sizes(num_problems: int, num_chains: int, *, min_chains: int = 1, max_chains: int = 16) -> None:
    """Checks that there are enough problems, and chains of each, to train on.

    Raises:
        ValueError: there are too few.
    """
    if num_problems < _MIN_PROBLEMS:
        raise ValueError(f"num_problems: expected at least {_MIN_PROBLEMS} to split, got {num_problems}")
    _check_chains(num_chains, min_chains, max_chains)


def _check_chains(num_chains: int, min_chains: int, max_chains: int) -> None:
    if not 1 <= min_chains <= max_chains < num_chains:
        raise ValueError(
            f"max_chains: expected from min_chains = {min_chains} to less than the {num_chains} chains of a "
            f"problem, got {max_chains}"
        )


def beta_binomial_nll(hits: Tensor, trials: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Computes the negative log-likelihoods of counts under Beta-binomial distributions.

    Returns:
        `[n]`, nats.
    """
    misses = trials - hits
    chosen = torch.lgamma(trials + 1) - torch.lgamma(hits + 1) - torch.lgamma(misses + 1)
    return _log_beta(alpha, beta) - _log_beta(alpha + hits, beta + misses) - chosen


def _log_beta(alpha: Tensor, beta: Tensor) -> Tensor:
    return torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)


def _loss(network: GateNetwork, batch: tuple[Tensor, ...]) -> Tensor:
    """Computes the mean negative log-likelihood of a batch.

    Further chains and tree searches count only where the selected answer is wrong.
    """
    x, solved, hits, trials, trees = batch
    logit, rate, total, tree_logits = network(x)
    mean = rate.sigmoid().clamp(1e-4, 1 - 1e-4)
    wrong = 1 - solved
    chains = beta_binomial_nll(hits, trials, mean * total, (1 - mean) * total)
    searches = binary_cross_entropy_with_logits(tree_logits, trees, reduction="none").sum(dim=1)
    return (binary_cross_entropy_with_logits(logit, solved, reduction="none") + wrong * (chains + searches)).mean()


def _tensors(examples: Examples, mean: Tensor, std: Tensor) -> tuple[Tensor, ...]:
    x = (torch.from_numpy(examples.features) - mean) / std
    targets = (examples.solved, examples.hits, examples.trials, examples.trees)
    return (x, *(torch.from_numpy(array.astype(np.float32)) for array in targets))


def train(
    data: Rollouts,
    *,
    min_chains: int = 1,
    max_chains: int = 16,
    examples_per_problem: int = 8,
    width: int = 64,
    dropout: float = 0.2,
    weight_decay: float = 0.02,
    learning_rate: float = 2e-3,
    max_epochs: int = 60,
    patience: int = 6,
    batch_size: int = 256,
    seed: int = 0,
) -> tuple[Gate, dict[str, Any]]:
    """Trains a gate, and measures it on problems that neither its weights nor its calibration have seen.

    Problems are split 70 : 15 : 15. The first part is fitted: by the likelihood of whether the selected answer is right
    (Bernoulli), of the number of further chains that correct it (Beta-binomial) and of whether tree searches do, and by
    the pinball loss of costs. The second part ends the fit, calibrates the beliefs (isotonic regression) and sets the
    prices of budgets. The third part is measured. Hidden states are read only if that makes the second part more
    likely: from hundreds of problems a network learns them by heart.

    Returns:
        the gate, and its figures as JSON.

    Raises:
        ValueError: there are too few problems to split, or an argument does not fit the rollouts (named).
    """
    check_sizes(len(data), data.num_chains, min_chains=min_chains, max_chains=max_chains)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(data))
    ends = [int(len(data) * share) for share in (0.7, 0.85)]
    parts = [data.rows(np.sort(part)) for part in np.split(order, ends)]
    sizes = {"min_chains": min_chains, "max_chains": max_chains, "per_problem": examples_per_problem}
    fitted, calibrated, held_out = (make_examples(part, **sizes, rng=rng) for part in parts)
    menu = _menu(data)
    fits = []
    for hidden_size in sorted({0, data.hidden.shape[1]}):
        config = GateConfig(hidden_size, min_chains, max_chains, data.provenance, menu)
        first, second = (
            replace(part, features=part.features[:, : config.num_features]) for part in (fitted, calibrated)
        )
        mean = torch.from_numpy(first.features.mean(axis=0))
        std = torch.from_numpy(first.features.std(axis=0)).clamp_min(1e-6)
        loss, network = _fit(
            GateNetwork(config.num_features, len(menu), width, dropout),
            _tensors(first, mean, std),
            _tensors(second, mean, std),
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            max_epochs=max_epochs,
            patience=patience,
            batch_size=batch_size,
            seed=seed,
        )
        fits.append((loss, config, network, mean, std, _calibrators(network, second, mean, std)))
    _, config, network, mean, std, calibrators = min(fits, key=lambda fit: fit[0])
    fitted_parts = (network, mean, std, calibrators, fit_costs(parts[0], parts[1], config.hidden_size, seed=seed))
    prices = fit_prices(Gate(config, *fitted_parts), parts[1], seed=seed)
    gate = Gate(replace(config, prices=prices), *fitted_parts)
    held_out = replace(held_out, features=held_out.features[:, : gate.config.num_features])
    problems = {name: len(part) for name, part in zip(("fitted", "calibrated", "held_out"), parts, strict=True)}
    return gate, {"problems": problems, **measure(gate, held_out), "costs": measure_costs(gate, parts[2])}


def _menu(data: Rollouts) -> tuple[TreeSearch, ...]:
    """Returns the tree searches of the rollouts, with their mean costs."""
    tokens, kv_bytes = data.tree_tokens.mean(axis=0), data.tree_kv_bytes.mean(axis=0)
    return tuple(
        TreeSearch(depth, width, keep, float(tokens[i]), float(kv_bytes[i]))
        for i, (depth, width, keep) in enumerate(data.menu.tolist())
    )


def _fit(
    network: GateNetwork,
    fitted: tuple[Tensor, ...],
    calibrated: tuple[Tensor, ...],
    *,
    learning_rate: float,
    weight_decay: float,
    max_epochs: int,
    patience: int,
    batch_size: int,
    seed: int,
) -> tuple[float, GateNetwork]:
    """Fits a network to the first part, and returns its best loss on the second with the network of that loss."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)

    def epoch() -> None:
        for rows in torch.randperm(len(fitted[0])).split(batch_size):
            optimizer.zero_grad()
            _loss(network, tuple(part[rows] for part in fitted)).backward()
            optimizer.step()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.reset_parameters()
        best = fit_until_best(
            network, epoch, lambda: float(_loss(network, calibrated)), max_epochs=max_epochs, patience=patience
        )
    return best, network


def _calibrators(network: GateNetwork, examples: Examples, mean: Tensor, std: Tensor) -> tuple[Isotonic, ...]:
    raw = raw_beliefs(network, (torch.from_numpy(examples.features) - mean) / std)
    solved = fit_isotonic(raw.solved, examples.solved.astype(np.float64))
    wrong = ~examples.solved
    if not wrong.any():  # nothing tells what corrects an answer; the network is as good as anything
        identity = Isotonic(np.array([0.0, 1.0]), np.array([0.0, 1.0]))
        return (solved, *[identity] * (1 + raw.trees.shape[1]))
    rates = (raw.alpha / (raw.alpha + raw.beta))[wrong]
    trials = examples.trials[wrong]
    rate = fit_isotonic(rates, examples.hits[wrong] / trials, trials)
    trees = zip(raw.trees[wrong].T, examples.trees[wrong].T, strict=True)
    return (solved, rate, *(fit_isotonic(x, y.astype(np.float64)) for x, y in trees))


def measure(gate: Gate, examples: Examples) -> dict[str, Any]:
    """Measures a gate on examples: mean log-likelihoods (nats) beside those of a constant, ECE and AUC.

    "solved" is of whether the selected answer is right. "chains" is, where it is wrong, of the number of further chains
    that correct it (the AUC is of whether any does; the constant is one Bernoulli rate for all). "trees" is, by tree
    search, of whether it corrects the answer.
    """
    beliefs = gate.believe(examples.features)
    wrong = ~examples.solved
    alpha, beta = beliefs.alpha[wrong], beliefs.beta[wrong]
    hits, trials = examples.hits[wrong], examples.trials[wrong]
    rates = alpha / (alpha + beta)
    counts = (torch.from_numpy(hits.astype(np.float64)), torch.from_numpy(trials.astype(np.float64)))
    constant = torch.full((len(hits),), max(float(hits.sum() / trials.sum()), 1e-9) if len(hits) else 0.5).double()
    known_rate = constant * KNOWN_RATE, (1 - constant) * KNOWN_RATE
    chains = {
        "log_likelihood": -_mean(beta_binomial_nll(*counts, torch.from_numpy(alpha), torch.from_numpy(beta))),
        "log_likelihood_of_a_constant": -_mean(beta_binomial_nll(*counts, *known_rate)),
        "ece": expected_calibration_error(rates, hits / trials, trials) if len(hits) else None,
        "auc": auc(rates, hits > 0),
        "mean_rate": float(hits.sum() / trials.sum()) if len(hits) else None,
    }
    trees = zip(beliefs.trees[wrong].T, examples.trees[wrong].T, strict=True)
    return {
        "examples": len(examples),
        "solved": _bernoulli(beliefs.solved, examples.solved),
        "chains": chains,
        "trees": [_bernoulli(predicted, happened) for predicted, happened in trees],
    }


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0


def _bernoulli(predicted: np.ndarray, happened: np.ndarray) -> dict[str, Any]:
    if len(happened) == 0:
        return {}

    def log_likelihood(probability: np.ndarray) -> float:
        clipped = np.clip(probability, 1e-4, 1 - 1e-4)  # isotonic calibration gives 0 and 1
        return float(np.where(happened, np.log(clipped), np.log1p(-clipped)).mean())

    return {
        "log_likelihood": log_likelihood(predicted),
        "log_likelihood_of_a_constant": log_likelihood(np.full(len(happened), happened.mean())),
        "ece": expected_calibration_error(predicted, happened.astype(np.float64)),
        "auc": auc(predicted, happened),
        "mean": float(happened.mean()),
    }
