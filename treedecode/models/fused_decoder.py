"""FusedDecoder: all layers of a common decoder as one op (`ops.decoder_forward`).

Between its kernels there is no Python, and nobody waits for the interpreter's lock. The module's own code still embeds
the tokens and computes the angles. A trial decides whether all of the rest is what the op computes: both ways must give
the same bits.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from treedecode import ops
from treedecode.models.adapter import ModelAdapter
from treedecode.models.attention_probe import probe_positions
from treedecode.models.context import StepContext
from treedecode.models.fast_forward import FastForward, require_own_forward
from treedecode.models.fast_modules import FastLayer, FastLinear, FastNorm, PackedLinear, UnsupportedModule
from treedecode.models.rotary_table import RotaryTable

_MAX_SERIAL_ELEMENTS = 2**15  # of a tensor; torch copies and gathers more on several threads
PreparedForward = Callable[[], tuple[Tensor, Tensor]]  # computes `(logits, hidden)`


class FusedDecoder:
    """Runs a model whose layers all have a faster forward in one op."""

    def __init__(self, model: PreTrainedModel, fast: FastForward) -> None:
        """Copies the weights, so that a forward under way does not see half of a change.

        Raises:
            UnsupportedModule: something of the model is not what the op computes.
        """
        require_own_forward(model)
        decoder = model.get_decoder()
        if {name for name, _ in decoder.named_children()} != {"embed_tokens", "rotary_emb", "layers", "norm"}:
            raise UnsupportedModule("it does not consist of embed_tokens, rotary_emb, layers and norm")
        self._embed, self._rotary, norm = decoder.embed_tokens, decoder.rotary_emb, decoder.norm
        forwards = [fast.replacement(layer) for layer in decoder.layers]
        layers = [layer for layer in forwards if isinstance(layer, FastLayer)]
        last_norm, head = fast.replacement(norm), fast.replacement(model.get_output_embeddings())
        if len(layers) < len(forwards) or not isinstance(last_norm, FastNorm) or not isinstance(head, FastLinear):
            raise UnsupportedModule("not all of it has a faster forward")
        if [layer.index for layer in layers] != list(range(len(layers))):
            raise UnsupportedModule("its layers are numbered in a way of their own")
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
            soft_caps=[float(layer.attention_args["softcap"] or 0.0) for layer in layers],
            windows=[_window_left_of(layer) for layer in layers],
            eps=_common("epsilon", [n.eps for n in norms]),
            unit_offset=_common("rounding of norms", [n.unit_offset for n in norms]),
            gate=_common("activation", [layer.gate_up.gate for layer in layers]),
            num_qo_heads=_common("number of heads", [layer.heads[0] for layer in layers]),
            intermediate_size=_common("intermediate size", [layer.gate_up.out_features for layer in layers]),
            vocab_size=head.packed.out_features,
        )
        self._hidden_size = last_norm.weight.numel()
        self._rotary_table: RotaryTable | None
        try:
            self._rotary_table = RotaryTable(self._rotary, head.packed.weight.dtype)
        except UnsupportedModule:
            self._rotary_table = None  # the module itself computes the angles of each forward

    def prepare_forward(
        self, input_ids: Tensor, position_ids: Tensor, context: StepContext, logit_rows: Tensor
    ) -> PreparedForward:
        """Embeds the tokens, and returns the rest of the forward as a function that may run on any thread."""
        assert context.kv is not None
        x = self._embed_in_blocks(input_ids)
        if self._rotary_table is not None:
            cos, sin = self._rotary_table(position_ids)
        else:
            cos, sin = (values[0] for values in self._rotary(x[None], position_ids=position_ids[None]))
        return partial(
            _in_inference_mode, x, cos, sin, context.kv, context.slots, context.page_table, context.seq_lens,
            context.plan, logit_rows, self._weights,
        )  # fmt: skip

    def _embed_in_blocks(self, input_ids: Tensor) -> Tensor:
        """Embeds tokens, so few at once that torch does not wake threads, which would spin beside those of the op."""
        num_rows = max(1, _MAX_SERIAL_ELEMENTS // self._hidden_size)
        if len(input_ids) <= num_rows:
            return self._embed(input_ids)
        blocks = input_ids.split(num_rows)
        first = self._embed(blocks[0])
        x = first.new_empty(len(input_ids), *first.shape[1:])
        for rows, block in zip(x.split(num_rows), blocks, strict=True):
            rows.copy_(self._embed(block))
        return x

    def require_same(self, forward: Callable[..., tuple[Tensor, Tensor]], model: ModelAdapter) -> None:
        """Compares this decoder with another forward of the model on a few tokens, each on pages of its own.

        Args:
            forward: computes `(logits, hidden)` from the arguments of `ModelAdapter.forward`.
            model: has the sizes.

        Raises:
            UnsupportedModule: the results differ in a bit.
        """
        count, page_size = 5, 8
        ids = torch.arange(1, count + 1) % model.vocab_size
        positions = probe_positions(count, model.max_position)
        logit_rows = torch.tensor([count - 1, 1])
        heads = {"num_qo_heads": model.num_qo_heads, "num_kv_heads": model.num_kv_heads, "head_dim": model.head_dim}
        results = []
        for run in (forward, lambda *args: self.prepare_forward(*args)()):
            kv = torch.zeros(model.num_layers, 2, 1, model.num_kv_heads, page_size, model.head_dim, dtype=model.dtype)
            table, lens = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([count], dtype=torch.int32)
            plan = ops.plan_tree(table, lens, lens, page_size=page_size, **heads)
            layers = [(pages[0].transpose(1, 2), pages[1].transpose(1, 2)) for pages in kv]
            context = StepContext(layers.__getitem__, table, lens, plan, torch.arange(count), kv=kv)
            try:
                results.append((*run(ids, positions, context, logit_rows), kv))
            except (RuntimeError, TypeError, ValueError) as error:
                raise UnsupportedModule(f"the op refuses it: {error}") from None
        if not all(map(torch.equal, *results)):
            raise UnsupportedModule("its result differs")


def _in_inference_mode(*args: Any) -> tuple[Tensor, Tensor]:
    """Runs the op in inference mode, which each thread has for itself: pages may be inference tensors."""
    with torch.inference_mode():
        return ops.decoder_forward(*args)


def _common(name: str, values: list[Any]) -> Any:
    """Returns the value of the setting `name`, which all layers must have in common."""
    if len(set(values)) > 1:
        raise UnsupportedModule(f"its layers differ in {name}")
    return values[0]


def _scale_of(layer: FastLayer) -> float:
    scaling = layer.attention_args["scaling"]
    return float(scaling if scaling is not None else layer.head_dim**-0.5)


def _window_left_of(layer: FastLayer) -> int:
    window = layer.attention_args["sliding_window"]
    return -1 if window is None else window - 1


def _pair(linear: PackedLinear) -> tuple[Tensor, Tensor]:
    return linear.weight, linear.bias if linear.bias is not None else linear.weight.new_empty(0)


def _tensors_of(layer: FastLayer) -> list[Tensor]:
    """Returns a layer's weights in the order of `ops.decoder_forward.LAYER_TENSORS`."""
    none = layer.qkv.weight.new_empty(0)
    q_norm, k_norm = (none if norm is None else norm.weight.detach().clone() for norm in (layer.q_norm, layer.k_norm))
    sinks = layer.attention_args["sinks"]
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
