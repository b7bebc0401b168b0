"""Gives arguments of `model.generate` to a callable that `custom_generate` names, which Transformers withholds from it.

They are read from the variables of the running call: there is no other way to them.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from types import CodeType, FrameType
from typing import Any, TypeVar

from transformers import GenerationMixin

F = TypeVar("F", bound=Callable[..., Any])


def withheld(name: str) -> Any:
    """Returns an argument of the `generate` that is running; None if it has none, or none is running."""
    frame = _frame_of(inspect.unwrap(GenerationMixin.generate).__code__, inspect.currentframe())
    return None if frame is None else frame.f_locals.get(name)


def takes_tokenizer(function: F) -> F:
    """Lets a function for `custom_generate` have the argument `tokenizer`, which `stop_strings` need.

    `generate` takes the tokenizer out of its arguments before it looks which of them the function has.
    """
    signature = inspect.signature(function)
    function.__signature__ = _Signature(  # type: ignore[attr-defined]
        list(signature.parameters.values()), return_annotation=signature.return_annotation
    )
    return function


class _Signature(inspect.Signature):
    """Puts the tokenizer back into the arguments of a `generate` that looks at the parameters."""

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:  # type: ignore[override]
        extract = getattr(GenerationMixin, "_extract_generation_mode_kwargs", None)
        caller = sys._getframe(1)  # `currentframe().f_back` would leave a cycle that holds the model
        if extract is not None and caller.f_code is extract.__code__:
            arguments, taken = caller.f_locals.get("kwargs"), caller.f_locals.get("generation_mode_kwargs")
            if isinstance(arguments, dict) and isinstance(taken, dict) and "tokenizer" in taken:
                arguments["tokenizer"] = taken["tokenizer"]
        return super().parameters


def _frame_of(code: CodeType, frame: FrameType | None) -> FrameType | None:
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame
