"""Scorers of live branches."""

from typing import Any

import numpy as np


def as_scorer(scorer: Any) -> Any:
    """A scorer from a function of (problem, text)."""
    if scorer is None or hasattr(scorer, "num_samples"):
        return scorer

    async def score(frontier: Any, problem: Any) -> np.ndarray:
        return np.array([scorer(problem, text) for text in frontier.texts()])

    return score
