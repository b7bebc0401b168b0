"""Frontier: a handle on branches of many trees, as arrays."""

from collections.abc import Awaitable, Callable, Sequence

import numpy as np
from torch import Tensor

from treedecode.common.arrays import IntArray
from treedecode.common.validation import ints_per_branch, one_of, positive_int
from treedecode.decoding.codec import Codec, ForcedText
from treedecode.decoding.completion import Completion, completions_of
from treedecode.decoding.recorder import Recorder
from treedecode.decoding.selection import Scores, best_of_each, copies_per_branch, first_equal, indices_of, numbers_of
from treedecode.engine.branch_table import Finish, child_seeds
from treedecode.engine.engine import Engine
from treedecode.engine.sampling import Sampling, sampling_or
from treedecode.engine.stops import StopLike


class Frontier:
    """Branches of one search over many prompts: `[n]` arrays, one entry per branch, children beside their siblings.

    `fork`, `fork_at` and `select` leave this frontier as it is. `prune`, `spread`, `merge` and `join` hand its branches
    on to the frontier they return. A branch that no frontier holds any more gives its pages back: on `release()`, at
    the end of a `with` block, or when the frontier is garbage.

    Attributes:
        tree: `[n]` int64, the prompt each branch grew from.
        counts: `[n]` int64, how many branches `merge` has put into each.
    """

    def __init__(
        self,
        engine: Engine,
        codec: Codec,
        recorder: Recorder,
        rows: IntArray,
        tree: IntArray,
        num_trees: int,
        sampling: Sampling,
    ) -> None:
        self._engine, self._codec, self._recorder = engine, codec, recorder
        self._store = engine.store
        self._store.keep(rows)
        self._rows: IntArray | None = rows
        self._num_trees = num_trees
        self._sampling = sampling
        self.tree = tree
        self._scores = np.full(len(rows), np.nan)
        self.counts = np.ones(len(rows), np.int64)
        self._recorder.hold(self, rows)

    def __len__(self) -> int:
        return len(self.branches)

    def __repr__(self) -> str:
        if self._rows is None:
            return "Frontier(released)"
        return f"Frontier({len(self)} branches of {len(np.unique(self.tree))} trees)"

    @property
    def branches(self) -> IntArray:
        """`[n]` int64 branch ids."""
        if self._store.closed:
            raise RuntimeError("the decoder is closed")
        if self._rows is None:
            raise RuntimeError("this frontier was released, pruned or merged; use the one that came back")
        return self._rows

    @property
    def scores(self) -> np.ndarray:
        """`[n]` float64, nan until scored; children start with their parent's."""
        return self._scores

    @scores.setter
    def scores(self, values: Scores) -> None:
        self._scores = np.asarray(values, np.float64)
        if self._scores.shape != (len(self),):
            raise ValueError(f"scores: expected {len(self)} numbers, one per branch, got {values!r}")
        for node, score in zip(self._recorder.nodes(self.branches), self._scores, strict=True):
            if node is not None and not np.isnan(score):
                node.score = float(score)

    @property
    def num_tokens(self) -> IntArray:
        """`[n]` int64 tokens of each branch, prompt included."""
        return self._store.table.num_tokens[self.branches]

    @property
    def num_prompt_tokens(self) -> IntArray:
        """`[n]` int64 tokens of each branch's prompt."""
        return self._store.table.prompt_len[self.branches]

    @property
    def cum_logprobs(self) -> np.ndarray:
        """`[n]` float64 sums of the generated tokens' log-probabilities; forced text counts as 0."""
        return self._store.table.cum_logprob[self.branches]

    @property
    def finished(self) -> np.ndarray:
        """`[n]` bool: the branch has reached its end of sequence; it will not be extended further."""
        return self._store.table.finish[self.branches] == Finish.EOS

    def token_ids(self) -> list[list[int]]:
        """Returns the tokens of each branch after its prompt."""
        return [tokens.tolist() for tokens in self.new_tokens()]

    def new_tokens(self) -> list[IntArray]:
        """Returns the tokens of each branch after its prompt, `[n]` int32 views that are valid until it goes on."""
        table = self._store.table
        return [table.tokens[row, table.prompt_len[row] : table.num_tokens[row]] for row in self.branches]

    def logprobs(self) -> list[np.ndarray]:
        """Returns the log-probabilities of those tokens, `[n]` float32 views; 0 for forced text."""
        table = self._store.table
        return [table.logprobs[row, table.prompt_len[row] : table.num_tokens[row]] for row in self.branches]

    def texts(self) -> list[str]:
        """Returns the text of each branch after its prompt, stop strings of its steps included."""
        return [self._engine.text(int(row), cut=False) for row in self.branches]

    def step_texts(self) -> list[str]:
        """Returns the text of each branch's latest `extend`, without the stop string that ended it."""
        begins = self._store.table.step_begin
        return [self._engine.text(int(row), cut=True, begin=int(begins[row])) for row in self.branches]

    # -- growing --

    def fork(self, width: int | Sequence[int] | IntArray) -> "Frontier":
        """Returns `width` children of every branch (an array: a number for each, 0 too), which share all of its pages.

        Raises:
            TypeError: not integers.
            ValueError: a width is negative, or all are 0.
            OutOfBranches: the decoder's `max_branches` are in use.
        """
        counts = copies_per_branch("width", width, len(self))
        return self._children(np.repeat(np.arange(len(self)), counts))

    def fork_at(self, position: int | Sequence[int] | IntArray) -> "Frontier":
        """Returns one child of every branch that keeps its first `position` tokens, prompt included.

        Raises:
            TypeError: not integers.
            ValueError: a position lies in the prompt or beyond the branch.
        """
        lens = ints_per_branch("position", position, len(self))
        if (lens < self.num_prompt_tokens).any() or (lens > self.num_tokens).any():
            raise ValueError(f"position: expected from {self.num_prompt_tokens} to {self.num_tokens}, got {position}")
        children = self._children(np.arange(len(self)), lens)
        self._recorder.cut_back(children.branches)
        return children

    def skip_children(self, count: int) -> None:
        """Gives later children of every branch the seeds that they would have after `count` more children."""
        self._store.table.num_children[self.branches] += count

    def _children(self, parents: IntArray, lens: IntArray | None = None) -> "Frontier":
        return self._view(self._store.fork(self.branches[parents], lens), parents)

    async def extend(
        self,
        *,
        stop: StopLike = None,
        max_new_tokens: int | Sequence[int] | IntArray | None = None,
        sampling: Sampling | None = None,
        callback: Callable[[int, int, str], None] | None = None,
        fill: bool = False,
    ) -> "Frontier":
        """Generates on every unfinished branch until a stop, in the forwards of all else that decodes on this decoder.

        Args:
            stop: strings or token ids; they stay in the branch, and a later `extend` goes on after them.
            max_new_tokens: for all, or one for each; None goes on to what the model or the pages can hold.
            sampling: in place of the search's own; a seed in it reseeds the branches.
            callback: called as `callback(i, token_id, text)` for the i-th branch with every new token.
            fill: allow one token more than the model has positions and the pages have room for; nothing can follow it.

        Returns:
            this frontier.

        Raises:
            BudgetExhausted: the account that pays for the branches has spent what it may; they keep what they have.
        """
        rows = self.branches
        stops = self._codec.parse_stop(stop)
        chosen = sampling_or(sampling, self._sampling)
        limit = self._codec.new_token_limits(self.num_tokens, max_new_tokens, fill=fill)
        seeds = None
        if sampling is not None and sampling.seed is not None:
            within = np.array([np.count_nonzero(self.tree[:i] == self.tree[i]) for i in range(len(rows))])
            seeds = child_seeds(np.array(sampling.seed), self.num_tokens, within)
        begins = self.num_tokens
        try:
            await self._engine.sample(rows, chosen, stops, limit, callback, seeds=seeds, fill=fill)
        finally:
            if self._rows is not None:
                self._recorder.add_steps(rows, begins, "generated")
        return self

    def append(self, text: ForcedText) -> "Frontier":
        """Appends text or token ids to every branch (a list: one to each), and returns this frontier.

        The tokens are computed with the next work on the branches.

        Raises:
            ValueError: the list's length is not the number of branches, or a branch would be too long.
            RuntimeError: a branch is being extended.
        """
        tokens = self._codec.forced_ids(text, self.num_tokens)
        begins = self.num_tokens
        self._store.append(self.branches, tokens)
        self._recorder.add_steps(self.branches, begins, "given")
        return self

    async def hidden(self) -> Tensor:
        """Computes the final hidden states `[n, hidden_size]` at the branches' last tokens, of the model's dtype.

        Of a finished branch it is the one before its end of sequence.

        Raises:
            ValueError: the model's adapter gives none.
            BudgetExhausted: as `extend`.
        """
        return await self._engine.hidden(self.branches)

    async def logits(self) -> Tensor:
        """Computes the logits `[n, vocab_size]` of the token after each branch, of the model's dtype.

        Raises:
            BudgetExhausted: as `extend`.
        """
        return await self._engine.logits(self.branches)

    # -- choosing --

    def select(self, mask: Sequence[bool] | IntArray) -> "Frontier":
        """Returns the branches of a mask, or of indices (each once), held by the new frontier as well as by this one.

        Raises:
            TypeError: neither booleans nor integers.
            ValueError: not one entry per branch; an index that is none of `0 .. n - 1`, or appears twice.
        """
        which = indices_of(mask, len(self))
        rows = self.branches[which]
        self._store.retain(rows)
        return self._view(rows, which)

    def _with_rows(self, rows: IntArray, tree: IntArray, num_trees: int | None = None) -> "Frontier":
        trees = self._num_trees if num_trees is None else num_trees
        return Frontier(self._engine, self._codec, self._recorder, rows, tree, trees, self._sampling)

    def _view(self, rows: IntArray, parents: IntArray) -> "Frontier":
        child = self._with_rows(rows, self.tree[parents])
        child._scores, child.counts = self._scores[parents], self.counts[parents]
        return child

    async def score(
        self,
        fn: Callable[[list[str]], Scores | Awaitable[Scores]],
        *,
        judge: str | None = None,
        num_samples: int = 1,
        max_new_tokens: int = 16,
        stop: StopLike = None,
        sampling: Sampling | None = None,
    ) -> np.ndarray:
        """Sets `scores` from texts: those of the branches, or the model's answers to a judge prompt about them.

        Args:
            fn: gets a list of texts, returns (or is a coroutine that returns) one number for each.
            judge: appended to `num_samples` side branches of every branch; `fn` reads their answers, and a branch gets
                the mean of its own. They share the branch's pages and are gone afterwards.

        Returns:
            `[n]` float64, the new `scores`.
        """
        positive_int("num_samples", num_samples)
        if judge is None:
            values = await numbers_of(fn, self.texts(), len(self))
        else:
            with self.fork(num_samples) as side:
                side.leave_record()
                side.append(judge)
                await side.extend(stop=stop, max_new_tokens=max_new_tokens, sampling=sampling)
                values = await numbers_of(fn, side.step_texts(), len(side))
            values = values.reshape(len(self), num_samples).mean(axis=1)
        self.scores = values
        return self.scores

    def prune(self, keep: int, per: str = "tree") -> "Frontier":
        """Returns the `keep` best-scored branches, of every tree or of all, and releases the others and this handle.

        Of equal scores the earlier branch is kept. An unscored branch (nan) is below all others. Order stays.
        """
        positive_int("keep", keep)
        one_of("per", per, ("tree", "all"))
        group = self.tree if per == "tree" else np.zeros_like(self.tree)
        return self._hand_on(best_of_each(self.scores, group, keep), "pruned")

    def spread(self, counts: int | Sequence[int] | IntArray) -> "Frontier":
        """Returns `counts` branches in place of each: the branch itself, and copies of it; with 0 it is pruned.

        Releases this handle. Unlike `fork` and a release of the parents, it never holds more branches than result.

        Raises:
            TypeError: not integers.
            ValueError: a number is negative, or all are 0.
            OutOfBranches: as `fork`; all branches are given up then.
        """
        counts = copies_per_branch("counts", counts, len(self))
        with self._hand_on(np.flatnonzero(counts), "pruned") as kept:
            counts = counts[counts > 0]
            parents = np.repeat(np.arange(len(kept)), counts)
            rows, is_copy = kept.branches[parents], np.diff(parents, prepend=-1) == 0
            rows[is_copy] = self._store.fork(rows[is_copy])
            self._store.retain(kept.branches)
            return kept._view(rows, parents)

    def merge(self) -> "Frontier":
        """Merges branches of a tree with the same tokens into the first; `counts` add up. Releases this handle."""
        table = self._store.table
        keys = [
            (int(tree), table.tokens[row, : table.num_tokens[row]].tobytes())
            for tree, row in zip(self.tree, self.branches, strict=True)
        ]
        into = first_equal(keys)
        kept = np.flatnonzero(into == np.arange(len(self)))
        counts = np.bincount(into, weights=self.counts, minlength=len(self))[kept].astype(np.int64)
        merged = self._hand_on(kept, "merged")
        merged.counts = counts
        return merged

    def join(self, *others: "Frontier") -> "Frontier":
        """Joins this frontier and others of the same search, one after another; releases their handles.

        Raises:
            ValueError: a frontier is of another decoder.
        """
        parts = (self, *others)
        if any(part._engine is not self._engine for part in parts):
            raise ValueError("others: expected frontiers of the same decoder")
        rows = np.concatenate([part.branches for part in parts])
        self._store.retain(rows)
        tree, num_trees = np.concatenate([part.tree for part in parts]), max(part._num_trees for part in parts)
        joined = self._with_rows(rows, tree, num_trees)
        joined._scores = np.concatenate([part._scores for part in parts])
        joined.counts = np.concatenate([part.counts for part in parts])
        for part in parts:
            part.release()
        return joined

    def _hand_on(self, which: IntArray, status: str) -> "Frontier":
        chosen = self.select(which)
        if len(chosen) < len(self):
            self._recorder.mark(self.branches, chosen.branches, status)
        self.release()
        return chosen

    # -- the record of the search, if its account keeps one --

    @property
    def nodes(self) -> IntArray:
        """`[n]` int64, the latest step of every branch in the record of its search; -1 = none."""
        return self._store.table.node[self.branches]

    def leave_record(self) -> None:
        """Keeps what these branches and their children do from here on out of the record (a judge's words, say)."""
        self._recorder.leave(self.branches)

    # -- ending --

    async def finish(self) -> list[list[Completion]]:
        """Returns the completions of every tree, in order of trees, and releases the frontier.

        A tree whose branches are all gone has an empty list.
        """
        completions = completions_of(self._engine, self.branches)
        trees: list[list[Completion]] = [[] for _ in range(self._num_trees)]
        for tree, completion in zip(self.tree, completions, strict=True):
            trees[tree].append(completion)
        self.release()
        return trees

    def release(self) -> None:
        """Gives up the branches; those no other frontier holds give their pages back. May be called again."""
        rows, self._rows = self._rows, None
        if rows is not None:
            self._store.release(rows)

    def __enter__(self) -> "Frontier":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        rows = getattr(self, "_rows", None)
        if rows is not None:
            self._store.abandon(rows)
