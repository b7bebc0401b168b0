"""The gate: maps features of a problem to calibrated beliefs about it, and is kept in one file.

A chain or a tree search corrects a wrong answer when its own answer is right and is taken in its place: the verifier
scores it higher, or there was no answer. Without a verifier every right answer counts as taken.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from treedecode.allocation.calibration import Isotonic
from treedecode.allocation.cost_quantiles import CostQuantiles, tensors_under
from treedecode.allocation.features import FEATURE_NAMES, FEATURE_VERSION
from treedecode.allocation.provenance import Provenance
from treedecode.models.adapter import ModelAdapter, require_hidden_states

if TYPE_CHECKING:
    from treedecode.decoding.decoder import Decoder
    from treedecode.tasks.base import Task

SCHEMA = "treedecode.gate/3"
_MIN_RATE = 1e-4  # a mean success rate of 0 or 1 is no Beta distribution
_MIN_PAIR, _MAX_PAIR = 0.1, 1000.0  # alpha + beta: from all or nothing to a known rate


@dataclass(frozen=True)
class TreeSearch:
    """A tree search that a gate can grant: `TreeOfThoughts(depth, width, keep)`.

    Attributes:
        tokens, kv_bytes: mean costs in the training data, in units of the cost of a single chain.
    """

    depth: int
    width: int
    keep: int
    tokens: float
    kv_bytes: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """(depth, width, keep)."""
        return self.depth, self.width, self.keep


@dataclass(frozen=True)
class GateConfig:
    """Describes the data that a gate was trained on.

    Attributes:
        hidden_size: of the model whose hidden states it reads; 0 = it reads none.
        min_chains, max_chains: it was trained after so many chains.
        provenance: verifier, task and model it was trained with, and so has to be used with.
        menu: tree searches that it can grant.
        prices: pairs (mean cost of a problem in units of the cost of a single chain, price in expected right answers
            per chain that leads to this cost), costs rising: where an online allocation begins. () = not known.
        features: version of the features.
    """

    hidden_size: int
    min_chains: int
    max_chains: int
    provenance: Provenance
    menu: tuple[TreeSearch, ...] = ()
    prices: tuple[tuple[float, float], ...] = ()
    features: int = FEATURE_VERSION

    def __post_init__(self) -> None:
        if self.menu and not self.uses_verifier:
            raise ValueError("menu: tree searches score branches, so their gate is one that uses a verifier")

    @property
    def uses_verifier(self) -> bool:
        """True if chains were scored in training, and so have to be in use."""
        return self.provenance.verifier != ""

    @property
    def num_features(self) -> int:
        """Length of a feature vector."""
        return len(FEATURE_NAMES) + self.hidden_size

    def to_json(self) -> dict[str, Any]:
        """Returns the attributes, as a gate's file has them."""
        return {"origin" if name == "provenance" else name: value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "GateConfig":
        """Makes the configuration that `to_json` described."""
        values = dict(data)
        values["provenance"] = Provenance(**values.pop("origin"))
        values["menu"] = tuple(TreeSearch(**entry) for entry in values["menu"])
        values["prices"] = tuple((cost, price) for cost, price in values["prices"])
        return cls(**values)


@dataclass(frozen=True)
class Beliefs:
    """Beliefs about `n` problems.

    Attributes:
        solved: `[n]` P(the answer selected so far is right).
        alpha, beta: `[n]`, of the Beta distribution of P(a further chain corrects the answer), given that it is wrong.
        trees: `[n, len(menu)]` P(a tree search corrects the answer), given that it is wrong.
    """

    solved: np.ndarray
    alpha: np.ndarray
    beta: np.ndarray
    trees: np.ndarray

    def of_problem(self, problem: int) -> dict[str, Any]:
        """Returns the beliefs about one problem, as fields of a `Bid`."""
        return {
            "unsolved": 1 - float(self.solved[problem]),
            "alpha": float(self.alpha[problem]),
            "beta": float(self.beta[problem]),
            "trees": tuple(self.trees[problem].tolist()),
        }


class GateNetwork(nn.Module):
    """Maps standardised features to raw beliefs: three outputs, and one for each tree search of the menu."""

    def __init__(self, num_features: int, num_trees: int, width: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(num_features, width),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Dropout(dropout),
        )
        self.heads = nn.Linear(width, 3 + num_trees)

    def reset_parameters(self) -> None:
        """Draws the weights anew, from torch's generator."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Computes raw beliefs from `[n, num_features]`.

        Returns:
            logits of solved `[n]`, logits of the success rate's mean `[n]`, its alpha + beta `[n]`, and logits of the
            trees `[n, num_trees]`.
        """
        out = self.heads(self.body(x))
        total = out[:, 2].clamp(math.log(_MIN_PAIR), math.log(_MAX_PAIR)).exp()
        return out[:, 0], out[:, 1], total, out[:, 3:]


class Gate:
    """A trained gate.

    Args:
        network: in evaluation mode.
        mean, std: `[num_features]` float32 of the training features.
        calibrators: of P(solved), of the mean success rate, and of each tree search.
        costs: quantiles of the costs of a chain and of each tree search, for forecasts.
    """

    def __init__(
        self,
        config: GateConfig,
        network: GateNetwork,
        mean: Tensor,
        std: Tensor,
        calibrators: tuple[Isotonic, ...],
        costs: CostQuantiles,
    ) -> None:
        self.config, self.network = config, network.eval()
        self.mean, self.std, self.calibrators, self.costs = mean, std, calibrators, costs

    def __repr__(self) -> str:
        digest = hashlib.sha256(json.dumps(self.config.to_json(), sort_keys=True).encode())
        for name, tensor in sorted(self._tensors().items()):
            if name.startswith("costs."):
                continue  # no solution depends on a forecast
            digest.update(name.encode() + tensor.numpy().tobytes())
        return f"Gate({digest.hexdigest()[:16]})"

    def check(self, decoder: "Decoder", task: "Task", scorer: Any) -> None:
        """Checks that the gate was trained for a run: it knows nothing of another verifier's scores.

        Args:
            scorer: the run's verifier; None = it has none.

        Raises:
            ValueError: another verifier, task or model (named, with the gate), or a model that gives no hidden states.
        """
        self.config.provenance.require(Provenance.of(decoder, task, scorer), self)
        self.check_model(decoder.model)

    def check_model(self, model: ModelAdapter) -> None:
        """Checks that the gate was trained for a decoder's model, and can read its hidden states.

        Raises:
            ValueError: it is another model, or its hidden states are missing or of another size.
        """
        self.config.provenance.require_model(model, self)
        size = self.config.hidden_size
        if size:
            require_hidden_states(model)
        if size not in (0, model.hidden_size):
            raise ValueError(f"gate: {self!r} reads hidden states of {size}, and this model's have {model.hidden_size}")

    def price(self, budget: float) -> float:
        """Returns the price at which problems like those of the training cost `budget` chains in the mean.

        It is interpolated, in logarithms, between the prices that were tried; beyond them it is the first or the last.

        Raises:
            ValueError: the gate knows no prices.
        """
        if not self.config.prices:
            raise ValueError(f"price: {self!r} knows no prices of budgets; give the one to begin with")
        costs, prices = np.log(self.config.prices).T
        return float(np.exp(np.interp(np.log(budget), costs, prices)))

    def believe(self, features: np.ndarray) -> Beliefs:
        """Predicts beliefs about problems, from `[n, num_features]` features.

        Raises:
            ValueError: the features have another shape.
        """
        if features.ndim != 2 or features.shape[1] != self.config.num_features:
            raise ValueError(
                f"features: expected [n, {self.config.num_features}] for this gate, {len(FEATURE_NAMES)} and a hidden "
                f"state of {self.config.hidden_size}, got {list(features.shape)}"
            )
        raw = raw_beliefs(self.network, (torch.from_numpy(features) - self.mean) / self.std)
        solved, rate, *trees = self.calibrators
        means = np.clip(rate(raw.alpha / (raw.alpha + raw.beta)), _MIN_RATE, 1 - _MIN_RATE)
        total = raw.alpha + raw.beta
        calibrated = [tree(values) for tree, values in zip(trees, raw.trees.T, strict=True)]
        return Beliefs(
            np.clip(solved(raw.solved), 0, 1),
            means * total,
            (1 - means) * total,
            np.stack(calibrated, axis=1) if calibrated else raw.trees,
        )

    # -- files --

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        for i, function in enumerate(self.calibrators):
            tensors[f"calibrators.{i}"] = torch.from_numpy(np.stack([function.x, function.y]))
        tensors |= {f"costs.{name}": tensor for name, tensor in self.costs.tensors.items()}
        return {**tensors, "mean": self.mean, "std": self.std}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, with the configuration in its metadata."""
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
        save_file(tensors, path, metadata={"schema": SCHEMA, "config": json.dumps(self.config.to_json())})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Gate":
        """Loads the gate that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no gate, or of another version.
        """
        if not os.path.isfile(path):
            raise FileNotFoundError(f"path: no file {os.fspath(path)}")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise ValueError(f"path: {os.fspath(path)} is no gate: {error}") from error
        if metadata.get("schema") != SCHEMA:
            raise ValueError(f"path: {os.fspath(path)} has the schema {metadata.get('schema')!r}, not {SCHEMA!r}")
        config = GateConfig.from_json(json.loads(metadata["config"]))
        if config.features != FEATURE_VERSION:
            raise ValueError(
                f"path: {os.fspath(path)} reads version {config.features} of the features, and this is "
                f"{FEATURE_VERSION}; train it anew"
            )
        weights = tensors_under("network.", tensors)
        network = GateNetwork(config.num_features, len(config.menu), width=len(weights["heads.weight"].T))
        network.load_state_dict(weights)
        pairs = [tensors[f"calibrators.{i}"].numpy() for i in range(2 + len(config.menu))]
        calibrators = tuple(Isotonic(x, y) for x, y in pairs)
        costs = CostQuantiles.from_tensors(tensors_under("costs.", tensors))
        return cls(config, network, tensors["mean"], tensors["std"], calibrators, costs)


@torch.inference_mode()
def raw_beliefs(network: GateNetwork, x: Tensor) -> Beliefs:
    """Computes the network's beliefs, not calibrated, from `[n, num_features]` standardised features."""
    solved, rate, total, trees = (part.double() for part in network(x))
    mean = rate.sigmoid().clamp(_MIN_RATE, 1 - _MIN_RATE)
    parts = (solved.sigmoid(), mean * total, (1 - mean) * total, trees.sigmoid())
    return Beliefs(*(part.numpy() for part in parts))
