"""What a strategy is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from treedecode.search import Outcome, Search


@dataclass(frozen=True)
class Strategy:
    """A way to spend compute on a problem: settings, and a coroutine that runs once per problem, many side by side.

    Subclasses are frozen dataclasses whose fields are the settings.

    Attributes:
        name: as on the command line.
        needs_verifier: whether it scores branches, and so needs a verifier.
    """

    name: ClassVar[str]
    needs_verifier: ClassVar[bool] = False

    @property
    def num_branches(self) -> int:
        """The most branches that one problem holds at once."""
        raise NotImplementedError

    def share(self, problems: Sequence[str], notes: Mapping[str, Mapping[str, Any]]) -> Any:
        """What the problems of a run have in common, made once for it: `Search.shared`. None = nothing.

        Args:
            problems: ids of all problems, in order.
            notes: `Search.notes` of those that an earlier process solved, by id; they are not solved again.
        """
        return None

    async def solve(self, search: Search) -> Outcome:
        """The strategy's answer to one problem.

        What it still holds when it ends, or is ended (by an error, a spent budget, a cancelled call), is released.
        """
        raise NotImplementedError


def require(name: str, value: Any, kind: type, low: float, high: float = float("inf")) -> None:
    """Checks a setting.

    Raises:
        TypeError: not a number of the kind. ValueError: outside of [low, high].
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (kind is int and isinstance(value, float)):
        raise TypeError(f"{name}: expected {'a number' if kind is float else 'an int'}, got {value!r}")
    if not low <= value <= high:
        bounds = f">= {low:g}" if high == float("inf") else f"from {low:g} to {high:g}"
        raise ValueError(f"{name}: expected a number {bounds}, got {value}")
