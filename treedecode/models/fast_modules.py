"""Faster forwards of a Transformers model's modules on the CPU: linear layers, RMS norms, gated MLPs, decoder layers.

Three things cost a plain forward its time when rows are few: weights whose layout suits many rows, one Python call and
one pass over memory per elementary step, and separate products of the same input. So linear layers get packed weights
(`ops.packed_linear`), projections of one input become one product, norms and rotation one op each, and whole decoder
layers of the common shape (norm, attention, residual, norm, gated MLP, residual) one function.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from treedecode import ops

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class UnsupportedModule(Exception):
    """A module has no faster forward; the message says why, and the module keeps its own."""


class PackedLinear:
    """Computes linear layers of one input as one product over packed weights.

    With `gate`, the name of an activation, two layers are a gated pair: `gate(first(x)) * second(x)`.
    """

    def __init__(self, *linears: Any, gate: str = "") -> None:
        for linear in linears:
            _require_plain_linear(linear)
        if gate:
            first, second = linears
            self.weight = ops.pack_weight(first.weight, second.weight)
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
        raise UnsupportedModule(f"{type(linear).__name__} is not nn.Linear")
    _require_plain_weight(linear.weight)
    if linear.in_features % 2:
        raise UnsupportedModule("in_features is odd")


def _require_plain_weight(weight: Tensor) -> None:
    if type(weight) not in (nn.Parameter, Tensor):  # quantised, say, or sharded
        raise UnsupportedModule(f"weights are a {type(weight).__name__}")
    if weight.dtype not in _DTYPES or weight.device.type != "cpu":
        raise UnsupportedModule(f"weights are {weight.dtype} on {weight.device}")


def _bias_of(linear: Any) -> Tensor:
    return linear.bias if linear.bias is not None else linear.weight.new_zeros(linear.out_features)


class FastLinear:
    """Computes an `nn.Linear` over packed weights."""

    def __init__(self, linear: Any) -> None:
        self.packed = PackedLinear(linear)

    def __call__(self, x: Tensor) -> Tensor:
        return self.packed(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.packed.out_features)


class FastNorm:
    """Computes an RMS norm in one op."""

    def __init__(self, norm: Any, dtype: torch.dtype | None = None) -> None:
        """Tries both forms of the op, without and with `unit_offset`, and takes the one that agrees with `norm`.

        Args:
            dtype: of the norm's input; None = that of its weight.

        Raises:
            UnsupportedModule: neither form agrees.
        """
        weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
            raise UnsupportedModule("no one-dimensional weight and epsilon")
        _require_plain_weight(weight)
        if dtype not in (None, weight.dtype):
            raise UnsupportedModule(f"weights are {weight.dtype} in a model of {dtype}")
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(3, weight.shape[0], generator=generator).to(weight.dtype)
        want = norm(x)
        if want.dtype != x.dtype:
            raise UnsupportedModule(f"returns {want.dtype} for {x.dtype}")
        self.weight, self.eps = weight, eps
        for unit_offset in (False, True):
            if _is_close(ops.rms_norm(x, weight, eps, unit_offset=unit_offset), want):
                self.unit_offset = unit_offset
                return
        raise UnsupportedModule("its result is not that of rms_norm")

    def __call__(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps, unit_offset=self.unit_offset)


def fast_mlp(mlp: Any) -> Callable[[Tensor], Tensor]:
    """Makes the forward of a gated MLP from two products.

    Raises:
        UnsupportedModule: the MLP has other parts, another activation or another result.
    """
    up, down = packed_mlp(mlp)

    def forward(x: Tensor) -> Tensor:
        return down(up(x.reshape(-1, x.shape[-1]))).view(*x.shape[:-1], down.out_features)

    _require_same(mlp, forward, mlp.down_proj.weight, mlp.gate_proj.in_features)
    return forward


def packed_mlp(mlp: Any) -> tuple[PackedLinear, PackedLinear]:
    """Packs gate and up as one gated pair, and down.

    Raises:
        UnsupportedModule: the MLP has other parts or another activation.
    """
    if not all(hasattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        raise UnsupportedModule("no gate_proj, up_proj, down_proj and act_fn")
    extra = sorted({name for name, _ in mlp.named_children()} - {"gate_proj", "up_proj", "down_proj", "act_fn"})
    if extra:
        raise UnsupportedModule(f"has {', '.join(extra)} besides the gated pair")
    probe = torch.linspace(-3, 3, 25)
    for gate, exact in (("silu", nn.functional.silu), ("gelu_tanh", _gelu_tanh)):
        if torch.allclose(mlp.act_fn(probe), exact(probe), rtol=1e-5, atol=1e-6):
            return PackedLinear(mlp.gate_proj, mlp.up_proj, gate=gate), PackedLinear(mlp.down_proj)
    raise UnsupportedModule("its activation is neither silu nor gelu_tanh")


def _gelu_tanh(x: Tensor) -> Tensor:
    return nn.functional.gelu(x, approximate="tanh")


class FastLayer:
    """Computes a decoder layer of the common shape in ten ops or fewer.

    Attributes:
        attention_args: what the layer passes to its attention function: scaling, sliding_window, softcap, sinks.
        index: of the layer in the model.
        heads: numbers of query, key and value heads.
    """

    def __init__(self, layer: Any, attention_args: dict[str, Any]) -> None:
        children = {name for name, _ in layer.named_children()}
        if children != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
            raise UnsupportedModule(f"consists of {', '.join(sorted(children))}")
        attention = layer.self_attn
        parts = {name for name, _ in attention.named_children()}
        has_head_norms = parts == {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
        if not has_head_norms and parts != {"q_proj", "k_proj", "v_proj", "o_proj"}:
            raise UnsupportedModule(f"its attention consists of {', '.join(sorted(parts))}")
        self.attention_args = attention_args
        self.head_dim, self.index = attention.head_dim, attention.layer_idx
        self.input_norm, self.output_norm = FastNorm(layer.input_layernorm), FastNorm(layer.post_attention_layernorm)
        self.q_norm = FastNorm(attention.q_norm) if has_head_norms else None
        self.k_norm = FastNorm(attention.k_norm) if has_head_norms else None
        self.qkv = PackedLinear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o_proj = PackedLinear(attention.o_proj)
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
        qkv = self.qkv(self.input_norm(x)).view(x.shape[0], sum(self.heads), self.head_dim)
        q, k, v = qkv.split(self.heads, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = position_embeddings
        torch.ops.treedecode.rotary_embed.default(q, k, cos[0], sin[0])
        out = treedecode_context.attend(self.index, q, k, v, **self.attention_args)
        x = self.o_proj(out.flatten(1), x)
        return self.down(self.gate_up(self.output_norm(x)), x).view(hidden_states.shape)


def _is_close(got: Tensor, want: Tensor) -> bool:
    """Returns whether two results are equal up to a few roundings, which both have in other places."""
    eps = torch.finfo(want.dtype).eps + 1e-6
    return bool(((got.double() - want.double()).abs() <= 4 * eps * (want.double().abs() + want.abs().max())).all())


def _require_same(module: nn.Module, forward: Callable[[Tensor], Tensor], like: Tensor, in_features: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, in_features, generator=generator).to(like.dtype)
    if not _is_close(forward(x), module(x)):
        raise UnsupportedModule("its result differs")
