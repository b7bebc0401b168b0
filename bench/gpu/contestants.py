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
    """A contestant cannot take part in a case; the message says why, and the results list it."""


@dataclass(frozen=True)
class Contestant:
    """Something that does a case's work.

    Attributes:
        call: runs on input set number i and returns tensors.
        num_sets: sets of inputs that `call` knows; with one alone there is no cold timing.
        error: of the result on set 0 against float64, in the unit of limit; None where there is nothing to compare.
        limit: the largest error to be taken for the same computation.
        plan: what is done once per step before `call`, for all layers.
        plan_method: how `plan` is timed; "clock" is for plans that the host makes.
        timing: how it is timed where repeating `call` will not do.
        self_evicting: a call reads so much that it is cold on one set already.
        notes: what a reader of the row must know.
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
    """Raises NotApplicable unless the device is a GPU."""
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
