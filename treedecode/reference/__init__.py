"""Ground truth of every op: plain loops in float64 that import nothing else of treedecode."""

from treedecode.reference.append_kv import append_kv

__all__ = ["append_kv"]
