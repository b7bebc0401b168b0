"""Rollouts of the countdown model: sampled solutions, the states they pass through, and their outcomes."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import treedecode as td
from treedecode.tasks.base import Problem
from treedecode.tasks.countdown import Countdown

MAX_NEW_TOKENS = 64  # the solution of a problem of five numbers has 43


@dataclass(frozen=True)
class Rollouts:
    """Sampled solutions, a row each.

    A state is the text before the next line: a rollout passes through one at the end of its prompt and of every line.

    Attributes:
        ids: `[n, length]` int64 prompt and solution, padded at the end.
        ends: `[n, length]` bool: the last tokens of states, which are newlines.
        success: `[n]` bool: the solution is right.
        counts: `[n]` int64, numbers of the problem.
    """

    ids: Tensor
    ends: Tensor
    success: Tensor
    counts: Tensor

    def __getitem__(self, rows: Tensor | slice) -> "Rollouts":
        return Rollouts(self.ids[rows], self.ends[rows], self.success[rows], self.counts[rows])

    def to(self, device: torch.device) -> "Rollouts":
        return Rollouts(self.ids.to(device), self.ends.to(device), self.success.to(device), self.counts.to(device))

    def state_labels(self) -> Tensor:
        """Tells which states, in order of `ends`, are of rollouts that came out right, `[number of states]` bool."""
        return self.success[self.ends.nonzero()[:, 0]]


def make_decoder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> td.Decoder:
    """Makes a decoder on a bfloat16 copy of a model in training, as a decoder puts its own attention into a model."""
    return td.Decoder(copy.deepcopy(model).to(torch.bfloat16).eval(), tokenizer, kv_memory="128MiB")


def sample(dec: td.Decoder, problems: Sequence[Problem], *, branches: int, seed: int) -> list[list[td.Completion]]:
    """Samples solutions at temperature 1, `[len(problems)][branches]`."""
    return dec.generate(
        [problem.prompt for problem in problems],
        num_branches=branches,
        sampling=td.Sampling(seed=seed),
        max_new_tokens=MAX_NEW_TOKENS,
    )


def grades(problems: Sequence[Problem], outs: Sequence[Sequence[td.Completion]]) -> np.ndarray:
    """Tells which solutions are right, `[len(problems), branches]` bool."""
    task = Countdown()
    pairs = zip(problems, outs, strict=True)
    return np.array([[task.verify(problem, out.text) for out in completions] for problem, completions in pairs])


def roll_out(dec: td.Decoder, problems: Sequence[Problem], outs: Sequence[Sequence[td.Completion]]) -> Rollouts:
    """Puts the solutions of `sample` into arrays."""
    rows, counts = [], []
    for problem, completions in zip(problems, outs, strict=True):
        prompt = dec.encode(problem.prompt)
        rows += [prompt + out.token_ids for out in completions]
        counts += [len(problem.data["numbers"])] * len(completions)
    ids = torch.full((len(rows), max(map(len, rows))), dec.tokenizer.pad_token_id)
    for i, tokens in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
    (newline,) = dec.encode("\n", special=False)
    success = torch.from_numpy(grades(problems, outs).reshape(-1))
    return Rollouts(ids, ids == newline, success, torch.tensor(counts))


def hidden_states(model: PreTrainedModel, rollouts: Rollouts) -> Tensor:
    """Computes the final hidden states at the last tokens of all states, `[number of states, hidden_size]`."""
    # padding comes after all tokens that are read, so causal attention needs no further mask
    return model.model(input_ids=rollouts.ids, use_cache=False).last_hidden_state[rollouts.ends]
