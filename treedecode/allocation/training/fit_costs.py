"""Fits quantiles of costs to rollouts."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treedecode.allocation.chain_costs import kv_tokens
from treedecode.allocation.cost_quantiles import (
    LEVELS,
    NUM_PROMPT_FEATURES,
    CostQuantiles,
    QuantileNetwork,
    prompt_vector,
)
from treedecode.allocation.gate import Gate
from treedecode.allocation.training.early_stopping import fit_until_best
from treedecode.allocation.training.rollouts import Rollouts


def prompt_vectors(data: Rollouts, hidden_size: int) -> np.ndarray:
    """Returns the features of all prompts, `[n, NUM_PROMPT_FEATURES + hidden_size]` float32."""
    return np.stack([prompt_vector(data.prompt(i), hidden_size) for i in range(len(data))])


def log_costs(data: Rollouts) -> np.ndarray:
    """Returns the logarithms log(1 + cost) of chains and tree searches.

    Costs are the tokens of every chain, and of every search the tokens generated and the tokens whose K and V it reads.
    Of a search there is but one sample, which is repeated for every chain.

    Returns:
        `[n, c, 1 + 2 m]` float32.
    """
    n, c = data.tokens.shape
    chain_kv_tokens = kv_tokens(data.prompt_tokens[:, None], data.tokens)
    single_chain_costs = np.stack([data.tokens.mean(axis=1), chain_kv_tokens.mean(axis=1)], axis=1)
    trees = (np.stack([data.tree_tokens, data.tree_kv_bytes], axis=2) * single_chain_costs[:, None]).reshape(n, -1)
    costs = np.concatenate([data.tokens[..., None], np.repeat(trees[:, None], c, axis=1)], axis=2)
    return np.log1p(costs).astype(np.float32)


def pinball(quantiles: Tensor, values: Tensor) -> Tensor:
    """Computes the mean pinball loss over all levels.

    Args:
        quantiles: `[n, num_targets, len(LEVELS)]`.
        values: `[n, c, num_targets]`.

    Returns:
        `[num_targets]`.
    """
    above = values[..., None] - quantiles[:, None]
    levels = torch.as_tensor(LEVELS, dtype=above.dtype)
    return torch.maximum(levels * above, (levels - 1) * above).mean(dim=(0, 1, 3))


def fit_costs(
    fitted: Rollouts,
    calibrated: Rollouts,
    hidden_size: int,
    *,
    learning_rate: float = 3e-3,
    weight_decay: float = 0.02,
    max_epochs: int = 100,
    patience: int = 10,
    batch_size: int = 64,
    seed: int = 0,
) -> CostQuantiles:
    """Fits quantiles of costs to the first part; the second ends the fit and then shifts every quantile."""
    x, y = torch.from_numpy(prompt_vectors(fitted, hidden_size)), torch.from_numpy(log_costs(fitted))
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    center, scale = y.mean((0, 1)), y.flatten(0, 1).std(0).clamp_min(1e-3)
    x, y = (x - mean) / std, (y - center) / scale
    calibrated_x = (torch.from_numpy(prompt_vectors(calibrated, hidden_size)) - mean) / std
    calibrated_y = torch.from_numpy(log_costs(calibrated))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = QuantileNetwork(NUM_PROMPT_FEATURES + hidden_size, y.shape[-1])
        optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)

        def epoch() -> None:
            for rows in torch.randperm(len(x)).split(batch_size):
                optimizer.zero_grad()
                pinball(network(x[rows]), y[rows]).sum().backward()
                optimizer.step()

        def loss() -> float:
            return float(pinball(network(calibrated_x), (calibrated_y - center) / scale).sum())

        fit_until_best(network, epoch, loss, max_epochs=max_epochs, patience=patience)
    shape = (y.shape[-1], len(LEVELS))
    costs = CostQuantiles(network, mean, std, center, scale, torch.zeros(shape), *torch.zeros(2, shape[0]))
    features = prompt_vectors(calibrated, hidden_size)
    residuals = (calibrated_y[..., None] - costs.raw(features)[:, None]).numpy()
    shifts = np.stack([np.quantile(residuals[..., j], level, axis=(0, 1)) for j, level in enumerate(LEVELS)], axis=1)
    costs = replace(costs, shifts=torch.from_numpy(shifts).float())
    measured = np.expm1(calibrated_y.double().numpy()).mean(axis=1)  # chains of a problem are not independent
    predicted = np.expm1(costs(features)).mean(axis=-1)
    factors = measured.mean(axis=0) / predicted.mean(axis=0)
    errors = (measured - factors * predicted).std(axis=0) / np.sqrt(len(measured)) / measured.mean(axis=0)
    return replace(costs, factors=torch.from_numpy(factors).float(), errors=torch.from_numpy(errors).float())


def measure_costs(gate: Gate, data: Rollouts) -> list[dict[str, Any]]:
    """Measures the predicted quantiles of each cost on problems that they were not fitted to.

    "within_95" is the share of costs between the outer quantiles, "pinball" the loss of log(1 + cost), beside that of a
    constant with the same quantiles for every problem, those of these very problems.
    """
    values = log_costs(data)
    quantiles = gate.costs(prompt_vectors(data, gate.config.hidden_size))
    units = ("tokens", "KV tokens")
    names = ["tokens of a chain", *(f"{unit} of tree {i}" for i in range(len(gate.config.menu)) for unit in units)]
    within = (values >= quantiles[:, None, :, 0] - 1e-6) & (values <= quantiles[:, None, :, -1] + 1e-6)
    constant = np.quantile(values.reshape(-1, values.shape[-1]), LEVELS, axis=0).T
    constants = np.repeat(constant[None], len(values), axis=0)
    losses, constant_losses = (pinball(torch.from_numpy(x), torch.from_numpy(values)) for x in (quantiles, constants))
    return [
        {
            "cost": name,
            "within_95": float(within[..., i].mean()),
            "pinball": float(losses[i]),
            "pinball_of_a_constant": float(constant_losses[i]),
        }
        for i, name in enumerate(names)
    ]
