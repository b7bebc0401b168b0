"""Front doors of the ops: `torch.ops.treedecode.*` with checked arguments and documented semantics."""

from treedecode.ops._native import Choice, cpu_isa, explain, set_cpu_isa
from treedecode.ops.append_kv import append_kv
from treedecode.ops.pages import (
    PageState,
    adopt_pages,
    append_slots,
    copy_pages,
    fork_branches,
    hold_pages,
)

__all__ = [
    "Choice",
    "PageState",
    "adopt_pages",
    "append_kv",
    "append_slots",
    "copy_pages",
    "cpu_isa",
    "explain",
    "fork_branches",
    "hold_pages",
    "set_cpu_isa",
]
