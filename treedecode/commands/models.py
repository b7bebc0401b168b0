"""Which model, and which gate, a command takes."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from treedecode.gate.model import Gate
    from treedecode.strategies import Strategy
    from treedecode.tasks import Task


def model_for(model: str | None, task: "Task") -> str:
    """A folder, hub name or `.gguf` file; without one, or as "countdown", the demo model of the task countdown.

    Raises:
        ValueError: no model, for another task.
    """
    if model not in (None, "countdown"):
        return model
    if model is None and task.name != "countdown":
        raise ValueError(f"model: expected a folder, a hub name or a .gguf file for the task {task.name}")
    from treedecode.tasks.countdown import model_path

    return str(model_path())


def gate_path(model: str) -> Path:
    """Where the gate of a model is kept: beside it."""
    return Path(model) / "gate.safetensors"


def gate_for(path: str | None, strategy: "Strategy", model: str) -> "Gate":
    """The gate of a file; without one the strategy's own, or the one beside the model.

    Raises:
        ValueError: there is none.
    """
    from treedecode.gate.model import Gate

    own = getattr(strategy, "gate", None)
    if path is None and isinstance(own, Gate):
        return own
    if path is None and not gate_path(model).exists():
        raise ValueError(f"gate: {strategy.name} has none, nor is there one beside {model}; expected a file")
    return Gate.load(gate_path(model) if path is None else path)
