"""Rollouts of the countdown model: sampled solutions, the states they pass through, and how they came out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

import treedecode as td
from treedecode.tasks.base import Problem
from treedecode.tasks.countdown import Countdown


@dataclass(frozen=True)
class States:
    """States that rollouts passed through, one row each: after the prompt, and after every line.

    Attributes:
        hidden: `[n, hidden_size]` in the model's dtype, what its head reads where the state's last token came in.
        success: `[n]` bool, whether the rollout came out right.
        steps: `[n]` int64, lines written so far.
        counts: `[n]` int64, numbers of the problem.
    """

    hidden: Tensor
    success: np.ndarray
    steps: np.ndarray
    counts: np.ndarray


def sample(dec: td.Decoder, problems: Sequence[Problem], *, branches: int, seed: int) -> list[list[td.Completion]]:
    """`[len(problems)][branches]` solutions at temperature 1."""
    return dec.generate(
        [problem.prompt for problem in problems],
        num_branches=branches,
        sampling=td.Sampling(seed=seed),
        max_new_tokens=64,
    )


def grades(problems: Sequence[Problem], outs: Sequence[Sequence[td.Completion]]) -> np.ndarray:
    """`[len(problems), branches]` bool: which solutions are right."""
    task = Countdown()
    pairs = zip(problems, outs, strict=True)
    return np.array([[task.verify(problem, out.text) for out in completions] for problem, completions in pairs])


@torch.inference_mode()
def states(
    dec: td.Decoder,
    model: PreTrainedModel,
    problems: Sequence[Problem],
    outs: Sequence[Sequence[td.Completion]],
    *,
    batch_size: int = 256,
) -> States:
    """The states of rollouts, their hidden states computed by `model`, which holds the weights that sampled them."""
    right = grades(problems, outs)
    rows = []  # (token ids, count of numbers, success)
    for problem, completions, successes in zip(problems, outs, right, strict=True):
        prompt = dec.encode(problem.prompt)
        count = len(problem.data["numbers"])
        rows += [(prompt + out.token_ids, count, ok) for out, ok in zip(completions, successes, strict=True)]
    rows.sort(key=lambda row: len(row[0]))  # so that batches need little padding
    (newline,) = dec.encode("\n", special=False)
    hidden, success, steps, counts = [], [], [], []
    for begin in range(0, len(rows), batch_size):
        batch = rows[begin : begin + batch_size]
        ids = torch.full((len(batch), len(batch[-1][0])), dec.tokenizer.pad_token_id)
        for i, (tokens, _, _) in enumerate(batch):
            ids[i, : len(tokens)] = torch.tensor(tokens)
        # padding comes after what is read, so causal attention needs no further mask
        last = model.model(input_ids=ids, use_cache=False).last_hidden_state
        ends = ids == newline
        index = ends.nonzero()[:, 0].numpy()
        hidden.append(last[ends])
        success.append(np.array([ok for _, _, ok in batch])[index])
        counts.append(np.array([count for _, count, _ in batch])[index])
        steps.append((ends.cumsum(dim=1)[ends] - 1).numpy())
    return States(torch.cat(hidden), *(np.concatenate(parts) for parts in (success, steps, counts)))
