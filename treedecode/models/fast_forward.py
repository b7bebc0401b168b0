"""FastForward: the faster forwards of a Transformers model's modules on the CPU, in place only while a forward runs.

Every replacement is run against the module it replaces when it is made; one that does not agree is not used, and
`FastForward.report` says why.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from treedecode.models.fast_modules import FastLayer, FastLinear, FastNorm, UnsupportedModule, fast_mlp

Forward = Callable[..., Any]
Candidate = tuple[str, Callable[[], Forward]]  # a description of the faster forward, and the function that makes it


class FastForward:
    """The replacements of one model's forwards.

    Attributes:
        report: one line per kind of module and outcome: what was replaced by what, and what was not and why.
    """

    def __init__(self, model: PreTrainedModel, attention_args: Callable[[], dict[int, dict[str, Any]]]) -> None:
        """Makes and checks the replacements.

        Args:
            attention_args: runs `model` once on a few tokens with a stand-in attention; returns, per layer index, the
                arguments that the layer passes to its attention function.
        """
        self._replaced: dict[nn.Module, Forward] = {}
        outcomes: Counter[str] = Counter()
        if model.device.type != "cpu":
            self.report = [f"kept: the model is on {model.device}, and the faster forward is for the CPU"]
            return
        with _recorded_layers(model.get_decoder()) as records:
            args = attention_args()
        candidate_for = partial(_candidate_for, records=records, attention_args=args, dtype=model.dtype)
        with torch.inference_mode():
            for root in (model.get_decoder(), model.get_output_embeddings()):
                self._replace(root, candidate_for, outcomes)
        self.report = [f"{count} x {outcome}" for outcome, count in outcomes.items()]

    def _replace(
        self, module: nn.Module, candidate_for: Callable[[nn.Module], Candidate | None], outcomes: Counter[str]
    ) -> None:
        """Replaces the forward of a module, or else those of its children, and counts what became of each."""
        candidate = candidate_for(module)
        if candidate is not None:
            description, make = candidate
            try:
                require_own_forward(module)
                self._replaced[module] = make()
            except UnsupportedModule as reason:
                outcomes[f"{type(module).__name__}: kept ({reason})"] += 1
            else:
                outcomes[f"{type(module).__name__}: {description}"] += 1
                return
        for child in module.children():
            self._replace(child, candidate_for, outcomes)

    def replacement(self, module: nn.Module) -> Forward | None:
        """Returns the faster forward of a module, if it has one."""
        return self._replaced.get(module)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Lets the modules run their replacements inside of this context, and their own forward outside."""
        try:
            for module, forward in self._replaced.items():
                module.__dict__["forward"] = forward
            yield
        finally:
            for module in self._replaced:
                module.__dict__.pop("forward", None)


def _candidate_for(
    module: Any, *, records: dict[int, Any], attention_args: dict[int, Any], dtype: torch.dtype
) -> Candidate | None:
    """Returns the faster forward that a module of this kind may have."""
    if id(module) in records:
        return "one function", lambda: _checked_layer(module, records[id(module)], attention_args)
    if hasattr(module, "gate_proj"):
        return "gate and up in one product", lambda: fast_mlp(module)
    if isinstance(module, nn.Linear):
        return "packed weights", lambda: FastLinear(module)
    if type(module).__name__.endswith("RMSNorm"):
        return "one op", lambda: FastNorm(module, dtype)
    return None


def require_own_forward(module: nn.Module) -> None:
    """Checks that the module and all of its parts run the forward of their class, without hooks.

    Raises:
        UnsupportedModule: a forward was replaced, or there are hooks.
    """
    for part in module.modules():
        if "forward" in part.__dict__:
            raise UnsupportedModule("somebody else replaced its forward")
        if part._forward_hooks or part._forward_pre_hooks:
            raise UnsupportedModule("it has forward hooks, which would not run")


@contextmanager
def _recorded_layers(decoder: nn.Module) -> Iterator[dict[int, Any]]:
    """Records arguments and output of every decoder layer that runs inside of this context, by the layer's id."""
    records: dict[int, Any] = {}

    def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        records[id(module)] = (args, kwargs, output)

    layers = [module for module in decoder.modules() if hasattr(module, "self_attn")]
    hooks = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
    try:
        yield records
    finally:
        for hook in hooks:
            hook.remove()


def _checked_layer(layer: Any, record: Any, attention_args: dict[int, Any]) -> FastLayer:
    """Makes the faster forward of a layer, and compares it on the arguments of `record`."""
    args, kwargs, want = record
    index = getattr(layer.self_attn, "layer_idx", None)
    if index not in attention_args or not isinstance(want, Tensor) or kwargs.get("position_embeddings") is None:
        raise UnsupportedModule("it is called in a way of its own")
    forward = FastLayer(layer, attention_args[index])
    try:
        got = forward(*args, **kwargs).double()
    except (RuntimeError, TypeError, ValueError) as error:  # rotary embeddings of another dtype or shape, say
        raise UnsupportedModule(f"the ops refuse it: {error}") from None
    x = (args[0] if args else kwargs["hidden_states"]).double()
    # What the layer adds passes through some ten roundings, in different places here and there; the sum rounds once.
    # In fp32 the order of the sums counts too, more than a rounding does.
    eps, want = torch.finfo(want.dtype).eps, want.double()
    if _rms(got - want) > eps * _rms(want) + (3 * eps + 1e-5) * _rms(want - x):
        raise UnsupportedModule("its result differs")
    return forward


def _rms(x: Tensor) -> Tensor:
    return x.pow(2).mean().sqrt()
