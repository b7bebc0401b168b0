"""Writes the files and the summary of `treedecode solve`."""

import hashlib
import json
import os
import urllib.parse
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treedecode.allocation.forecast import forecasts
from treedecode.cli.errors import check_folder
from treedecode.reporting.tree_page import in_bytes, solution_page, strict
from treedecode.search.journal import samples_of_solutions

if TYPE_CHECKING:
    from treedecode.accounting.budget import Budget
    from treedecode.allocation.gate import Gate
    from treedecode.common.arrays import IntArray
    from treedecode.decoding.decoder import Decoder
    from treedecode.engine.sampling import Sampling
    from treedecode.search.solutions import Result, Solution
    from treedecode.strategies import Strategy

_LONGEST_NAME = 150  # bytes; file systems allow 255
_MAX_LISTED = 8  # problems that the summary names
_STUDY = ("study.json", "plan.json")  # of `treedecode study`, which writes the plan as it begins


class Outputs:
    """The folder of a run: `solutions.jsonl`, `ledger.json`, and `trees/ID.html` and `.json`.

    Args:
        folder: None = nothing is written.
        trees: ids of the problems whose trees are written.

    Raises:
        ValueError: there are trees to write and no folder, or the folder is something else, or a study's.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, trees: Collection[str] = ()) -> None:
        if folder is None and trees:
            raise ValueError("trees: expected --out DIR to write them to")
        self._folder, self._trees = None if folder is None else Path(folder), frozenset(trees)
        if self._folder is not None:
            check_folder(self._folder)
            if any((self._folder / name).exists() for name in _STUDY):
                raise ValueError(f"out: {self._folder} holds a study; choose another folder")

    @property
    def journal(self) -> str | None:
        """The file of solutions."""
        return None if self._folder is None else str(self._folder / "solutions.jsonl")

    def num_solved(self, num_samples: int | None) -> tuple[int, int]:
        """Counts the solutions of earlier processes. The journal checks that they are of the same run.

        Args:
            num_samples: of this run's solutions; None = they have no such number.

        Returns:
            those that stand, and those that have another number of samples.
        """
        samples = [] if self.journal is None else samples_of_solutions(self.journal)
        num_standing = len(samples) if num_samples is None else samples.count(num_samples)
        return num_standing, len(samples) - num_standing

    def add(self, solution: "Solution") -> None:
        """Writes a solution's tree, if it is one of those asked for."""
        if self._folder is None or solution.problem.id not in self._trees:
            return
        path = self._folder / "trees" / file_name(solution.problem.id)
        _write(path.with_name(f"{path.name}.html"), solution_page(solution))
        _write(path.with_name(f"{path.name}.json"), _json(solution.tree.to_json()))

    def finish(self, result: "Result", num_new: int) -> None:
        """Writes the ledger; a call that solved nothing leaves the ledger of the one that did."""
        if self._folder is not None:
            path = self._folder / "ledger.json"
            if num_new or not path.exists():
                _write(path, _json(result.ledger.to_json()))


def file_name(problem_id: str) -> str:
    """Returns a file name for a problem, without an ending; ids with any characters have different names."""
    name = urllib.parse.quote(problem_id, safe=" ")
    if len(name) <= _LONGEST_NAME:
        return name
    digest = hashlib.blake2b(problem_id.encode(), digest_size=8).hexdigest()
    return f"{name[:_LONGEST_NAME]}-{digest}"


def _json(value: Any) -> str:
    return json.dumps(strict(value), indent=1, allow_nan=False) + "\n"


