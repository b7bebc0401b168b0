"""Finds answers in texts, and tells which answers are the same."""

from treedecode.tasks.answer_text import after_hashes, boxed, extract_answer, is_heading, last_number, stated
from treedecode.tasks.equivalence import classes, equivalence_backend, equivalent, normalize

__all__ = [
    "after_hashes",
    "boxed",
    "classes",
    "equivalence_backend",
    "equivalent",
    "extract_answer",
    "is_heading",
    "last_number",
    "normalize",
    "stated",
]
