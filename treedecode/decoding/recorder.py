"""Records what branches do into the search trees of the accounts that pay for them."""

from typing import Protocol
from weakref import WeakSet

import numpy as np

from treedecode.common.arrays import IntArray
from treedecode.decoding.search_tree import Node, SearchTree
from treedecode.engine.engine import Engine


class Releasable(Protocol):
    """A handle on branches that can be given up."""

    def release(self) -> None:
        """Gives up the branches."""


class Recorder:
    """The search trees of accounts, and the handles on branches that end with an account.

    The branch table's column `node` says which step of its tree a branch is at; forks copy it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._trees: dict[int, SearchTree] = {}
        self._handles: dict[int, WeakSet[Releasable]] = {}

    @property
    def num_accounts(self) -> int:
        """Accounts that are being recorded."""
        return len(self._trees)

    def start(self, account: int, tree: SearchTree) -> None:
        """Records into `tree` what branches of `account` do from here on."""
        self._trees[account], self._handles[account] = tree, WeakSet()

    def stop(self, account: int) -> None:
        """Ends the record of an account, and releases the handles that its branches still have."""
        del self._trees[account]
        for handle in list(self._handles.pop(account)):
            handle.release()

    def hold(self, handle: Releasable, rows: IntArray) -> None:
        """Notes a handle on branches of one account, to be released with it."""
        if len(rows) and (handles := self._handles.get(int(self._engine.table.account[rows[0]]))) is not None:
            handles.add(handle)

    def add_prompts(self, account: int, rows: IntArray, texts: list[str]) -> None:
        """Puts the prompts of fresh branches into the account's tree, if it keeps one."""
        if (tree := self._trees.get(account)) is not None:
            for row, text in zip(rows, texts, strict=True):
                self._engine.table.node[row] = tree.add_prompt(text, int(self._engine.table.num_tokens[row]))

    def is_recorded(self, account: int) -> bool:
        """Returns whether the account keeps a tree."""
        return account in self._trees

    def nodes(self, rows: IntArray) -> list[Node | None]:
        """The latest step of every branch; None where nothing is recorded."""
        table = self._engine.table
        trees = [self._trees.get(int(account)) for account in table.account[rows]]
        return [
            None if tree is None or step < 0 else tree.nodes[step]
            for tree, step in zip(trees, table.node[rows], strict=True)
        ]

    def add_steps(self, rows: IntArray, begins: IntArray, kind: str) -> None:
        """Adds a step, "generated" or "given", of what each branch has beyond `begins` tokens."""
        engine, table = self._engine, self._engine.table
        if not self._trees or engine.store.closed:
            return
        for row, begin in zip(rows, begins, strict=True):
            tree, end = self._trees.get(int(table.account[row])), int(table.num_tokens[row])
            if tree is not None and table.node[row] >= 0 and end > begin:
                text = engine.text(int(row), cut=False, begin=int(begin))
                logprob = float(table.logprobs[row, begin:end].sum(dtype=float))
                step = tree.add(int(table.node[row]), kind, text, end - int(begin), logprob)
                tree.nodes[step].ended = int(table.tokens[row, end - 1]) in engine.model.eos_token_ids
                table.node[row] = step

    def cut_back(self, rows: IntArray) -> None:
        """Moves branches that lost their last tokens to the step that ends there, or to a new one for a part."""
        table = self._engine.table
        for row in rows:
            tree, step = self._trees.get(int(table.account[row])), int(table.node[row])
            if tree is None or step < 0:
                continue
            path = tree.path(step)
            ends = np.cumsum([tree.nodes[i].num_tokens for i in path])
            last = int(np.searchsorted(ends, table.num_tokens[row]))
            table.node[row] = path[last]
            if ends[last] > table.num_tokens[row]:
                table.node[row] = path[last - 1]
                self.add_steps(np.array([row]), ends[last - 1 : last], tree.nodes[path[last]].kind)

    def leave(self, rows: IntArray) -> None:
        """Records nothing of what these branches and their children do from here on."""
        self._engine.table.node[rows] = -1

    def mark(self, rows: IntArray, kept: IntArray, status: str) -> None:
        """Gives open steps of `rows` that no branch of `kept` is at a status: "pruned" or "merged"."""
        going = {id(node) for node in self.nodes(kept)}
        for node in self.nodes(rows):
            if node is not None and node.status == "open" and id(node) not in going:
                node.status = status
