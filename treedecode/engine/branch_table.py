"""BranchTable: the state of every branch on the host, a struct of arrays indexed by the page pool's rows."""

from enum import IntEnum

import numpy as np

from treedecode.common.arrays import IntArray
from treedecode.engine.sampling import Sampling

_WORD = (1 << 64) - 1


class Finish(IntEnum):
    """The reason why a branch stopped. EOS is final; after the others the branch can be extended further."""

    NONE = 0
    STOP = 1
    EOS = 2
    LENGTH = 3


class Work(IntEnum):
    """The work that a branch's current job wants done on it."""

    NONE = 0
    PREFILL = 1  # all tokens but the last into the cache
    SAMPLE = 2  # new tokens until a stop
    LOGITS = 3  # the last token's logits, once
    HIDDEN = 4  # the last token's final hidden state, once


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection of 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix_one(x: int) -> int:
    """`_mix` of one word."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _WORD
    return x ^ (x >> 31)


def child_seeds(seed: IntArray, step: IntArray, ordinal: IntArray) -> IntArray:
    """Hashes (parent's seed, step, ordinal) to the seed of a child, so that siblings differ; int64, broadcast."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    words = [np.atleast_1d(np.asarray(part)).astype(np.int64).view(np.uint64) for part in (seed, step, ordinal)]
    if all(len(word) == 1 for word in words):  # one child at a time is common, and arrays of one take 20 times as long
        return np.array([_child_seed(*(int(word[0]) for word in words))], np.uint64).view(np.int64)
    state = words[0]
    for word in words[1:]:
        state = _mix(_mix(state + golden) ^ _mix(word + golden + golden))
    return state.view(np.int64)


def _child_seed(seed: int, step: int, ordinal: int) -> int:
    golden, state = 0x9E3779B97F4A7C15, seed
    for word in (step, ordinal):
        state = _mix_one(_mix_one(state + golden & _WORD) ^ _mix_one(word + 2 * golden & _WORD))
    return state


class BranchTable:
    """Tokens and settings of every branch; rows are page-pool rows.

    `num_cached[r]` of a branch's `num_tokens[r]` tokens have their K and V in pages. The last token is left out when a
    branch has been extended, so that any child can go on from it; a preempted branch has `num_cached == 0`.
    """

    _COPIED = ("num_tokens", "prompt_len", "step_begin", "cum_logprob", "finish", "stop", "account", "node")

    def __init__(self, max_branches: int, max_tokens: int) -> None:
        n = max_branches
        self.max_tokens = max_tokens
        self.tokens = np.zeros((n, min(256, max_tokens)), np.int32)
        self.logprobs = np.zeros((n, min(256, max_tokens)), np.float32)
        self.num_tokens = np.zeros(n, np.int64)
        self.num_cached = np.zeros(n, np.int64)
        self.prompt_len = np.zeros(n, np.int64)
        self.step_begin = np.zeros(n, np.int64)  # first token of the latest extend
        self.seed = np.zeros(n, np.int64)
        self.num_children = np.zeros(n, np.int64)
        self.cum_logprob = np.zeros(n, np.float64)
        self.finish = np.zeros(n, np.int8)
        self.stop = np.zeros(n, np.int32)  # id of the latest extend's stop set
        self.account = np.full(n, -1, np.int64)  # who pays for it; -1 = nobody
        self.node = np.full(n, -1, np.int64)  # where it is in the record of its account; -1 = nowhere
        self.handles = np.zeros(n, np.int32)  # frontiers that hold the branch; 0 = the row is free
        self.work = np.zeros(n, np.int8)  # Work still to do; NONE = at rest
        self.job = np.full(n, -1, np.int64)
        self.order = np.zeros(n, np.int64)  # first come, first served; the highest is preempted first
        self.limit = np.zeros(n, np.int64)  # num_tokens at which an extend ends
        self.min_tokens = np.zeros(n, np.int64)  # no stop while num_tokens is below
        self.temperature = np.ones(n, np.float32)
        self.top_k = np.zeros(n, np.int32)
        self.top_p = np.ones(n, np.float32)
        self.min_p = np.zeros(n, np.float32)
        self.penalty = np.ones(n, np.float32)
        self.ignore_eos = np.zeros(n, bool)

    def goal(self, rows: IntArray) -> IntArray:
        """Returns how many tokens of each row its work wants in the cache.

        A prefill leaves the last one out. A hidden state is that before an end of sequence.
        """
        work = self.work[rows]
        without_last = (work == Work.PREFILL) | ((work == Work.HIDDEN) & (self.finish[rows] == Finish.EOS))
        return self.num_tokens[rows] - without_last

    def reserve(self, num_tokens: int) -> None:
        """Makes room for branches of `num_tokens` tokens."""
        width = self.tokens.shape[1]
        if num_tokens <= width:
            return
        grown = min(max(num_tokens, 2 * width), max(self.max_tokens, num_tokens))
        for name in ("tokens", "logprobs"):
            old = getattr(self, name)
            new = np.zeros((old.shape[0], grown), old.dtype)
            new[:, :width] = old
            setattr(self, name, new)

    def open(self, rows: IntArray, prompts: list[IntArray], seeds: IntArray, account: int = -1) -> None:
        """Starts fresh branches on their prompts; nothing is cached yet."""
        self.reserve(max(len(prompt) for prompt in prompts))
        for row, prompt in zip(rows, prompts, strict=True):
            self.tokens[row, : len(prompt)] = prompt
            self.logprobs[row, : len(prompt)] = 0
            self.num_tokens[row] = len(prompt)
        self.num_cached[rows] = 0
        self.prompt_len[rows] = self.num_tokens[rows]
        self.step_begin[rows] = self.num_tokens[rows]
        self.seed[rows] = seeds
        self.num_children[rows] = 0
        self.cum_logprob[rows] = 0
        self.finish[rows] = Finish.NONE
        self.stop[rows] = 0
        self.account[rows] = account
        self.node[rows] = -1
        self.handles[rows] = 1
        self.work[rows] = Work.NONE
        self.job[rows] = -1

    def copy(self, src: IntArray, dst: IntArray) -> None:
        """Copies tokens and history of rows `src` to rows `dst`, all at once. Seeds, handles and `num_cached` stay."""
        for name in self._COPIED:
            array = getattr(self, name)
            array[dst] = array[src]
        width = int(self.num_tokens[dst].max(initial=0))
        self.tokens[dst, :width] = self.tokens[src, :width]
        self.logprobs[dst, :width] = self.logprobs[src, :width]

    def truncate(self, rows: IntArray, lens: IntArray) -> None:
        """Forgets tokens at and after `lens`; a branch cut short is no longer finished."""
        for row, new in zip(rows, lens, strict=True):
            dropped = self.logprobs[row, max(new, self.prompt_len[row]) : self.num_tokens[row]]
            self.cum_logprob[row] -= float(dropped.sum(dtype=np.float64))
        cut = lens < self.num_tokens[rows]
        self.finish[rows[cut]] = Finish.NONE
        self.num_tokens[rows] = lens
        self.step_begin[rows] = np.minimum(self.step_begin[rows], lens)
        self.num_cached[rows] = np.minimum(self.num_cached[rows], lens - 1)

    def append(self, rows: IntArray, lengths: IntArray, tokens: IntArray) -> None:
        """Appends tokens (packed in row order) to the ends of rows; their log-probability counts as 0."""
        self.reserve(int((self.num_tokens[rows] + lengths).max(initial=0)))
        positions = np.repeat(self.num_tokens[rows] - np.cumsum(lengths) + lengths, lengths) + np.arange(len(tokens))
        self.tokens[np.repeat(rows, lengths), positions] = tokens
        self.logprobs[np.repeat(rows, lengths), positions] = 0
        self.num_tokens[rows] += lengths
        self.finish[rows] = Finish.NONE

    def configure(self, rows: IntArray, sampling: Sampling) -> None:
        """Sets how rows sample from here on."""
        self.temperature[rows] = sampling.temperature
        self.top_k[rows] = sampling.top_k
        self.top_p[rows] = sampling.top_p
        self.min_p[rows] = sampling.min_p
        self.penalty[rows] = sampling.repetition_penalty
        self.ignore_eos[rows] = sampling.ignore_eos
        self.min_tokens[rows] = self.num_tokens[rows] + sampling.min_new_tokens

    def packed(self, rows: IntArray, q_lens: IntArray) -> tuple[IntArray, IntArray]:
        """Returns ids and positions of the next `q_lens` uncached tokens of each row, packed in row order, int64."""
        starts = self.num_cached[rows]
        within = np.arange(int(q_lens.sum())) - np.repeat(np.cumsum(q_lens) - q_lens, q_lens)
        positions = np.repeat(starts, q_lens) + within
        return self.tokens[np.repeat(rows, q_lens), positions].astype(np.int64), positions
