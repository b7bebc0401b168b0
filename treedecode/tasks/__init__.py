"""Problems to solve: where they come from, how an answer is read, and when it is right."""

from treedecode.tasks.base import Problem, Task

__all__ = ["Problem", "Task"]
