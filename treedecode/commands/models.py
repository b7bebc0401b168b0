"""Which model a command takes."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
