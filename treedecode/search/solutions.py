"""Solution and Result: the outcome of one problem, and of all problems of a run."""

from dataclasses import asdict, dataclass, field
from typing import Any

from treedecode.accounting.ledger import Ledger
from treedecode.accounting.meter import Spending
from treedecode.decoding.search_tree import SearchTree
from treedecode.tasks.base import Problem

# fields of a Solution whose values are JSON
_PLAIN = ("answer", "text", "score", "is_cut", "correct", "seconds", "notes")


@dataclass(frozen=True)
class Solution:
    """The outcome of one problem.

    Attributes:
        problem: the problem.
        answer, text, score: as in `Outcome`.
        is_cut: the budget ended the search, or the limit of new tokens ended the text; this is the best there was.
        correct: the task's verdict on the text, False without an answer; None where it was not asked, or cannot tell.
        spending: the cost of the problem.
        seconds: from the moment its search began; other problems ran meanwhile.
        tree: the record of the search; the answer's last step has the status "answer".
        notes: of the strategy (`Search.notes`).
    """

    problem: Problem
    answer: str | None
    text: str
    score: float | None
    is_cut: bool
    correct: bool | None
    spending: Spending
    seconds: float
    tree: SearchTree
    notes: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns `{"id", "answer", "text", "score", "is_cut", "correct", "seconds", "notes", "spending", "tree"}`."""
        values = {name: getattr(self, name) for name in _PLAIN}
        return {"id": self.problem.id, **values, "spending": asdict(self.spending), "tree": self.tree.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any], problem: Problem) -> "Solution":
        """Reads the solution of `problem` that `to_json` wrote."""
        tree = SearchTree.from_json(data["tree"])
        spending = Spending(**data["spending"])
        return cls(problem=problem, spending=spending, tree=tree, **{name: data[name] for name in _PLAIN})


@dataclass(frozen=True)
class Result:
    """The solutions of a run in the order of its problems, and the ledger of their cost."""

    solutions: list[Solution]
    ledger: Ledger

    @property
    def accuracy(self) -> float | None:
        """Share of correct solutions; None where nothing was graded."""
        graded = [solution.correct for solution in self.solutions if solution.correct is not None]
        return sum(graded) / len(graded) if graded else None
