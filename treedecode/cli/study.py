"""`treedecode study`: runs every strategy on the same problems, and writes a report."""

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from treedecode.cli.errors import at_least_one, check_folder, errors_of_argument, folder, run_command, whole_number
from treedecode.cli.models import check_device, decoder_for, gate_file, gate_path, model_for, num_lines, task_for

if TYPE_CHECKING:
    from treedecode.search.solutions import Solution
    from treedecode.study.rows import Conditions, Entry
    from treedecode.tasks import Task

_NUM_PROBLEMS, _NUM_LATENCY_PROBLEMS = 100, 6


def add_parser(commands: Any) -> None:
    """Adds `study` to the commands of `treedecode`."""
    parser = commands.add_parser(
        "study",
        help="accuracy against compute: every strategy on the same problems, and a report",
        description="Runs every strategy on the same problems, and writes study.json, report.md, rows.csv and plots.",
    )
    add = parser.add_argument
    add("--out", type=folder, required=True, metavar="DIR", help="where all of it goes")
    add("--resume", action="store_true", help="go on with the study that --out holds")
    count = f"default: {_NUM_PROBLEMS}, or all of a file"
    add("--problems", type=at_least_one, metavar="N", help=f"of the test split ({count})")
    of_these = f"of these, solved one at a time too (default: {_NUM_LATENCY_PROBLEMS}, or all)"
    add("--latency-problems", type=at_least_one, metavar="N", help=of_these)
    add("--strategies", metavar="NAME,...", help="rows beside the baseline, by key or strategy (default: all)")
    add("--model", help="folder, hub name or .gguf file; default: the demo model that comes with the task 'countdown'")
    add("--data", default="countdown", help="a task by name, or FILE.jsonl (default: countdown)")
    add("--few-shot", metavar="FILE.jsonl", help="worked examples before every problem")
    add("--shots", type=whole_number, default=8, metavar="N", help="how many of them (default: 8)")
    add("--chat", action="store_true", help="put prompts into the tokenizer's chat template")
    add(
        "--verifier", default="value_head", metavar="NAME", help="as of `solve` (default: value_head, beside the model)"
    )
    add("--gate", metavar="FILE", help="of dynamic allocation (default: gate.safetensors beside the model)")
    add("--temperature", type=float, default=1.0)
    add("--seed", type=whole_number, default=0, help="of the problems drawn and of everything sampled")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's")
    add("--device", default="cpu")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        the exit status: 0; 1 where a row failed; 2, with a line on standard error, where an argument is wrong; 130
        after Ctrl-C.
    """

    def interrupted() -> str:
        if (arguments.out / "plan.json").exists():
            return f"with --resume it goes on from {arguments.out}"
        return "nothing was written yet"

    return run_command("study", lambda: _study(arguments), interrupted)


def _study(arguments: argparse.Namespace) -> int:
    for package in ("scipy", "matplotlib"):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError:
            raise ModuleNotFoundError(f"needs {package}: pip install 'treedecode[study]'", name=package) from None
    from treedecode.study import plan, plots, report
    from treedecode.study.run import run_study
    from treedecode.verify.scorers import scorer_of

    check_folder(arguments.out)
    task = task_for(arguments.data, "data")
    model = model_for(arguments.model, task)
    gate = str(gate_path(model))
    named_gate = None
    if arguments.gate is not None:  # a gate that does not fit fails its row, but the whole command where it was named
        from treedecode.allocation.gate import Gate

        gate = str(gate_file(arguments.gate, model))
        with errors_of_argument("gate", "path"):
            named_gate = Gate.load(gate)
    entries = plan.default_plan(gate, follows_instructions=arguments.model is not None)
    if arguments.strategies is not None:
        entries = plan.choose(entries, arguments.strategies.split(","))
    conditions = conditions_of(arguments, task, model)
    if named_gate is not None and any("gate" in entry.settings for entry in entries):
        named_gate.check(conditions.decoder, task, scorer_of(conditions.verifier))
    with _Progress(len(conditions.problems)) as progress:
        work = run_study(
            conditions,
            entries,
            arguments.out,
            resume=arguments.resume,
            command=shlex.join(["treedecode", *arguments.argv]),
            model=arguments.model or "the countdown model that comes with the package",
            callback=progress.update,
        )
        study = conditions.decoder.run(work)
    drawn = plots.draw(study, arguments.out)
    report.write(study, arguments.out, [path.stem for path in drawn if path.suffix == ".png"])
    print("\n".join(f"* {sentence}" for sentence in report.sentences(study)))
    print(f"\n{arguments.out / 'report.md'}")
    failed = [row for row in study["rows"] if row["error"] is not None]
    for row in failed:
        print(f"treedecode study: {row['label']} failed: {row['error']}", file=sys.stderr)
    return 1 if failed else 0


def conditions_of(arguments: argparse.Namespace, task: "Task", model: str) -> "Conditions":
    """Loads the problems, the model and the verifier that the arguments name.

    Raises:
        OSError: a file that an argument names cannot be read.
        TypeError: an argument is wrong.
        ValueError: an argument is wrong, or what it names cannot be loaded.
    """
    from treedecode import tasks
    from treedecode.cli.verifiers import verifier_named
    from treedecode.decoding.decoder import Prompt
    from treedecode.engine.sampling import Sampling
    from treedecode.study.rows import Conditions
    from treedecode.study.unshared_baseline import UnsharedDecoder
    from treedecode.tasks.base import require_gradable
    from treedecode.verify.value import Value

    count = num_lines(arguments.data) if arguments.data.endswith(".jsonl") else _NUM_PROBLEMS
    count = arguments.problems or count
    latency_problems = arguments.latency_problems or min(count, _NUM_LATENCY_PROBLEMS)
    if latency_problems > count:
        raise ValueError(f"latency-problems: expected at most {count}, the problems there are, got {latency_problems}")
    problems = task.problems(count, split="test", seed=arguments.seed)
    require_gradable(task, problems, "data")
    examples = []
    if arguments.few_shot is not None:
        with errors_of_argument("few-shot", "count"):
            examples = tasks.few_shot(arguments.few_shot, arguments.shots)
    sampling = Sampling(temperature=arguments.temperature)
    check_device(arguments.device)
    verifier = verifier_named(arguments.verifier, task, model, arguments.device)
    decoder = decoder_for(model, dtype=arguments.dtype, device=arguments.device)
    if isinstance(verifier, Value):
        verifier.check(decoder.model)
    prompts: Sequence[Prompt]
    prompts = tasks.format_prompts(problems, examples, tokenizer=decoder.tokenizer, chat=arguments.chat)
    by_id: dict[str, Prompt] = dict(zip([problem.id for problem in problems], prompts, strict=True))
    return Conditions(
        decoder=decoder,
        unshared=UnsharedDecoder.like(decoder),
        task=task,
        problems=problems,
        verifier=verifier,
        sampling=sampling,
        seed=arguments.seed,
        latency_problems=latency_problems,
        prompt=lambda problem: by_id[problem.id],
    )


class _Progress:
    """Shows a bar for the row that is running, on standard error."""

    def __init__(self, num_problems: int) -> None:
        self._num_problems = num_problems
        self._bar: Any = None

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def update(self, entry: "Entry", solution: "Solution | None") -> None:
        """Counts a solution; None ends the row."""
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
