"""Provenance: verifier, task and model of a run. A gate serves runs with the provenance of its training data alone."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treedecode.tasks.jsonl import Jsonl
from treedecode.verify.scorers import scorer_name

if TYPE_CHECKING:
    from treedecode.decoding.decoder import Decoder
    from treedecode.models.adapter import ModelAdapter
    from treedecode.tasks.base import Task

_TRAIN = "train a gate for it (`treedecode gate train`)"


@dataclass(frozen=True)
class Provenance:
    """The verifier, the task and the model that chains are of.

    Attributes:
        verifier: the `repr` of the scorer, without addresses; "" = there was none.
        task: its name; "jsonl" for problems from any file, as training and use have different files.
        vocab_size, num_layers: of the model.
    """

    verifier: str
    task: str
    vocab_size: int
    num_layers: int

    @classmethod
    def of(cls, decoder: "Decoder", task: "Task", scorer: Any) -> "Provenance":
        """Returns the provenance of a run; `scorer` is None without a verifier."""
        task_name = "jsonl" if isinstance(task, Jsonl) else task.name
        return cls(scorer_name(scorer), task_name, decoder.model.vocab_size, decoder.model.num_layers)

    def require(self, other: "Provenance", gate: Any) -> None:
        """Checks that a run has this provenance, that of a gate.

        Raises:
            ValueError: it has another verifier, task or model; names the gate and both.
        """
        self.require_verifier(other.verifier, gate)
        if other.task != self.task:
            raise ValueError(f"task: {gate!r} was trained on {self.task!r}, and the run is of {other.task!r}; {_TRAIN}")
        self.require_model(other, gate)

    def require_verifier(self, verifier: str, gate: Any) -> None:
        """Checks the verifier alone, given by its `scorer_name`.

        Raises:
            ValueError: it is another.
        """
        if verifier != self.verifier:
            expected, given = self.verifier or "no verifier", verifier or "none"
            raise ValueError(f"verifier: {gate!r} was trained with {expected}, and the run has {given}; {_TRAIN}")

    def require_model(self, model: "ModelAdapter | Provenance", gate: Any) -> None:
        """Checks the model alone.

        Raises:
            ValueError: it has another vocabulary or other layers.
        """
        expected, given = (f"{each.vocab_size} tokens and {each.num_layers} layers" for each in (self, model))
        if given != expected:
            raise ValueError(f"model: {gate!r} was trained on one of {expected}, and the run's has {given}; {_TRAIN}")
