"""The attention backend of vLLM's CPU platform: one plan a step, one read of every shared page."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata, MultipleOf
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from treedecode import ops

_ENCODERS = (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)


@dataclass
class TreeMetadata:
    """The step of one KV cache group, for all of its layers.

    Attributes:
        num_actual_tokens: query tokens; tensors of a step may be longer.
        block_table: `[num_requests, max_blocks]` int32.
        seq_lens: `[num_requests]` int32, tokens in the cache including those of this step.
        plan: of these requests.
        slot_mapping: `[num_tokens]` int64, where new keys and values go; negative = nowhere.
        is_checked: a layer has compared the plan with the cache.
    """

    num_actual_tokens: int
    block_table: Tensor
    seq_lens: Tensor
    plan: ops.TreePlan
    slot_mapping: Tensor
    is_checked: bool = False


class TreeMetadataBuilder(CPUAttentionMetadataBuilder):
    """Plans a step. Encoders, which have no cache, stay with vLLM."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        """Returns the metadata of a step."""
        if self.is_encoder_only_attention:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        common = common_attn_metadata
        if common.causal is not True:
            raise NotImplementedError("treedecode: attention that is not causal; TREEDECODE_VLLM=0 leaves it to vLLM")
        plan = ops.plan_tree(
            common.block_table_tensor,
            common.seq_lens,
            common.query_start_loc.diff().int(),
            page_size=self.block_size,
            num_qo_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
        )
        return TreeMetadata(
            common.num_actual_tokens, common.block_table_tensor, common.seq_lens, plan, common.slot_mapping
        )


class TreeAttention(CPUAttentionBackendImpl):
    """Attention of one layer.

    Raises:
        NotImplementedError: the layer has what the ops do not (named).
    """

    sinks: Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.attn_type in _ENCODERS:
            return
        declined = {
            "ALiBi slopes": self.alibi_slopes is not None,
            f"kv_cache_dtype={self.kv_cache_dtype}": self.is_fp8_kv_cache,
            f"head_size={self.head_size}": self.head_size % 8 != 0 or self.head_size > 256,
            "cross attention": self.attn_type == AttentionType.ENCODER_DECODER,
        }
        for what, is_there in declined.items():
            if is_there:
                raise NotImplementedError(f"treedecode: {what}; TREEDECODE_VLLM=0 leaves the model to vLLM")
        self._window_left = self.sliding_window - 1 if self.sliding_window >= 0 else -1

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attends to the cache, which has the new keys and values by now, and writes to `output`."""
        if not isinstance(attn_metadata, TreeMetadata):  # an encoder's, or none while vLLM warms up
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        num_tokens = attn_metadata.num_actual_tokens
        sinks = self.sinks
        if sinks is not None and sinks.dtype != torch.float32:  # they are loaded after the layer was made
            sinks = self.sinks = sinks.float()
        out = output[:num_tokens].view(num_tokens, self.num_heads, self.head_size)
        ops.tree_attention(
            query[:num_tokens],
            *_keys_and_values(kv_cache),
            attn_metadata.block_table,
            attn_metadata.seq_lens,
            attn_metadata.plan,
            sm_scale=self.scale,
            window_left=self._window_left,
            logits_soft_cap=float(self.logits_soft_cap),
            sinks=sinks,
            out=out,
            return_lse=False,
            checks_plan=not attn_metadata.is_checked,
        )
        attn_metadata.is_checked = True
        return output

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Writes new keys and values `[num_tokens, num_kv_heads, head_size]` to the cache."""
        if self.attn_type in _ENCODERS:
            return
        num_tokens = len(slot_mapping)
        ops.append_kv(key[:num_tokens], value[:num_tokens], *_keys_and_values(kv_cache), slot_mapping)


def _keys_and_values(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the halves of the last dimension, `[num_blocks, block_size, num_kv_heads, head_size]` each."""
    keys, values = kv_cache.transpose(1, 2).chunk(2, dim=-1)
    return keys, values


class TreeAttentionBackend(CPUAttentionBackend):
    """vLLM's CPU backend with attention over trees."""

    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Returns the block sizes: all."""
        return [MultipleOf(1)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Returns the head sizes: multiples of 8 up to 256."""
        return list(range(8, 257, 8))

    @staticmethod
    def get_impl_cls() -> type[TreeAttention]:
        """Returns the class of a layer's attention."""
        return TreeAttention

    @staticmethod
    def get_builder_cls() -> type[TreeMetadataBuilder]:
        """Returns the class that plans a step."""
        return TreeMetadataBuilder
