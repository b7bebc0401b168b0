"""Runs a study: the rows of a plan one after another, each written before the next, then curves, laws and criteria."""

import contextlib
import hashlib
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from treedecode.allocation.gate import Gate
from treedecode.common.machine import version
from treedecode.search.solutions import Solution
from treedecode.study import analysis
from treedecode.study.acceptance import judge_criteria
from treedecode.study.machine import BackgroundLoad, machine
from treedecode.study.pool import ChainPool, PooledChains, pooled_chains
from treedecode.study.rows import Conditions, Entry, Measured, heading, measure, row

SCHEMA = "treedecode.study/2"
PACKAGES = ("treedecode", "torch", "transformers", "numpy", "scipy", "matplotlib")

Json = dict[str, Any]
Callback = Callable[[Entry, Solution | None], None]


async def run_study(
    conditions: Conditions,
    plan: Sequence[Entry],
    out: Path,
    *,
    resume: bool = False,
    command: str = "",
    model: str = "",
    num_resamples: int = 300,
    callback: Callback = lambda entry, solution: None,
) -> Json:
    """Runs a plan and writes `out/study.json`.

    A row whose strategy fails says so in its `error`; the others go on.

    Args:
        plan: the first entry is the baseline, which all multiples are of. An entry with `ChainPool` gives the curves of
            self-consistency, best-of-n and coverage.
        out: a new or empty folder; with `resume` that of a study with the same plan, which then goes on.
        command, model: for the record.
        num_resamples: of the problems, for intervals of laws.
        callback: called with the entry and each solution as it comes; with None when the entry is done.

    Returns:
        the content of `study.json`: `{"schema", "rows", "laws", "bars", ...}`.

    Raises:
        ValueError: the plan has no entries, or two with one key; the folder is in use, or is another study's.
        Exception: of the baseline, without which there is nothing to compare with.
    """
    if not plan or len({entry.key for entry in plan}) < len(plan):
        raise ValueError("plan: expected entries, the baseline first, each with a key of its own")
    folder = _claim(out, describe(conditions, plan, model), resume)
    background = BackgroundLoad()
    baseline, chain_tokens = None, 0.0
    rows: list[Json] = []
    pools: list[PooledChains] = []
    pool_tokens = 0.0
    # the first forward does work that is done once, and is no part of the baseline's time
    await conditions.solve(conditions.decoder, conditions.problems[:1], plan[0].build(1.0, 1))
    for entry in plan:
        try:
            measured = await measure(conditions, entry, folder, chain_tokens, partial(callback, entry))
        except Exception as error:
            if baseline is None:
                raise
            rows.append({**heading(entry), "error": _error_text(error)})
        else:
            if baseline is None:
                baseline, chain_tokens = measured, measured.tokens
            if isinstance(measured.strategy, ChainPool):
                pools, pool_tokens = _pools(conditions, measured), measured.tokens
            rows.append(row(measured, baseline))
        callback(entry, None)
    curves = analysis.row_curves(rows)
    if pools:
        curves = {**analysis.curves_of(pools, chain_tokens, pool_tokens, conditions.seed), **curves}
    laws = {
        name: analysis.laws_of(curve, num_resamples=num_resamples, seed=conditions.seed)
        for name, curve in curves.items()
    }
    if pools:
        laws["coverage"] = analysis.coverage_of(pools, num_resamples=num_resamples, seed=conditions.seed)
    study = {
        "schema": SCHEMA,
        "command": command,
        **describe(conditions, plan, model),
        "commit": commit(),
        "machine": {**machine(conditions.decoder), "other_cores": background.mean_cores},
        "versions": {package: version(package) for package in PACKAGES},
        "baseline": plan[0].key,
        "rows": rows,
        "laws": laws,
        "bars": judge_criteria(rows, curves),
    }
    (out / "study.json").write_text(json.dumps(study, indent=1) + "\n")
    return study


def _with_gate_name(settings: Mapping[str, Any]) -> Json:
    """Replaces a gate's file by the gate's name: the file may be moved, or be another gate's later."""
    described = dict(settings)
    with contextlib.suppress(OSError, ValueError):  # the row that needs the gate reports the error
        if isinstance(described.get("gate"), str):
            described["gate"] = repr(Gate.load(described["gate"]))
    return described


def describe(conditions: Conditions, plan: Sequence[Entry], model: str) -> Json:
    """Describes everything that the numbers of a study depend on, but for the machine."""
    return {
        "model": model,
        "dtype": str(conditions.decoder.model.dtype).removeprefix("torch."),
        "task": conditions.task.name,
        "problems": [problem.id for problem in conditions.problems],
        "prompts": hashlib.blake2b(repr(conditions.prompts).encode(), digest_size=8).hexdigest(),
        "verifier": None if conditions.verifier is None else repr(conditions.verifier),
        "sampling": repr(conditions.sampling),
        "seed": conditions.seed,
        "latency_problems": conditions.latency_problems,
        "plan": [
            {**heading(entry), "settings": _with_gate_name(entry.settings), "chains": dict(entry.chains)}
            for entry in plan
        ],
    }


def _claim(out: Path, description: Mapping[str, Any], resume: bool) -> Path:
    """Returns the folder of the rows' files, after making sure that it is this study's.

    Raises:
        ValueError: the folder is in use, or is another study's.
    """
    folder, plan = out / "rows", out / "plan.json"
    description = json.loads(json.dumps(description))
    if plan.exists():
        if not resume:
            raise ValueError(f"out: {out} holds a study; go on with it (resume), or choose another folder")
        recorded = json.loads(plan.read_text())
        differences = sorted(
            key for key in recorded.keys() | description.keys() if recorded.get(key) != description.get(key)
        )
        if differences:
            raise ValueError(f"out: {out} holds another study, which differs in {', '.join(differences)}")
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"out: {out} is not empty and holds no study; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    plan.write_text(json.dumps(description, indent=1) + "\n")
    return folder


def _pools(conditions: Conditions, measured: Measured) -> list[PooledChains]:
    return [pooled_chains(solution.tree, conditions.task, solution.problem) for solution in measured.solutions]


def _error_text(error: Exception) -> str:
    return "".join(traceback.format_exception_only(error)).strip()


def commit() -> str | None:
    """Returns the commit of the source checkout that this runs from; None where it is no checkout."""
    git = Path(__file__).parents[2] / ".git"
    try:
        if git.is_file():  # of a linked worktree: "gitdir: ..."
            git = Path(git.read_text().partition(":")[2].strip())
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        common = git / (git / "commondir").read_text().strip() if (git / "commondir").exists() else git
        if (common / name).exists():
            return (common / name).read_text().strip()
        lines = (common / "packed-refs").read_text().splitlines()
        return next(line.split()[0] for line in lines if line.endswith(f" {name}"))
    except (OSError, StopIteration):
        return None
