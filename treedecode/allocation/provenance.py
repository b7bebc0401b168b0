"""Origin: which verifier, task and model chains are of. A gate knows no others than those it was trained on."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treedecode.tasks.jsonl import Jsonl
from treedecode.verify.scorers import scorer_name

if TYPE_CHECKING:
    from treedecode.decoding.decoder import Decoder
    from treedecode.tasks.base import Task

_TRAIN = "train a gate for it (`treedecode gate train`)"


@dataclass(frozen=True)
class Origin:
    """Where chains come from.

    Attributes:
        verifier: the `repr` of the scorer, without addresses; "" = there was none.
        task: its name; "jsonl" of problems from a file, whichever: training and use have different files.
        vocab_size, num_layers: of the model.
    """

    verifier: str
    task: str
    vocab_size: int
    num_layers: int

    @classmethod
    def of(cls, decoder: "Decoder", task: "Task", scorer: Any) -> "Origin":
        """That of a run; `scorer` is None without a verifier."""
        verifier = scorer_name(scorer)
        name = "jsonl" if isinstance(task, Jsonl) else task.name
        return cls(verifier, name, decoder.model.vocab_size, decoder.model.num_layers)

    def require(self, other: "Origin", gate: Any) -> None:
        """Checks that a run is of this origin, that of a gate.

        Raises:
            ValueError: it has another verifier, task or model; names the gate and both.
        """
        self.require_verifier(other.verifier, gate)
        if other.task != self.task:
            raise ValueError(f"task: {gate!r} was trained on {self.task!r}, and the run is of {other.task!r}; {_TRAIN}")
        self.require_model(other, gate)

    def require_verifier(self, other: str, gate: Any) -> None:
        """The same of a verifier's `scorer_name` alone."""
        if other != self.verifier:
            mine, has = self.verifier or "no verifier", other or "none"
            raise ValueError(f"verifier: {gate!r} was trained with {mine}, and the run has {has}; {_TRAIN}")

    def require_model(self, model: Any, gate: Any) -> None:
        """The same of a decoder's model alone."""
        mine, has = (f"{one.vocab_size} tokens and {one.num_layers} layers" for one in (self, model))
        if has != mine:
            raise ValueError(f"model: {gate!r} was trained on one of {mine}, and the run's has {has}; {_TRAIN}")
