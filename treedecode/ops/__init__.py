"""Front doors of the ops: `torch.ops.treedecode.*` with checked arguments and documented semantics."""

from treedecode.ops._native import Choice, cpu_isa, explain, set_cpu_isa
from treedecode.ops.append_kv import append_kv

__all__ = [
    "Choice",
    "append_kv",
    "cpu_isa",
    "explain",
    "set_cpu_isa",
]
