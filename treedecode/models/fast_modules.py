"""A faster forward for the modules of a Transformers model on the CPU, in place only while a forward runs.

Three things cost a plain forward its time when rows are few: weights whose layout suits many rows, one Python call and
one pass over memory per elementary step, and separate products of the same input. So linear layers get packed weights
(`ops.packed_linear`), projections of one input become one product, norms and rotation one op each, and whole decoder
layers of the common shape (norm, attention, residual, norm, gated MLP, residual) one function. Every replacement is run
against the module it replaces when it is made; one that does not agree is not used, and `FastForward.report` says why.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from treedecode import ops

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Unfit(Exception):
    """Why a module keeps its own forward."""


def trial_positions(count: int, max_position: int, device: Any = None) -> Tensor:
    """Positions `[count]` of the tokens that forwards are compared on: from 0 to the last one, `max_position - 1`.

    Some models scale queries from a position on, so a comparison at small ones alone would miss it.
    """
    return torch.arange(count, device=device) * (max_position - 1) // (count - 1)


class Packed:
    """Linear layers of one input as one packed product; `up` makes it a gated pair."""

    def __init__(self, *linears: Any, gate: str = "") -> None:
        for linear in linears:
            _require_plain_linear(linear)
        if gate:
            first, up = linears
            self.weight = ops.pack_weight(first.weight, up.weight)
            self.sizes = [first.out_features]
        else:
            self.weight = ops.pack_weight(torch.cat([linear.weight for linear in linears]))
            self.sizes = [linear.out_features for linear in linears]
        self.out_features = sum(self.sizes)
        self.bias: Tensor | None = None
        if any(linear.bias is not None for linear in linears):
            biases = [_bias_of(linear) for linear in linears]
            self.bias = ops.pack_bias(*biases) if gate else ops.pack_bias(torch.cat(biases))
        self.gate = gate

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return torch.ops.treedecode.packed_linear.default(
            x, self.weight, self.out_features, self.bias, residual, self.gate
        )


def _require_plain_linear(linear: Any) -> None:
    if type(linear) is not nn.Linear:
        raise Unfit(f"{type(linear).__name__} is not nn.Linear")
    _require_plain_weight(linear.weight)
    if linear.in_features % 2:
        raise Unfit("in_features is odd")


def _require_plain_weight(weight: Tensor) -> None:
    if type(weight) not in (nn.Parameter, Tensor):  # quantised, say, or sharded
        raise Unfit(f"weights are a {type(weight).__name__}")
    if weight.dtype not in _DTYPES or weight.device.type != "cpu":
        raise Unfit(f"weights are {weight.dtype} on {weight.device}")


def _bias_of(linear: Any) -> Tensor:
    return linear.bias if linear.bias is not None else linear.weight.new_zeros(linear.out_features)


class Projection:
    """nn.Linear's forward over packed weights."""

    def __init__(self, linear: Any) -> None:
        self.packed = Packed(linear)

    def __call__(self, x: Tensor) -> Tensor:
        return self.packed(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.packed.out_features)


class Norm:
    """An RMS norm as one op; which of the two roundings it has is found by trying."""

    def __init__(self, norm: Any, dtype: torch.dtype | None = None) -> None:
        """`dtype`: of its input; None = that of its weight."""
        weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
            raise Unfit("no one-dimensional weight and epsilon")
        _require_plain_weight(weight)
        if dtype not in (None, weight.dtype):
            raise Unfit(f"weights are {weight.dtype} in a model of {dtype}")
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(3, weight.shape[0], generator=generator).to(weight.dtype)
        want = norm(x)
        if want.dtype != x.dtype:
            raise Unfit(f"returns {want.dtype} for {x.dtype}")
        self.weight, self.eps = weight, eps
        for unit_offset in (False, True):
            if _close(ops.rms_norm(x, weight, eps, unit_offset=unit_offset), want):
                self.unit_offset = unit_offset
                return
        raise Unfit("its result is not that of rms_norm")

    def __call__(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps, unit_offset=self.unit_offset)


