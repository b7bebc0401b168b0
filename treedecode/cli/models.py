"""Finds the task, the model and the gate that a command names, and loads them."""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treedecode.cli.errors import errors_of_argument, first_line

if TYPE_CHECKING:
    from treedecode.allocation.gate import Gate
    from treedecode.decoding.decoder import Decoder
    from treedecode.strategies import Strategy
    from treedecode.tasks import Task

_PAUSE = 2.0  # seconds


def task_for(name: str, argument: str = "task", max_new_tokens: int | None = None, **options: Any) -> "Task":
    """Loads a task by its name, or from a .jsonl file of problems.

    Args:
        argument: the one that named it.
        max_new_tokens: of a solution; None = the task's own limit.
        options: of the task.

    Raises:
        ValueError: there is no such task, or the file is missing or broken.
        ModuleNotFoundError: a package is missing.
    """
    from treedecode import tasks

    with errors_of_argument(argument, "name_or_path"):
        task = tasks.load(name, **options)
    if max_new_tokens is not None:
        task.max_new_tokens = max_new_tokens
        task.max_step_tokens = min(task.max_step_tokens, max_new_tokens)
    return task


def num_lines(path: str) -> int:
    """Counts the problems of a .jsonl file."""
    with open(path, "rb") as file:
        return sum(1 for line in file if line.strip())


def model_for(model: str | None, task: "Task") -> str:
    """Returns the folder, hub name or `.gguf` file of a model.

    Args:
        model: None = the demo model of the task countdown, as does "countdown".

    Raises:
        ValueError: there is no model and the task is another one, or the path leads nowhere.
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
    """Returns whether a name is a path that does not exist; a hub name is NAME or OWNER/NAME."""
    is_path = name.startswith((".", "~")) or os.path.isabs(name) or name.endswith(".gguf") or name.count("/") > 1
    return not name or (is_path and not os.path.exists(name))


def require_hub(name: str, argument: str) -> None:
    """Checks that there is a connection to the hub, for a model that has to come from there.

    The hub's client goes on trying for half a minute, which helps where the hub is slow or busy, but not where there is
    no connection. So this function asks the hub twice, a few seconds apart. Loading reports every other error.

    Args:
        argument: the one that named the model.

    Raises:
        ValueError: there is no connection.
    """
    if os.path.exists(name):
        return
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import httpx  # the client's own, since other versions use another package

    for pause in (_PAUSE, None):
        try:
            if not isinstance(try_to_load_from_cache(name, "config.json"), str):
                get_hf_file_metadata(hf_hub_url(name, "config.json"))
        except httpx.ConnectError as error:
            if pause is None:
                raise ValueError(
                    f"{argument}: there is no folder {name!r}, and {constants.ENDPOINT} cannot be reached: "
                    f"{first_line(error)}"
                ) from error
            time.sleep(pause)
        except Exception:  # no such model, a time-out, offline mode
            return
        else:
            return


def decoder_for(model: str, *, dtype: str | None = None, device: str = "cpu", **options: Any) -> "Decoder":
    """Loads a model, and makes a decoder on it.

    Args:
        options: of `Decoder`.

    Raises:
        ValueError: the device or the model cannot be used, or an option is out of range.
        MemoryError: the model or its pages do not fit.
    """
    import torch
    from transformers.utils import logging

    from treedecode.decoding.decoder import Decoder
    from treedecode.models import load_pretrained

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    check_device(device)
    require_hub(model, "model")
    with errors_of_argument("model", "path_or_id", "gguf_file"):
        torch_dtype = None if dtype is None else getattr(torch, dtype)
        loaded, tokenizer = load_pretrained(model, dtype=torch_dtype, device=device)
    return Decoder(loaded, tokenizer, **options)


def check_device(device: str) -> None:
    """Checks that torch can use a device.

    Raises:
        ValueError: it cannot.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such device; torch built without it
        raise ValueError(f"device: {device!r} cannot be used: {first_line(error)}") from None


def gate_path(model: str) -> Path:
    """Returns the path of a model's gate, which is kept beside the model."""
    return Path(model) / "gate.safetensors"


def gate_file(path: str | os.PathLike[str] | None, model: str) -> Path:
    """Returns the file of a gate; without a path, the file beside the model.

    Raises:
        ValueError: there is no such file.
    """
    file = gate_path(model) if path is None else Path(path)
    if not file.is_file():
        where = f"at {file}" if path is not None else f"beside the model, {file}"
        raise ValueError(f"gate: expected the file of one, and there is none {where}")
    return file


def gate_for(path: str | None, strategy: "Strategy", model: str) -> "Gate":
    """Returns the gate of a file; without a path, the strategy's own gate, or the one beside the model.

    Raises:
        ValueError: there is none, or the file is no gate.
    """
    from treedecode.allocation.gate import Gate

    own = getattr(strategy, "gate", None)
    if path is None and isinstance(own, Gate):
        return own
    with errors_of_argument("gate", "path"):
        return Gate.load(gate_file(path, model))
