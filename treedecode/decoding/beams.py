"""Beam search over abstract logits: the state of many searches at once, and one step of it.

It knows no model and no pages. A driver feeds the logits of the running beams' last tokens and learns which row each
next beam continues, so that it can fork the branches' pages; texts are kept as back-pointers: a step costs O(beams).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from treedecode import ops
from treedecode.common.validation import int_at_least

_FREE_SCORE = -1e9  # what the pool holds where nothing has finished yet


@dataclass(frozen=True)
class BeamSearch:
    """Settings of a beam search, with the meaning they have in Hugging Face Transformers.

    Args:
        num_beams: running beams, and finished beams kept.
        length_penalty: a finished beam's score is its cumulative log-prob / generated length ** length_penalty.
        early_stopping: True ends a search with the `num_beams`-th finished beam; False when the best running beam
            scores no better than the worst finished one; "never" when it no longer could.
        max_new_tokens: length limit.
        min_new_tokens: no end-of-sequence token before this many tokens.
        eos_token_ids: tokens that finish a beam.

    Raises:
        ValueError: a setting is out of range.
    """

    num_beams: int
    max_new_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_beams", 1), ("max_new_tokens", 1), ("min_new_tokens", 0)):
            int_at_least(name, getattr(self, name), least)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(f"early_stopping: expected False, True or 'never', got {self.early_stopping!r}")
        if not isinstance(self.length_penalty, (int, float)) or not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty: expected a finite number, got {self.length_penalty!r}")
        if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in self.eos_token_ids):
            raise ValueError(f"eos_token_ids: expected token ids, got {self.eos_token_ids!r}")


class BeamStep(NamedTuple):
    """The next running beams, one per row of the next step's logits, and the searches that ended.

    parent: `[num_rows]` int64, the row of this step's logits that the beam continues.
    token: `[num_rows]` int64, the token it appends.
    row: `[num_rows]` int64, the row of this step whose place it takes, or -1 where it needs a new one. Rows of this
        step that are not named belong to finished searches and are free.
    finished: groups that ended in this step, ascending.
    """

    parent: Tensor
    token: Tensor
    row: Tensor
    finished: list[int]


class Hypothesis(NamedTuple):
    """A finished beam.

    token_ids: `[length]` int64 generated tokens, the end-of-sequence token included.
    score: cumulative log-prob (nats) / length ** length_penalty.
    beams: `[length]` int64, for each token the beam of its group that it continued.
    logprobs: `[length]` float64, nats, as the search added them up in fp32.
    """

    token_ids: np.ndarray
    score: float
    beams: np.ndarray
    logprobs: np.ndarray


class Beams:
    """Searches of many groups (prompts) in lock step; groups leave as they finish.

    The first step takes one row of logits per group, later ones a row per running beam, groups in ascending order.
    """

    def __init__(
        self,
        settings: BeamSearch,
        num_groups: int,
        *,
        num_beams: Sequence[int] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        """Starts a search for every group.

        Args:
            num_beams: beams of each group where they differ; empty = `settings.num_beams` for all.

        Raises:
            ValueError: there are no groups, or another number of `num_beams`.
        """
        if num_groups < 1:
            raise ValueError(f"num_groups: expected at least 1, got {num_groups}")
        if len(num_beams) not in (0, num_groups) or any(k < 1 for k in num_beams):
            raise ValueError(f"num_beams: expected {num_groups} numbers >= 1, got {list(num_beams)}")
        self.settings = settings
        self.groups = np.arange(num_groups)  # those still running
        self._num_beams = np.array(list(num_beams) or [settings.num_beams] * num_groups)
        self._device = torch.device(device)
        self._first_slot = np.concatenate([[0], np.cumsum(self._num_beams)])
        num_slots = int(self._first_slot[-1])
        self._slots = torch.arange(num_slots, device=device)  # of the running beams, in the columns of the history
        self._lay_out(np.ones(num_groups, np.int64))
        self._scores = torch.zeros(num_groups, device=device)
        self._pool_scores = torch.full((num_slots,), _FREE_SCORE, device=device)
        self._pool_lens = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self._pool_parents = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self._pool_tokens = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self._done = torch.zeros(num_groups, dtype=torch.bool, device=device)
        self._eos = torch.tensor(settings.eos_token_ids, dtype=torch.int32, device=device)
        self._parents: list[Tensor] = []  # per step [num_slots] int32, beam of the group that the slot's beam continued
        self._tokens: list[Tensor] = []  # per step [num_slots] int32
        self._past_scores: list[Tensor] = []  # per step [num_slots] fp32, cumulative
        self._results: dict[int, list[Hypothesis]] = {}

    @property
    def num_rows(self) -> int:
        """Rows of logits that the next step takes; 0 = every group has finished."""
        return len(self._scores)

    @property
    def num_steps(self) -> int:
        """Steps done, which is the number of tokens every running beam has."""
        return len(self._tokens)

    def step(
        self,
        logits: Tensor,
        *,
        token_mask: Tensor | None = None,
        is_logprobs: bool = False,
        stop: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> BeamStep:
        """Takes every running beam one token further.

        Args:
            logits: `[num_rows, vocab_size]` fp32, bf16 or fp16.
            token_mask: `[num_rows, ceil(vocab_size / 32)]` int32 bitmask of tokens a beam may take (bit i of word j is
                token 32 * j + i); log-probs are still over all tokens.
            is_logprobs: `logits` are log-probs to be added as they are.
            stop: asked for hits other than `eos_token_ids`; called with parent and token, both
                `[num_groups, num_candidates]` int32 (parent -1 = absent), returns bool of that shape.

        Raises:
            ValueError: wrong shape, every group has finished, or a row of logits has NaN.
        """
        if self.num_rows == 0:
            raise ValueError("logits: every search has finished")
        if logits.dim() != 2 or logits.shape[0] != self.num_rows:
            raise ValueError(
                f"logits: expected shape [num_rows, vocab_size] = [{self.num_rows}, *], got {list(logits.shape)}"
            )
        num_candidates = ops.beam_candidates(int(self._num_beams[self.groups].max()), len(self._eos))
        if self.num_steps < self.settings.min_new_tokens and len(self._eos):
            token_mask = _without(token_mask, self._eos, logits)
        scores, parent, token, _ = ops.beam_prune(
            logits, self._scores, self._row_indptr, num_candidates, token_mask=token_mask, is_logprobs=is_logprobs
        )
        if logits.device.type != "cpu" and bool(scores.isnan().any()):  # on the CPU the op itself refuses them
            raise ValueError("logits: expected numbers below +inf, got NaN or +inf in a group's rows")
        self._scores, running_parent, running_token = ops.beam_update(
            scores,
            parent,
            token,
            self._row_indptr,
            self._beam_indptr,
            self._pool_scores,
            self._pool_lens,
            self._pool_parents,
            self._pool_tokens,
            self._done,
            gen_lens=self._per_group(self.num_steps),
            max_new_tokens=self._per_group(self.settings.max_new_tokens),
            eos_ids=self._eos,
            length_penalty=self.settings.length_penalty,
            early_stopping=self.settings.early_stopping,
            stop=stop(parent, token) if stop is not None else None,
        )
        self._remember(running_parent - self._first_row, running_token)
        step = BeamStep(running_parent.long(), running_token.long(), self._place, [])
        if self.num_steps == 1:
            self._lay_out(self._num_beams)
        return self._drop_finished(step) if bool(self._done.any()) else step

    @property
    def num_beams(self) -> tuple[int, ...]:
        """Beams of each running group."""
        return tuple(self._num_beams[self.groups].tolist())

    @property
    def is_steady(self) -> bool:
        """True if all steps from here on are alike: a row of logits per beam, and any token allowed."""
        settings = self.settings
        return self.num_steps > 0 and (self.num_steps >= settings.min_new_tokens or not settings.eos_token_ids)

    @property
    def state(self) -> tuple[Tensor, ...]:
        """`[num_rows]` each: running beams' scores; finished beams' scores, lengths, parents, tokens."""
        return self._scores, self._pool_scores, self._pool_lens, self._pool_parents, self._pool_tokens

    def resume(
        self, history: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], state: tuple[Tensor, ...], done: Tensor
    ) -> BeamStep:
        """Continues after steps that were taken elsewhere, from `state` on.

        Args:
            history: of each step (parent, token, score) of the running beams, `[num_rows]`; parents are rows.
            state: what `state` is after the last one; copied.
            done: `[num_groups]` bool, groups that have ended.

        Returns:
            What the last step returns, but every beam continues its own row.
        """
        first_row = self._first_row.numpy(force=True)
        for parent, token, score in history:
            self._scores = torch.from_numpy(score)
            self._remember(torch.from_numpy(parent - first_row), torch.from_numpy(token))
        self._scores, self._pool_scores, self._pool_lens, self._pool_parents, self._pool_tokens = (
            values.clone() for values in state
        )
        self._done = done.clone()
        own = torch.arange(self.num_rows, device="cpu")
        step = BeamStep(own, torch.from_numpy(history[-1][1]).long(), own, [])
        return self._drop_finished(step) if bool(self._done.any()) else step

    def results(self, group: int) -> list[Hypothesis]:
        """A finished group's beams, best first; `num_beams` of them, fewer only if the vocabulary had no more.

        Raises:
            ValueError: the group is unknown or still running.
        """
        if group not in self._results:
            raise ValueError(f"group: {group} is still running or does not exist")
        return self._results[group]

    def _lay_out(self, num_rows: np.ndarray) -> None:
        """Sets where groups have their beams, and their rows of logits: `num_rows` each, 1 or as many as beams."""
        num_beams = self._num_beams[self.groups]
        rows, beams = (np.concatenate([[0], np.cumsum(counts)]) for counts in (num_rows, num_beams))
        first_row = np.repeat(rows[:-1], num_beams)
        within = np.arange(beams[-1]) - np.repeat(beams[:-1], num_beams)
        place = np.where(within < np.repeat(num_rows, num_beams), first_row + within, -1)
        self._row_indptr, self._beam_indptr, self._first_row, self._place = (
            torch.from_numpy(array).to(self._device, dtype)
            for array, dtype in (
                (rows, torch.int32),
                (beams, torch.int32),
                (first_row, torch.int32),
                (place, torch.int64),
            )
        )

    def _per_group(self, value: int) -> Tensor:
        return torch.full((len(self.groups),), value, dtype=torch.int32, device=self._device)

    def _remember(self, parent: Tensor, token: Tensor) -> None:
        histories = (self._parents, parent), (self._tokens, token), (self._past_scores, self._scores)
        for history, values in histories:
            row = values
            if len(values) < self._first_slot[-1]:
                row = values.new_zeros(int(self._first_slot[-1]))
                row[self._slots.to(values.device)] = values
            history.append(row)

    def _drop_finished(self, step: BeamStep) -> BeamStep:
        done = self._done.cpu().numpy()
        finished: list[int] = self.groups[done].tolist()
        for group in finished:
            self._results[group] = self._trace(group)
        keep = torch.from_numpy(np.flatnonzero(np.repeat(~done, self._num_beams[self.groups]))).to(self._device)
        self.groups = self.groups[~done]
        self._scores, self._slots = self._scores[keep], self._slots[keep]
        self._pool_scores, self._pool_lens = self._pool_scores[keep], self._pool_lens[keep]
        self._pool_parents, self._pool_tokens = self._pool_parents[keep], self._pool_tokens[keep]
        self._done = torch.zeros(len(self.groups), dtype=torch.bool, device=self._device)
        self._lay_out(self._num_beams[self.groups])
        kept = keep.to(step.parent.device)
        return BeamStep(step.parent[kept], step.token[kept], step.row[kept], finished)

    def _trace(self, group: int) -> list[Hypothesis]:
        """Follows the back-pointers of the group's pool; its columns are `_slots` of the history."""
        first, end = self._first_slot[group : group + 2].tolist()
        begin = int(torch.searchsorted(self._slots, first))
        pool = slice(begin, begin + end - first)
        scores, lens, parents, tokens = (
            column[pool].cpu().numpy()
            for column in (self._pool_scores, self._pool_lens, self._pool_parents, self._pool_tokens)
        )
        past_parents, past_tokens, past_scores = (
            np.stack([row[first:end].numpy(force=True) for row in history])
            for history in (self._parents, self._tokens, self._past_scores)
        )
        text = np.zeros((len(lens), self.num_steps), dtype=np.int64)
        beams = np.zeros_like(text)
        sums = np.zeros((len(lens), self.num_steps + 1))  # cumulative log-prob after each number of tokens
        used = np.flatnonzero(lens)
        last = lens[used] - 1
        text[used, last], beams[used, last] = tokens[used], parents[used]
        sums[used, last + 1] = scores[used] * lens[used].astype(np.float64) ** self.settings.length_penalty
        for position in range(self.num_steps - 2, -1, -1):
            inside = np.flatnonzero(position < lens - 1)
            beam = beams[inside, position + 1]
            text[inside, position] = past_tokens[position, beam]
            beams[inside, position] = past_parents[position, beam]
            sums[inside, position + 1] = past_scores[position, beam]
        return [
            Hypothesis(text[i, :n], float(scores[i]), beams[i, :n], np.diff(sums[i, : n + 1]))
            for i, n in zip(used, lens[used], strict=True)
        ]


def _without(token_mask: Tensor | None, tokens: Tensor, logits: Tensor) -> Tensor:
    """Clears the bits of `tokens` in every row of a mask."""
    if token_mask is None:
        token_mask = logits.new_full((logits.shape[0], -(-logits.shape[1] // 32)), -1, dtype=torch.int32)
    mask = token_mask.clone()
    for token in tokens.tolist():
        bit = 1 << token % 32
        mask[:, token // 32] &= ~(bit - (1 << 32) if bit == 1 << 31 else bit)
    return mask
