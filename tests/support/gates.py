"""Gates for the fake model."""

from types import SimpleNamespace

import numpy as np
import torch
from support.fakes import FakeModel

from treedecode.allocation.calibration import Isotonic
from treedecode.allocation.cost_quantiles import LEVELS, NUM_PROMPT_FEATURES, CostQuantiles, QuantileNetwork
from treedecode.allocation.gate import Gate, GateConfig, GateNetwork, TreeSearch
from treedecode.allocation.provenance import Provenance
from treedecode.verify.scorers import as_scorer

IDENTITY = Isotonic(np.array([0.0, 1.0]), np.array([0.0, 1.0]))


def known_costs(hidden_size, costs):
    """Makes quantiles that are sure of these costs, whatever the prompt."""
    num_features, num_targets = NUM_PROMPT_FEATURES + hidden_size, len(costs)
    network = QuantileNetwork(num_features, num_targets, width=1)
    ones = torch.ones(num_features)
    return CostQuantiles(
        network.eval(),
        0 * ones,
        ones,
        center=torch.tensor(costs, dtype=torch.float64).log1p(),
        scale=torch.zeros(num_targets),
        shifts=torch.zeros(num_targets, len(LEVELS)),
        factors=torch.ones(num_targets),
        errors=torch.zeros(num_targets),
    )


def gate(verifier, task, *, trees=0, hidden_size=0, seed=0):
    """Makes a gate with random weights, so that its beliefs differ with everything it reads.

    Args:
        verifier, task: of the runs that it is for, on the fake model; verifier None = none.
    """
    menu = tuple(TreeSearch(depth=2, width=2, keep=1 + i, tokens=2.0 + i, kv_bytes=3.0) for i in range(trees))
    scorer = None if verifier is None else as_scorer(verifier)
    provenance = Provenance.of(SimpleNamespace(model=FakeModel), task, scorer)
    config = GateConfig(hidden_size, 1, 16, provenance, menu, prices=((1.0, 0.5), (16.0, 0.001)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = GateNetwork(config.num_features, trees)
    ones = torch.ones(config.num_features)
    return Gate(
        config, network, 0 * ones, ones, (IDENTITY,) * (2 + trees), known_costs(hidden_size, [8] * (1 + 2 * trees))
    )
