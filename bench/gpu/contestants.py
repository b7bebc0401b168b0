"""Implementations that do a benchmark case's work, ours and peers."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from bench.gpu.timing import Timing


class NotApplicable(Exception):
    """A contestant cannot take part in a case; the results list the message."""


@dataclass(frozen=True)
class Contestant:
    """An implementation of a case's work.

    Attributes:
        call: runs on input set number i and returns tensors.
        num_sets: sets of inputs that `call` knows; with a single one there is no cold timing.
        error: returns the error of the result on set 0 against float64, in the unit of limit; None = no comparison.
        limit: the largest error of an implementation of the same computation.
        plan: does the work that is done once per step before `call`, for all layers.
        plan_method: the timing of `plan`; "clock" is for plans that the host makes.
        timing: times the work where repeating `call` does not.
        self_evicting: a call reads so much that it is cold on one set already.
        notes: remarks for readers of the row.
    """

    call: Callable[[int], Any]
    num_sets: int = 1
    error: Callable[[], float] | None = None
    limit: float = 0.0
    plan: Callable[[], object] | None = None
    plan_method: str = "graph"
    notes: str = ""
    timing: Callable[[], Timing] | None = None
    self_evicting: bool = False


Builders = Mapping[str, Callable[[], Contestant]]


def require_gpu(device: torch.device) -> None:
    """Checks that the device is a GPU.

    Raises:
        NotApplicable: it is not.
    """
    if device.type != "cuda":
        raise NotApplicable("runs on a GPU only")


def import_peer(package: str) -> ModuleType:
    """Imports a peer's package.

    Raises:
        NotApplicable: it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise NotApplicable(f"{package} is not installed")
    return importlib.import_module(package)
