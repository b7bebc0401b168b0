"""Which task, which model, and which gate, a command takes."""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treedecode.cli import errors as misuse

if TYPE_CHECKING:
    from treedecode.allocation.gate import Gate
    from treedecode.decoding.decoder import Decoder
    from treedecode.strategies import Strategy
    from treedecode.tasks import Task

_PAUSE = 2.0  # seconds


def task_for(name: str, argument: str = "task") -> "Task":
    """A task by name, or the problems of a .jsonl file.

    Args:
        argument: the one that named it.

    Raises:
        ValueError: no such task, or a file that is missing or broken. ModuleNotFoundError: a package is missing.
    """
    from treedecode import tasks

    with misuse.argument(argument, "name_or_path"):
        return tasks.load(name)


def num_lines(path: str) -> int:
    """How many problems a .jsonl file has."""
    with open(path, "rb") as file:
        return sum(1 for line in file if line.strip())


def model_for(model: str | None, task: "Task") -> str:
    """A folder, hub name or `.gguf` file; without one, or as "countdown", the demo model of the task countdown.

    Raises:
        ValueError: no model, for another task, or a path that leads nowhere.
    """
    if model is None and task.name != "countdown":
        raise ValueError(f"model: expected a folder, a hub name or a .gguf file for the task {task.name}")
    if model in (None, "countdown"):
        from treedecode.tasks.countdown import model_path

        return str(model_path())
    assert model is not None
    if leads_nowhere(model):
        raise ValueError(f"model: expected a folder, a hub name or a .gguf file, and there is no {model!r}")
    return model


def leads_nowhere(name: str) -> bool:
    """Whether a name is a path, and nothing is there; a hub name is NAME or OWNER/NAME."""
    is_path = name.startswith((".", "~")) or os.path.isabs(name) or name.endswith(".gguf") or name.count("/") > 1
    return not name or (is_path and not os.path.exists(name))


def require_hub(name: str, argument: str) -> None:
    """Checks that there is a connection to the hub, for a model that has to come from there.

    The hub's client goes on trying for half a minute, which is of use where the hub is slow or busy, and of none where
    nothing leads to it. So it is asked here twice, a few seconds apart. Whatever else is wrong, loading finds out.

    Args:
        argument: the one that named the model.

    Raises:
        ValueError: there is none.
    """
    if os.path.exists(name):
        return
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import httpx  # the client's own: newer ones have another package of that kind

    for pause in (_PAUSE, None):
        try:
            if not isinstance(try_to_load_from_cache(name, "config.json"), str):
                get_hf_file_metadata(hf_hub_url(name, "config.json"))
        except httpx.ConnectError as error:
            if pause is None:
                raise ValueError(
                    f"{argument}: there is no folder {name!r}, and {constants.ENDPOINT} cannot be reached: "
                    f"{misuse.first_line(error)}"
                ) from error
            time.sleep(pause)
        except Exception:  # no such model, a time-out, offline mode
            return
        else:
            return


def decoder_for(model: str, *, dtype: str | None = None, device: str = "cpu", **options: Any) -> "Decoder":
    """A decoder on a model.

    Args:
        options: of `Decoder`.

    Raises:
        ValueError: the device or the model cannot be used, or an option is out of range. MemoryError: it does not fit.
    """
    import torch
    from transformers.utils import logging

    from treedecode.decoding.decoder import Decoder
    from treedecode.models import load_pretrained

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    check_device(device)
    require_hub(model, "model")
    with misuse.argument("model", "path_or_id", "gguf_file"):
        found = load_pretrained(model, dtype=None if dtype is None else getattr(torch, dtype), device=device)
    return Decoder(*found, **options)


def check_device(device: str) -> None:
    """Raises:
    ValueError: torch cannot use it.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such device; torch built without it
        raise ValueError(f"device: {device!r} cannot be used: {misuse.first_line(error)}") from None


def gate_path(model: str) -> Path:
    """Where the gate of a model is kept: beside it."""
    return Path(model) / "gate.safetensors"


def gate_file(path: str | os.PathLike[str] | None, model: str) -> Path:
    """The file of a gate; without one, that beside the model.

    Raises:
        ValueError: there is no such file.
    """
    found = gate_path(model) if path is None else Path(path)
    if not found.is_file():
        where = f"at {found}" if path is not None else f"beside the model, {found}"
        raise ValueError(f"gate: expected the file of one, and there is none {where}")
    return found


def gate_for(path: str | None, strategy: "Strategy", model: str) -> "Gate":
    """The gate of a file; without one the strategy's own, or the one beside the model.

    Raises:
        ValueError: there is none, or the file is no gate.
    """
    from treedecode.allocation.gate import Gate

    own = getattr(strategy, "gate", None)
    if path is None and isinstance(own, Gate):
        return own
    with misuse.argument("gate", "path"):
        return Gate.load(gate_file(path, model))
