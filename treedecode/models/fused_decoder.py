"""A decoder of common layers as one op (`ops.decoder_forward`): no Python, and no interpreter's lock, between kernels.

The module's own code still embeds the tokens and computes the angles. Whether all of the rest is what the op computes
is tried out: both ways must give the same bits.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from treedecode import ops
from treedecode.models.context import StepContext
from treedecode.models.fast_modules import (
    FastForward,
    Layer,
    Norm,
    Packed,
    Projection,
    Unfit,
    require_untouched,
    trial_positions,
)

Run = Callable[[], tuple[Tensor, Tensor]]


class WholeDecoder:
    """The forward of a model whose layers all have a faster one."""

    def __init__(self, model: Any, fast: FastForward) -> None:
        """Collects copies of the weights, so that a forward under way does not see half of a change.

        Raises:
            Unfit: something of the model is not what the op computes.
        """
        require_untouched(model)
        decoder = model.get_decoder()
        if {name for name, _ in decoder.named_children()} != {"embed_tokens", "rotary_emb", "layers", "norm"}:
            raise Unfit("it does not consist of embed_tokens, rotary_emb, layers and norm")
        self._embed, self._rotary, norm = decoder.embed_tokens, decoder.rotary_emb, decoder.norm
        found = [fast.replacement(layer) for layer in decoder.layers]
        layers = [layer for layer in found if isinstance(layer, Layer)]
        last_norm, head = fast.replacement(norm), fast.replacement(model.get_output_embeddings())
        if len(layers) < len(found) or not isinstance(last_norm, Norm) or not isinstance(head, Projection):
            raise Unfit("not all of it has a faster forward")
        if [layer.index for layer in layers] != list(range(len(layers))):
            raise Unfit("its layers are numbered in a way of their own")
        norms = [last_norm]
        for layer in layers:
            norms += [n for n in (layer.input_norm, layer.q_norm, layer.k_norm, layer.output_norm) if n is not None]
        self._weights = ops.DecoderWeights(
            tensors=[
                *(tensor for layer in layers for tensor in _tensors_of(layer)),
                last_norm.weight.detach().clone(),
                *_pair(head.packed),
            ],
            sm_scales=[_scale_of(layer) for layer in layers],
            soft_caps=[float(layer.describe["softcap"] or 0.0) for layer in layers],
            windows=[-1 if (window := layer.describe["sliding_window"]) is None else window - 1 for layer in layers],
            eps=_only("epsilon", [n.eps for n in norms]),
            unit_offset=_only("rounding of norms", [n.unit_offset for n in norms]),
            gate=_only("activation", [layer.gate_up.gate for layer in layers]),
            num_qo_heads=_only("number of heads", [layer.heads[0] for layer in layers]),
            intermediate_size=_only("intermediate size", [layer.gate_up.out_features for layer in layers]),
            vocab_size=head.packed.out_features,
        )

    def start(self, input_ids: Tensor, position_ids: Tensor, context: StepContext, logit_rows: Tensor) -> Run:
        """Embeds the tokens; what comes back computes `(logits, hidden)` of one forward, on any thread."""
        assert context.kv is not None
        x = self._embed(input_ids)
        cos, sin = self._rotary(x[None], position_ids=position_ids[None])
        return partial(
            _in_inference_mode, x, cos[0], sin[0], context.kv, context.slots, context.page_table, context.seq_lens,
            context.plan, logit_rows, self._weights,
        )  # fmt: skip

    def require_same(self, forward: Callable[..., tuple[Tensor, Tensor]], like: Any, head_dim: int) -> None:
        """Compares with `forward(ids, positions, context, logit_rows)`, both on a few tokens and pages of their own.

        Args:
            like: has the sizes of the model, as a `TransformersModel` does.

        Raises:
            Unfit: the results differ in a bit.
        """
        count, page_size = 5, 8
        ids = torch.arange(1, count + 1) % like.vocab_size
        positions = trial_positions(count, like.max_position)
        rows = torch.tensor([count - 1, 1])
        outcomes = []
        for run in (forward, lambda *args: self.start(*args)()):
            kv = torch.zeros(like.num_layers, 2, 1, like.num_kv_heads, page_size, head_dim, dtype=like.dtype)
            table, lens = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([count], dtype=torch.int32)
            plan = ops.plan_tree(
                table, lens, lens, page_size=page_size, num_qo_heads=like.num_qo_heads, num_kv_heads=like.num_kv_heads,
                head_dim=head_dim,
            )  # fmt: skip
            layers = [(pages[0].transpose(1, 2), pages[1].transpose(1, 2)) for pages in kv]
            context = StepContext(layers.__getitem__, table, lens, plan, torch.arange(count), kv=kv)
            try:
                outcomes.append((*run(ids, positions, context, rows), kv))
            except (RuntimeError, TypeError, ValueError) as error:
                raise Unfit(f"the op refuses it: {error}") from None
        if not all(map(torch.equal, *outcomes)):
            raise Unfit("its result differs")


def _in_inference_mode(*args: Any) -> tuple[Tensor, Tensor]:
    """As layer by layer; the mode is one of the thread that runs this, and pages may be inference tensors."""
    with torch.inference_mode():
        return ops.decoder_forward(*args)


def _only(what: str, values: list[Any]) -> Any:
    """The value that all have in common."""
    if len(set(values)) > 1:
        raise Unfit(f"its layers differ in {what}")
    return values[0]


def _scale_of(layer: Layer) -> float:
    scaling = layer.describe["scaling"]
    return float(scaling if scaling is not None else layer.head_dim**-0.5)


def _pair(linear: Packed) -> tuple[Tensor, Tensor]:
    return linear.weight, linear.bias if linear.bias is not None else linear.weight.new_empty(0)


def _tensors_of(layer: Layer) -> list[Tensor]:
    """In the order of `ops.decoder_forward.LAYER_TENSORS`."""
    none = layer.qkv.weight.new_empty(0)
    q_norm, k_norm = (none if norm is None else norm.weight.detach().clone() for norm in (layer.q_norm, layer.k_norm))
    sinks = layer.describe["sinks"]
    return [
        layer.input_norm.weight.detach().clone(),
        *_pair(layer.qkv),
        q_norm,
        k_norm,
        *_pair(layer.o_proj),
        layer.output_norm.weight.detach().clone(),
        *_pair(layer.gate_up),
        *_pair(layer.down),
        none if sinks is None else sinks.detach().to(torch.float32, copy=True),
    ]
