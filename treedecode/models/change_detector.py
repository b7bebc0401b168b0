"""ChangeDetector: notices that a model was changed since it was last looked at.

Keys and values in the cache, and weights in layouts of our own, are of the model as it was. What is compared is what a
forward can depend on:

* modules and their order, classes, hooks, and forwards that were replaced;
* parameters and buffers: the objects, and the number of writes to each that torch has counted;
* plain attributes of modules and configs: numbers, strings, None, and lists, tuples, sets and dicts of them. Adapters
  keep their switches there;
* on request one element of each tensor, because torch does not count writes through `.data`.

Not seen are writes through `.data` otherwise, and attributes that are objects of other kinds.
"""

import copy
import weakref
from itertools import chain
from operator import attrgetter, eq, is_
from typing import Any

import torch
from torch import Tensor, nn

_SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_CONTAINERS = (list, tuple, set, frozenset, dict)
_INTERNAL = frozenset(vars(nn.Module()))  # hooks, parameters and so on, which are compared in their own ways
_SIZES = {"in_features", "out_features"}  # of linear layers, whose weights are compared


class ChangeDetector:
    """Remembers a model, and compares it with the model of now. It does not keep the model alive."""

    def __init__(self, model: nn.Module, *, samples: bool = False) -> None:
        """Looks at the model.

        Args:
            samples: also compare one element of each tensor, which takes longer.
        """
        # Flat lists, and filters before loops, because this is asked before every forward.
        self._root = weakref.ref(model)
        self._modules = list(model.modules())[1:]  # of the root itself only what follows
        modules = [model, *self._modules]
        self._root_class = type(model)
        self._children = [module._modules for module in modules]
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        slots: list[tuple[dict[str, Any], str]] = [(m._parameters, name) for m in modules for name in m._parameters]
        slots += [(m._buffers, name) for m in modules if not _updates_own_buffers(m) for name in m._buffers]
        self._registries = [registry for m in modules for registry in (m._parameters, m._buffers)]
        self._owners, self._names = [owner for owner, _ in slots], [name for _, name in slots]
        self._tensors = self._current_tensors()
        self._counted = [tensor for tensor in self._tensors if tensor is not None and not tensor.is_inference()]
        parts = [module for module in self._modules if not _updates_own_buffers(module)]
        configs = {id(config): config for m in modules if hasattr(config := getattr(m, "config", None), "to_dict")}
        self._attributes = _Attributes([vars(owner) for owner in (*parts, *configs.values())])
        self._root_attributes = copy.deepcopy(_attributes_of(model))
        self._sampled = [tensor for tensor in self._tensors if _has_plain_storage(tensor)] if samples else []
        self._before = self._state()

    def _current_tensors(self) -> list[Any]:
        return list(map(dict.get, self._owners, self._names))

    def _state(self) -> tuple[Any, ...]:
        return (
            list(map(type, self._modules)),
            list(chain.from_iterable(map(dict.values, filter(None, self._children)))),
            list(chain.from_iterable(filter(None, self._hooks))),
            list(map(len, self._registries)),
            list(map(attrgetter("_version"), self._counted)),
            _samples(self._sampled),
        )

    def has_changed(self) -> bool:
        """Returns whether something differs from when the detector was made."""
        return (
            (root := self._root()) is None
            or type(root) is not self._root_class
            or _attributes_of(root) != self._root_attributes
            or self._state() != self._before
            or not all(map(is_, self._current_tensors(), self._tensors))
            or self._attributes.have_changed()
        )


class _Attributes:
    """The plain attributes of the parts of a model and of their configs."""

    def __init__(self, owners: list[dict[str, Any]]) -> None:
        self._owners = owners
        self._counts = list(map(len, owners))
        named = [(owner, name) for owner in owners for name in owner if name not in _INTERNAL | _SIZES]
        scalars = [(owner, name) for owner, name in named if _is_scalar(name, owner[name])]
        containers = [(owner, name) for owner, name in named if _is_plain_container(owner[name])]
        self._scalar_owners, self._scalar_names = [owner for owner, _ in scalars], [name for _, name in scalars]
        self._container_owners = [owner for owner, _ in containers]
        self._container_names = [name for _, name in containers]
        self._scalars = self._current_scalars()
        self._types = list(map(type, self._scalars))
        self._containers = [copy.deepcopy(owner[name]) for owner, name in containers]

    def _current_scalars(self) -> list[Any]:
        return list(map(dict.get, self._scalar_owners, self._scalar_names))

    def have_changed(self) -> bool:
        """Returns whether an attribute has another value, or there are more or fewer."""
        scalars = self._current_scalars()
        if list(map(len, self._owners)) != self._counts or list(map(type, scalars)) != self._types:
            return True
        try:
            containers = map(dict.get, self._container_owners, self._container_names)
            return scalars != self._scalars or not all(map(eq, containers, self._containers))
        except (RuntimeError, TypeError, ValueError):  # a container holds tensors by now, which have no truth value
            return True


def _attributes_of(root: nn.Module) -> dict[str, Any]:
    """Returns the plain attributes of a module, whose `__dict__` is not kept because it may hold the decoder."""
    items = [(name, value) for name, value in vars(root).items() if name not in _INTERNAL or name == "training"]
    return {name: value for name, value in items if _is_scalar(name, value) or _is_plain_container(value)}


def _is_scalar(name: str, value: Any) -> bool:
    return isinstance(value, _SCALARS) or name == "forward"


def _is_plain_container(value: Any) -> bool:
    """Returns whether a container, which may be empty, holds numbers and names alone, at any depth."""
    if not isinstance(value, _CONTAINERS):
        return False
    items = chain(value, value.values()) if isinstance(value, dict) else value
    return all(isinstance(item, _SCALARS) or _is_plain_container(item) for item in items)


def _has_plain_storage(tensor: Any) -> bool:
    """Returns whether an element of a tensor can be read: not of quantised, sparse, wrapped or absent ones."""
    return (
        isinstance(tensor, Tensor)
        and type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
        and tensor.layout == torch.strided
        and not tensor.is_quantized
        and not tensor.is_meta
        and tensor.numel() > 0
    )


@torch.no_grad()
def _samples(tensors: list[Tensor]) -> list[float]:
    """Returns the middle element of each tensor."""
    with torch.autocast("cpu", enabled=False):
        return [float(tensor.detach().reshape(-1)[tensor.numel() // 2]) for tensor in tensors]


def _updates_own_buffers(module: Any) -> bool:
    """Returns whether forwards write to a module: rotary embeddings that follow the length of a sequence."""
    rope_type = getattr(module, "rope_type", None)
    types = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return any(isinstance(name, str) and (name == "longrope" or "dynamic" in name) for name in types)
