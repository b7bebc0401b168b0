"""ChangeDetector: notices that a model was changed since it was last looked at."""

from itertools import chain
from operator import attrgetter, is_
from typing import Any

from torch import nn


class ChangeDetector:
    """Remembers a model's modules, hooks, forwards, parameters and buffers, and compares them with those of now.

    It does not see writes through `.data`, which torch does not count, and plain attributes that a forward reads.
    """

    def __init__(self, model: nn.Module) -> None:
        # Flat lists, and filters before loops, because this is asked before every forward: 0.1 ms for SmolLM2.
        self._modules = list(model.modules())
        self._attributes = [vars(module) for module in self._modules]
        self._children = [module._modules for module in self._modules]
        self._hooks = [hooks for m in self._modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        slots: list[tuple[dict[str, Any], str]]
        slots = [(module._parameters, name) for module in self._modules for name in module._parameters]
        slots += [(m._buffers, name) for m in self._modules if not _updates_own_buffers(m) for name in m._buffers]
        self._owners, self._names = [owner for owner, _ in slots], [name for _, name in slots]
        self._tensors = self._current_tensors()
        self._counted = [tensor for tensor in self._tensors if tensor is not None and not tensor.is_inference()]
        self._before = self._state()

    def _current_tensors(self) -> list[Any]:
        return list(map(dict.get, self._owners, self._names))

    def _state(self) -> tuple[list[Any], ...]:
        return (
            list(map(type, self._modules)),
            list(chain.from_iterable(map(dict.values, filter(None, self._children)))),
            list(chain.from_iterable(filter(None, self._hooks))),
            [attributes["forward"] for attributes in self._attributes if "forward" in attributes],
            list(map(attrgetter("_version"), self._counted)),
        )

    def has_changed(self) -> bool:
        """Returns whether something differs from when the detector was made."""
        return self._state() != self._before or not all(map(is_, self._current_tensors(), self._tensors))


def _updates_own_buffers(module: nn.Module) -> bool:
    """Returns whether forwards write the module's buffers: rotary embeddings that follow the length of a sequence."""
    rope_type = getattr(module, "rope_type", None)
    return isinstance(rope_type, str) and (rope_type == "longrope" or "dynamic" in rope_type)
