"""Reference implementation of every op: plain loops in float64 that import nothing else of treedecode."""

from treedecode.reference.append_kv import append_kv
from treedecode.reference.beam_prune import beam_prune
from treedecode.reference.beam_update import beam_update
from treedecode.reference.decoder_forward import decoder_forward
from treedecode.reference.merge_states import merge_states
from treedecode.reference.packed_linear import packed_linear
from treedecode.reference.pages import adopt_pages, append_slots, copy_pages, fork_branches, hold_pages
from treedecode.reference.plan_tree import plan_tree
from treedecode.reference.rms_norm import rms_norm
from treedecode.reference.rotary_embed import rotary_embed
from treedecode.reference.sample import sample
from treedecode.reference.tree_attention import tree_attention

__all__ = [
    "adopt_pages",
    "append_kv",
    "append_slots",
    "beam_prune",
    "beam_update",
    "copy_pages",
    "decoder_forward",
    "fork_branches",
    "hold_pages",
    "merge_states",
    "packed_linear",
    "plan_tree",
    "rms_norm",
    "rotary_embed",
    "sample",
    "tree_attention",
]