def _write(path: Path, text: str) -> None:
    """Writes a file, which is there as a whole or not at all, also when the process ends meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def sampling_summary(strategy: "Strategy", sampling: "Sampling", chosen: Collection[str], config: Any) -> str:
    """Returns the line that says how branches sampled, and who said so.

    Args:
        chosen: settings that the command line gave.
        config: the model's `generation_config`; None = it has none.
    """
    own = getattr(strategy, "sampling", None)
    used = sampling if own is None else own
    shown = f"temperature={used.temperature:g}, top_p={used.top_p:g}, top_k={used.top_k}"
    for name, off in (("min_p", 0), ("repetition_penalty", 1)):
        value = getattr(used, name)
        shown += f", {name}={value:g}" if value != off else ""
    if own is not None:
        source = " (of the strategy)"
    elif len(chosen) == 3:
        source = ""
    elif getattr(config, "do_sample", False):
        source = " (of the model's generation_config)"
    else:
        source = " (the model's generation_config names none)"
    return _line("sampling", shown + source)


def summary(
    result: "Result",
    strategy: "Strategy",
    verifier: str,
    num_resumed: int = 0,
    max_new_tokens: int | None = None,
    budget: "Budget | None" = None,
) -> Iterator[str]:
    """Iterates over the lines of a summary: the results of a run, its cost, and its cost without sharing.

    Args:
        verifier: as it was named on the command line.
        num_resumed: solutions taken from the journal.
        max_new_tokens: the limit of a solution; budget: the run's. They say what solutions may have been cut by.
    """
    solutions, ledger, total = result.solutions, result.ledger, result.ledger.total
    count = len(solutions)
    yield _line("strategy", repr(strategy))
    is_oracle = verifier == "task"
    yield _line("verifier", "the task's own check, an ORACLE that knows the answers" if is_oracle else verifier)
    yield _line("problems", f"{count}" + (f", {num_resumed} of them solved before" if num_resumed else ""))
    if result.accuracy is not None:
        graded = [bool(solution.correct) for solution in solutions if solution.correct is not None]
        note = " (with an oracle: a bound, not a result)" if is_oracle else ""
        note += f"; {count - len(graded)} have no reference answer" if len(graded) < count else ""
        yield _line("accuracy", f"{result.accuracy:.1%}, {sum(graded)} of {len(graded)}{note}")
    else:
        yield _line("accuracy", "not graded: the problems have no reference answers")
    num_answered = sum(solution.answer is not None for solution in solutions)
    cut_ids = [solution.problem.id for solution in solutions if solution.is_cut]
    limits = [f"at {max_new_tokens} tokens (--max-new-tokens)"] if max_new_tokens is not None else []
    if budget is not None and any(value is not None for value in asdict(budget).values()):
        limits.append("by the budget")
    yield _line("answers", f"{num_answered} of {count}")
    if cut_ids:
        more = f" and {len(cut_ids) - _MAX_LISTED} more" if len(cut_ids) > _MAX_LISTED else ""
        shown = ", ".join(cut_ids[:_MAX_LISTED])
        yield _line("cut short", f"{len(cut_ids)} of {count} {' or '.join(limits)}: {shown}{more}")
    lost = f" ({ledger.lost_tokens:,} of them by searches that were interrupted)" if ledger.lost_tokens else ""
    yield _line("tokens", f"{total.generated_tokens:,} generated{lost}, {total.prompt_tokens:,} of prompts")
    share = f"the decoder worked in {ledger.occupancy:.0%} of them"
    yield _line("seconds", f"{ledger.total_seconds:.1f}, {ledger.total_seconds / count:.2f} a problem; {share}")
    source = ledger.energy_source
    yield _line("energy", source if ledger.joules is None else f"{ledger.joules:,.1f} J ({source})")
    yield ""
    yield f"{'':<12}{'with sharing':>16}{'without':>16}{'ratio':>9}"
    for name, shared, copied, form in (
        ("forwards", total.forwards, total.branch_forwards, "{:,}".format),
        ("KV read", total.kv_bytes, total.kv_bytes_copied, in_bytes),
        ("peak pages", total.peak_pages, total.peak_pages_copied, "{:,}".format),
    ):
        ratio = f"{copied / shared:.1f}x" if shared else "-"
        yield f"{name:<12}{form(shared):>16}{form(copied):>16}{ratio:>9}"


def forecast_summary(
    decoder: "Decoder", prompts: "Sequence[IntArray]", strategy: "Strategy", gate: "Gate", budget: "Budget"
) -> Iterator[str]:
    """Iterates over the lines of a forecast: quantiles of a run's cost, and the odds that its budget is enough.

    Args:
        prompts: token ids `[n]` of each, checked.
    """
    levels = (0.05, 0.25, 0.5, 0.75, 0.95)
    yield f"{'forecast':<12}" + "".join(f"{level:>16.0%}" for level in levels)
    forms: dict[str, Callable[[float], str]] = {"tokens": "{:,.0f}".format, "kv_bytes": in_bytes}
    strategy_unit = getattr(strategy, "unit", None)
    units = list(forms) if strategy_unit is None else [strategy_unit]
    for forecast in forecasts(decoder, prompts, strategy=strategy, gate=gate, units=units):
        form = forms[forecast.unit]
        yield f"{forecast.unit:<12}" + "".join(f"{form(value):>16}" for value in forecast.quantile(levels))
        limit = getattr(budget, forecast.unit)
        if limit is not None:
            yield _line("", f"a budget of {form(limit)} is enough with probability {forecast.within(limit):.2f}")


def _line(name: str, text: str) -> str:
    return f"{name:<12}{text}"
