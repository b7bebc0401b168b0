"""SearchTree: the record of a search, a node per step of a branch."""

from dataclasses import asdict, dataclass, replace
from typing import Any

SCHEMA = "treedecode.search_tree/1"

# open: nothing yet, or given up with its search. pruned: dropped for a better one. merged: put into an equal one.
# final: came to an answer. answer: its answer was taken.
STATUSES = ("open", "pruned", "merged", "final", "answer")
KINDS = ("prompt", "generated", "given")


@dataclass
class Node:
    """A step of a branch.

    Attributes:
        parent: index of the node it goes on from; -1 = none, a prompt.
        kind: "prompt", "generated", or "given" (text that the search put there).
        text: of this step alone, with the stop string that ended it.
        num_tokens: of this step; they are in the cache once, whatever the number of branches below.
        logprob: of its generated tokens, in all, nats.
        score: the latest one given to a branch that ends here; None = none.
        status: one of `STATUSES`.
        ended: its last token is an end of sequence, which leaves no text.
    """

    parent: int
    kind: str
    text: str
    num_tokens: int
    logprob: float = 0.0
    score: float | None = None
    status: str = "open"
    ended: bool = False


class SearchTree:
    """The nodes of one problem's search, parents before children."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._prompts: list[int] = []  # of an earlier search, which this one goes on from

    def resumed(self) -> "SearchTree":
        """Returns a copy for a later search that goes on from the same prompts, without its answer."""
        tree = SearchTree()
        tree.nodes = [replace(node, status="open" if node.status == "answer" else node.status) for node in self.nodes]
        tree._prompts = [i for i, node in enumerate(self.nodes) if node.kind == "prompt"]
        return tree

    def add_prompt(self, text: str, num_tokens: int) -> int:
        """Adds a prompt and returns its index, or that of the same prompt of an earlier search."""
        for prompt in self._prompts:
            if (self.nodes[prompt].text, self.nodes[prompt].num_tokens) == (text, num_tokens):
                self._prompts.remove(prompt)
                return prompt
        return self.add(-1, "prompt", text, num_tokens)

    def add(self, parent: int, kind: str, text: str, num_tokens: int, logprob: float = 0.0) -> int:
        """Adds a node and returns its index."""
        self.nodes.append(Node(parent, kind, text, num_tokens, logprob))
        return len(self.nodes) - 1

    def path(self, node: int) -> list[int]:
        """Returns the indices from the prompt down to `node`."""
        path = []
        while node >= 0:
            path.append(node)
            node = self.nodes[node].parent
        return path[::-1]

    def text(self, node: int) -> str:
        """Returns all text after the prompt, down to `node`."""
        return "".join(self.nodes[i].text for i in self.path(node) if self.nodes[i].kind != "prompt")

    def leaves(self) -> list[int]:
        """Returns the nodes without children."""
        parents = {node.parent for node in self.nodes}
        return [i for i in range(len(self.nodes)) if i not in parents]

    def to_json(self) -> dict[str, Any]:
        """Converts the tree to `{"schema", "nodes"}`; a node has the attributes of `Node`."""
        return {"schema": SCHEMA, "nodes": [asdict(node) for node in self.nodes]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "SearchTree":
        """Reads the tree that `to_json` wrote.

        Raises:
            ValueError: another schema.
        """
        if data.get("schema") != SCHEMA:
            raise ValueError(f"data: expected the schema {SCHEMA}, got {data.get('schema')!r}")
        tree = cls()
        tree.nodes = [Node(**node) for node in data["nodes"]]
        return tree
