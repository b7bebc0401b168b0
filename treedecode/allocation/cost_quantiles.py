"""Quantiles of the costs of chains and tree searches, predicted from the prompt alone."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from treedecode.allocation.features import PromptFeatures

LEVELS = (np.arange(20) + 0.5) / 20  # 0.025 to 0.975
NUM_PROMPT_FEATURES = 2  # beside the hidden state
_TENSORS = ("mean", "std", "center", "scale", "shifts", "factors", "errors")


def prompt_vector(prompt: PromptFeatures, hidden_size: int) -> np.ndarray:
    """Returns the features of a prompt, `[NUM_PROMPT_FEATURES + hidden_size]` float32."""
    return np.concatenate([[np.log(prompt.num_tokens), prompt.entropy], prompt.hidden[:hidden_size]]).astype(np.float32)


class QuantileNetwork(nn.Module):
    """Maps standardised features `[n, num_features]` to quantiles `[n, num_targets, len(LEVELS)]`, which rise along the
    levels."""

    def __init__(self, num_features: int, num_targets: int, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(num_features, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.heads = nn.Linear(width, num_targets * len(LEVELS))

    def forward(self, x: Tensor) -> Tensor:
        out = self.heads(self.body(x)).unflatten(1, (-1, len(LEVELS)))
        rises = nn.functional.softplus(out[..., 1:])
        return torch.cat([out[..., :1], out[..., :1] + rises.cumsum(-1)], dim=-1)


@dataclass(frozen=True)
class CostQuantiles:
    """Quantile regression of the logarithms of costs, recalibrated (after 1905.03222, without its guarantee).

    Each quantile is shifted by the empirical quantile of the calibration problems' residuals. The paper's coverage in
    finite samples needs more: data that did not end the fit, one score per problem (chains of a problem are not
    exchangeable with those of others), and a level of (n + 1) / n. So intervals may be too narrow on new problems;
    `treedecode.allocation.training.fit_costs.measure_costs` measures by how much.

    Attributes:
        network: in evaluation mode; its inputs and outputs are standardised.
        mean, std: `[num_features]` float32 of the features.
        center, scale: `[num_targets]` of the logarithms of costs.
        shifts: `[num_targets, len(LEVELS)]`, added to each quantile so that its share of the calibration problems lies
            below it.
        factors: `[num_targets]` mean cost of the calibration problems over the mean of the predicted quantiles, which
            leave out the tails.
        errors: `[num_targets]` relative standard errors of the factors.
    """

    network: QuantileNetwork
    mean: Tensor
    std: Tensor
    center: Tensor
    scale: Tensor
    shifts: Tensor
    factors: Tensor
    errors: Tensor

    @torch.inference_mode()
    def raw(self, features: np.ndarray) -> Tensor:
        """Predicts quantiles of log(1 + cost) that are not calibrated, of the shapes of `__call__`."""
        out = self.network((torch.from_numpy(features) - self.mean) / self.std)
        return out * self.scale[:, None] + self.center[:, None]

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Predicts quantiles of log(1 + cost).

        Args:
            features: `[n, num_features]` float32.

        Returns:
            `[n, num_targets, len(LEVELS)]` float64.
        """
        return np.maximum.accumulate((self.raw(features) + self.shifts).double().numpy(), axis=-1)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, for a file."""
        own = {name: getattr(self, name) for name in _TENSORS}
        return {**own, **{f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "CostQuantiles":
        """Makes the quantiles that `tensors` described."""
        weights = tensors_under("network.", tensors)
        network = QuantileNetwork(len(tensors["mean"]), len(tensors["center"]), len(weights["heads.weight"].T))
        network.load_state_dict(weights)
        return cls(network.eval(), *(tensors[name] for name in _TENSORS))


def tensors_under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors whose names begin with `prefix`, under the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
