"""How what branches do gets into the record of their search, where their account keeps one."""

from typing import TYPE_CHECKING

import numpy as np

from treedecode.decoding.generate import text_of
from treedecode.decoding.search_tree import Node
from treedecode.engine.branch_table import Ints

if TYPE_CHECKING:
    from treedecode.engine.engine import Engine


def nodes_of(engine: "Engine", rows: Ints) -> list[Node | None]:
    """The latest step of every branch; None where nothing is recorded."""
    owners = [engine.trees.get(int(account)) for account in engine.table.account[rows]]
    steps = engine.table.node[rows]
    return [None if tree is None or step < 0 else tree.nodes[step] for tree, step in zip(owners, steps, strict=True)]


def record(engine: "Engine", rows: Ints, begins: Ints, kind: str) -> None:
    """What branches have beyond `begins` tokens is a step, "generated" or "given"."""
    table, trees = engine.table, engine.trees
    if not trees or engine.closed:
        return
    for row, begin in zip(rows, begins, strict=True):
        tree, end = trees.get(int(table.account[row])), int(table.num_tokens[row])
        if tree is not None and table.node[row] >= 0 and end > begin:
            text = text_of(engine, int(row), cut=False, begin=int(begin))
            logprob = float(table.logprobs[row, begin:end].sum(dtype=float))
            step = tree.add(int(table.node[row]), kind, text, end - int(begin), logprob)
            tree.nodes[step].ended = int(table.tokens[row, end - 1]) in engine.model.eos_token_ids
            table.node[row] = step


def cut_back(engine: "Engine", rows: Ints) -> None:
    """Branches that have lost their last tokens are at the step that ends there, or at a new one for part of a step."""
    table = engine.table
    for row in rows:
        tree, step = engine.trees.get(int(table.account[row])), int(table.node[row])
        if tree is None or step < 0:
            continue
        path = tree.path(step)
        ends = np.cumsum([tree.nodes[i].num_tokens for i in path])
        last = int(np.searchsorted(ends, table.num_tokens[row]))
        table.node[row] = path[last]
        if ends[last] > table.num_tokens[row]:
            table.node[row] = path[last - 1]
            record(engine, np.array([row]), ends[last - 1 : last], tree.nodes[path[last]].kind)


def mark(nodes: list[Node | None], kept: list[Node | None], fate: str) -> None:
    """Open steps that are not among `kept` have met their fate, "pruned" or "merged"."""
    going = {id(node) for node in kept}
    for node in nodes:
        if node is not None and node.status == "open" and id(node) not in going:
            node.status = fate
