"""`treedecode study`: runs the study and writes its report."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from treedecode.solving import Solution
    from treedecode.study.rows import Conditions, Entry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for study.json, report.md, rows.csv and the plots"
    )
    parser.add_argument("--problems", type=int, default=100, help="problems of the test split (default: 100)")
    parser.add_argument("--latency-problems", type=int, default=6, help="of these, solved one at a time (default: 6)")
    parser.add_argument("--strategies", help="rows to run beside the baseline, separated by commas (default: all)")
    parser.add_argument("--model", help="path or hub name (default: the countdown model that comes with the package)")
    parser.add_argument("--dtype", help="of weights and cache (default: the checkpoint's)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", default="countdown", help="a task's name, or a JSONL file (default: countdown)")
    parser.add_argument(
        "--verifier",
        default="value_head",
        help="value_head[:FILE] (default: the one in the model's folder), task (knows the answers: an oracle), or none",
    )
    parser.add_argument("--gate", help="gate of dynamic allocation (default: the one in the model's folder)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on with the study in --out")


def main(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv: as it was given, for the record.

    Returns:
        0; 1 where a row failed, or the study could not begin.
    """
    try:
        from treedecode.study import plan, plots, report, run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("scipy", "matplotlib"):
            raise
        print(f"treedecode study: needs {error.name}: pip install 'treedecode[study]'", file=sys.stderr)
        return 1
    try:
        model = arguments.model or _shipped_model()
        gate = arguments.gate or str(Path(model) / "gate.safetensors")
        entries = plan.default_plan(gate, follows_instructions=arguments.model is not None)
        if arguments.strategies is not None:
            entries = plan.choose(entries, arguments.strategies.split(","))
        conditions = _conditions(arguments, model)
        with _Progress(len(conditions.problems)) as progress:
            work = run.run_study(
                conditions,
                entries,
                arguments.out,
                resume=arguments.resume,
                command=shlex.join(["treedecode", *argv]),
                model=arguments.model or "the countdown model that comes with the package",
                callback=progress.update,
            )
            study = conditions.decoder.run(work)
    except (ImportError, OSError, ValueError, TypeError) as error:
        print(f"treedecode study: {error}", file=sys.stderr)
        return 1
    drawn = plots.draw(study, arguments.out)
    report.write(study, arguments.out, [path.stem for path in drawn if path.suffix == ".png"])
    print("\n".join(f"* {sentence}" for sentence in report.sentences(study)))
    print(f"\n{arguments.out / 'report.md'}")
    failed = [row for row in study["rows"] if row["error"] is not None]
    for row in failed:
        print(f"treedecode study: {row['label']} failed: {row['error']}", file=sys.stderr)
    return 1 if failed else 0


def _shipped_model() -> str:
    from treedecode.tasks.countdown import model_path

    return str(model_path())


def _conditions(arguments: argparse.Namespace, model: str) -> "Conditions":
    from treedecode import tasks
    from treedecode.decoder import Decoder
    from treedecode.sampling import Sampling
    from treedecode.study.rows import Conditions
    from treedecode.study.serial import one_after_another

    if not 1 <= arguments.latency_problems <= arguments.problems:
        raise ValueError(
            f"--latency-problems: expected from 1 to {arguments.problems}, got {arguments.latency_problems}"
        )
    task = tasks.load(arguments.data)
    decoder = Decoder.from_pretrained(model, dtype=arguments.dtype, device=arguments.device)
    return Conditions(
        decoder=decoder,
        serial=one_after_another(decoder),
        task=task,
        problems=task.problems(arguments.problems, split="test", seed=arguments.seed),
        verifier=_verifier(arguments.verifier, task, model),
        sampling=Sampling(temperature=arguments.temperature),
        seed=arguments.seed,
        latency_problems=arguments.latency_problems,
    )


def _verifier(name: str, task: Any, model: str) -> Any:
    kind, _, path = name.partition(":")
    if kind == "value_head":
        from treedecode.verify.value import Value

        return Value(path or Path(model) / "value_head.safetensors")
    if name not in ("task", "none"):
        raise ValueError(f"--verifier: expected value_head[:FILE], task or none, got {name!r}")
    return None if name == "none" else _Oracle(task)


class _Oracle:
    """The task's own check as a verifier. It knows the answers: what is reached with it is a bound, no result."""

    def __init__(self, task: Any) -> None:
        self._task = task

    def __repr__(self) -> str:  # the same in every process: journals go by it
        return f"Oracle({self._task.name!r})"

    def __call__(self, problem: Any, text: str) -> float:
        return float(self._task.verify(problem, text))


class _Progress:
    """A bar for the row that is running, on standard error."""

    def __init__(self, num_problems: int) -> None:
        self._num_problems = num_problems
        self._bar: Any = None

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def update(self, entry: "Entry", solution: "Solution | None") -> None:
        """One more solution, or the end of the row."""
        if solution is None:
            self._close()
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=self._num_problems, desc=entry.label, unit="problem")
        self._bar.update()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
