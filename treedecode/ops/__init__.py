"""The ops: functions over `torch.ops.treedecode.*` with checked arguments and documented semantics."""

from treedecode.ops._native import Choice, compiled_isas, cpu_isa, cpu_threads, explain, names, set_cpu_isa
from treedecode.ops.append_kv import append_kv
from treedecode.ops.beam_prune import beam_prune
from treedecode.ops.beam_update import beam_candidates, beam_update
from treedecode.ops.decoder_forward import DecoderWeights, decoder_forward
from treedecode.ops.merge_states import merge_states
from treedecode.ops.packed_linear import pack_bias, pack_weight, packed_linear
from treedecode.ops.pages import PageState, adopt_pages, append_slots, copy_pages, fork_branches, hold_pages
from treedecode.ops.plan_tree import TreePlan, plan_tree
from treedecode.ops.rms_norm import rms_norm
from treedecode.ops.rotary_embed import rotary_embed
from treedecode.ops.sample import sample
from treedecode.ops.tree_attention import tree_attention

__all__ = [
    "Choice",
    "DecoderWeights",
    "PageState",
    "TreePlan",
    "adopt_pages",
    "append_kv",
    "append_slots",
    "beam_candidates",
    "beam_prune",
    "beam_update",
    "compiled_isas",
    "copy_pages",
    "cpu_isa",
    "cpu_threads",
    "decoder_forward",
    "explain",
    "fork_branches",
    "hold_pages",
    "merge_states",
    "names",
    "pack_bias",
    "pack_weight",
    "packed_linear",
    "plan_tree",
    "rms_norm",
    "rotary_embed",
    "sample",
    "set_cpu_isa",
    "tree_attention",
]