def mlp_forward(mlp: Any) -> Callable[[Tensor], Tensor]:
    """A gated MLP's forward in two products."""
    up, down = packed_mlp(mlp)

    def forward(x: Tensor) -> Tensor:
        return down(up(x.reshape(-1, x.shape[-1]))).view(*x.shape[:-1], down.out_features)

    _require_same(mlp, forward, mlp.down_proj.weight, mlp.gate_proj.in_features)
    return forward


def packed_mlp(mlp: Any) -> tuple[Packed, Packed]:
    if not all(hasattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        raise Unfit("no gate_proj, up_proj, down_proj and act_fn")
    extra = sorted({name for name, _ in mlp.named_children()} - {"gate_proj", "up_proj", "down_proj", "act_fn"})
    if extra:
        raise Unfit(f"has {', '.join(extra)} besides the gated pair")
    probe = torch.linspace(-3, 3, 25)
    for gate, exact in (("silu", nn.functional.silu), ("gelu_tanh", _gelu_tanh)):
        if torch.allclose(mlp.act_fn(probe), exact(probe), rtol=1e-5, atol=1e-6):
            return Packed(mlp.gate_proj, mlp.up_proj, gate=gate), Packed(mlp.down_proj)
    raise Unfit("its activation is neither silu nor gelu_tanh")


def _gelu_tanh(x: Tensor) -> Tensor:
    return nn.functional.gelu(x, approximate="tanh")


class Layer:
    """A decoder layer of the common shape as ten ops or fewer.

    Attributes:
        describe: what this layer's attention hands to its attention function: scaling, sliding_window, softcap, sinks.
    """

    def __init__(self, layer: Any, describe: dict[str, Any]) -> None:
        children = {name for name, _ in layer.named_children()}
        if children != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
            raise Unfit(f"consists of {', '.join(sorted(children))}")
        attention = layer.self_attn
        own = {name for name, _ in attention.named_children()}
        has_head_norms = own == {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
        if not has_head_norms and own != {"q_proj", "k_proj", "v_proj", "o_proj"}:
            raise Unfit(f"its attention consists of {', '.join(sorted(own))}")
        self.describe = describe
        self.head_dim, self.index = attention.head_dim, attention.layer_idx
        self.input_norm, self.output_norm = Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm)
        self.q_norm = Norm(attention.q_norm) if has_head_norms else None
        self.k_norm = Norm(attention.k_norm) if has_head_norms else None
        self.qkv = Packed(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o_proj = Packed(attention.o_proj)
        self.gate_up, self.down = packed_mlp(layer.mlp)
        self.heads = [size // self.head_dim for size in self.qkv.sizes]

    def __call__(
        self,
        hidden_states: Tensor,
        *args: Any,
        position_embeddings: tuple[Tensor, Tensor],
        treedecode_context: Any,
        **kwargs: Any,
    ) -> Tensor:
        x = hidden_states.view(-1, hidden_states.shape[-1])
        fused = self.qkv(self.input_norm(x)).view(x.shape[0], sum(self.heads), self.head_dim)
        q, k, v = fused.split(self.heads, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = position_embeddings
        torch.ops.treedecode.rotary_embed.default(q, k, cos[0], sin[0])
        mixed = treedecode_context.attend(self.index, q, k, v, **self.describe)
        x = self.o_proj(mixed.flatten(1), x)
        return self.down(self.gate_up(self.output_norm(x)), x).view(hidden_states.shape)


class FastForward:
    """The replacements of one model's forwards.

    Attributes:
        report: one line per kind of module and outcome: what was replaced by what, and what was not and why.
    """

    def __init__(self, model: Any, observe: Callable[[], dict[int, dict[str, Any]]]) -> None:
        """Makes and checks the replacements.

        Args:
            observe: runs `model` once on a few tokens with a stand-in attention; returns, per layer index, what
                `layer_forward` takes as `describe`.
        """
        self._replaced: dict[nn.Module, Callable[..., Any]] = {}
        self._dtype: torch.dtype = model.dtype
        outcomes: Counter[str] = Counter()
        if model.device.type != "cpu":
            self.report = [f"kept: the model is on {model.device}, and the faster forward is for the CPU"]
            return
        with _recorded_layers(model.get_decoder()) as records:
            describe = observe()
        with torch.inference_mode():
            for root in (model.get_decoder(), model.get_output_embeddings()):
                self._visit(root, records, describe, outcomes)
        self.report = [f"{count} x {what}" for what, count in outcomes.items()]

    def _visit(
        self, module: nn.Module, records: dict[int, Any], describe: dict[int, Any], outcomes: Counter[str]
    ) -> None:
        found: tuple[str, Callable[[], Callable[..., Any]]] | None = None
        if id(module) in records:
            found = "one function", lambda: _checked_layer(module, records[id(module)], describe)
        elif hasattr(module, "gate_proj"):
            found = "gate and up in one product", lambda: mlp_forward(module)
        elif isinstance(module, nn.Linear):
            found = "packed weights", lambda: Projection(module)
        elif type(module).__name__.endswith("RMSNorm"):
            found = "one op", lambda: Norm(module, self._dtype)
        if found is not None:
            try:
                require_untouched(module)
                self._replaced[module] = found[1]()
            except Unfit as reason:
                outcomes[f"{type(module).__name__}: kept ({reason})"] += 1
            else:
                outcomes[f"{type(module).__name__}: {found[0]}"] += 1
                return
        for child in module.children():
            self._visit(child, records, describe, outcomes)

    def replacement(self, module: nn.Module) -> Callable[..., Any] | None:
        """The faster forward of a module, if it has one."""
        return self._replaced.get(module)

    @contextmanager
    def active(self) -> Iterator[None]:
        """The modules run their replacements inside of this context, and their own forward outside."""
        try:
            for module, forward in self._replaced.items():
                module.__dict__["forward"] = forward
            yield
        finally:
            for module in self._replaced:
                module.__dict__.pop("forward", None)


def require_untouched(module: nn.Module) -> None:
    """Raises `Unfit` where a forward of the module's parts is not its own, or has hooks."""
    for part in module.modules():
        if "forward" in part.__dict__:
            raise Unfit("somebody else replaced its forward")
        if part._forward_hooks or part._forward_pre_hooks:
            raise Unfit("it has forward hooks, which would not run")


@contextmanager
def _recorded_layers(decoder: nn.Module) -> Iterator[dict[int, Any]]:
    """Inputs and output of every decoder layer that runs inside of this context, by the layer's id."""
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


def _checked_layer(layer: Any, record: Any, describe: dict[int, Any]) -> Layer:
    args, kwargs, want = record
    index = getattr(layer.self_attn, "layer_idx", None)
    if index not in describe or not isinstance(want, Tensor) or kwargs.get("position_embeddings") is None:
        raise Unfit("it is called in a way of its own")
    forward = Layer(layer, describe[index])
    try:
        got = forward(*args, **kwargs).double()
    except (RuntimeError, TypeError, ValueError) as error:  # rotary embeddings of another dtype or shape, say
        raise Unfit(f"the ops refuse it: {error}") from None
    x = (args[0] if args else kwargs["hidden_states"]).double()
    # What the layer adds passes through some ten roundings, in different places here and there; the sum rounds once.
    # In fp32 the order of the sums counts too, more than a rounding does.
    eps, want = torch.finfo(want.dtype).eps, want.double()
    if _rms(got - want) > eps * _rms(want) + (3 * eps + 1e-5) * _rms(want - x):
        raise Unfit("its result differs")
    return forward


def _rms(x: Tensor) -> Tensor:
    return x.pow(2).mean().sqrt()


def _close(got: Tensor, want: Tensor) -> bool:
    """Equal up to a few roundings: both round in other places, so neither is the truth to the last bit."""
    eps = torch.finfo(want.dtype).eps + 1e-6
    return bool(((got.double() - want.double()).abs() <= 4 * eps * (want.double().abs() + want.abs().max())).all())


def _require_same(module: nn.Module, forward: Callable[[Tensor], Tensor], like: Tensor, in_features: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, in_features, generator=generator).to(like.dtype)
    if not _close(forward(x), module(x)):
        raise Unfit("its result differs")
