"""ValueHead: estimates from the model's last hidden state how likely a completion succeeds."""

import os
from collections.abc import Callable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from treedecode.common.validation import positive_int
from treedecode.models.fast_modules import FastLinear, UnsupportedModule


class ValueHead(nn.Module):
    """A layer norm and a perceptron of two hidden layers on the hidden state of a state's last token.

    The estimate V(state) of search guided by values (Tree of Thoughts, 2305.10601; process rewards by Monte Carlo
    rollouts, 2312.08935): the probability that a solution sampled on from the state is right. The hidden state is the
    one the language model's head reads, after the final norm, where the last token of the state came in. The head works
    in float32 whatever the model's dtype.

    Args:
        hidden_size: of the language model.
        width: of the perceptron's layers.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(self, hidden_size: int, width: int = 256) -> None:
        super().__init__()
        self.hidden_size = positive_int("hidden_size", hidden_size)
        positive_int("width", width)
        self.norm = nn.LayerNorm(hidden_size)
        self.up = nn.Linear(hidden_size, width)
        self.middle = nn.Linear(width, width)
        self.out = nn.Linear(width, 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Computes `[n]` float32 log-odds of success from `[n, hidden_size]` of any floating dtype.

        Raises:
            ValueError: `hidden` has another shape.
        """
        return self._logits(hidden, self.up, self.middle, self.out)

    def _logits(self, hidden: Tensor, *layers: Callable[[Tensor], Tensor]) -> Tensor:
        if hidden.ndim != 2 or hidden.shape[1] != self.hidden_size:
            raise ValueError(f"hidden: expected [n, {self.hidden_size}], got {list(hidden.shape)}")
        up, middle, out = layers
        x = nn.functional.silu(up(self.norm(hidden.float())))
        return out(nn.functional.silu(middle(x))).squeeze(1)

    def fast(self) -> Callable[[Tensor], Tensor]:
        """Returns `forward` for the weights as they are now, without gradients.

        On the CPU a row's value then does not depend on the other rows, not even in the last bit. With layers that
        cannot be packed (of odd sizes, or replaced by others), and on other devices, it is the head itself.
        """
        try:
            packed = [FastLinear(layer) for layer in (self.up, self.middle, self.out)]
        except UnsupportedModule:
            return self
        return lambda hidden: self._logits(hidden, *packed).sigmoid()

    def forward(self, hidden: Tensor) -> Tensor:
        """Computes `[n]` float32 probabilities of success from `[n, hidden_size]`."""
        return self.logits(hidden).sigmoid()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the weights to a safetensors file, in float32."""
        save_file({name: tensor.detach().float().contiguous() for name, tensor in self.state_dict().items()}, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> "ValueHead":
        """Loads a head that `save` wrote, in evaluation mode.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it does not hold a value head.
        """
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"path: {os.fspath(path)} holds no value head: {error}") from error
        if "up.weight" not in tensors or tensors["up.weight"].ndim != 2:
            raise ValueError(f"path: {os.fspath(path)} holds no value head: it has no matrix up.weight")
        width, hidden_size = tensors["up.weight"].shape
        head = cls(hidden_size, width)
        try:
            head.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"path: {os.fspath(path)} holds no value head: {error}") from error
        return head.to(device).eval()
