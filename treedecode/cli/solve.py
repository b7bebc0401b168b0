"""`treedecode solve`: runs a strategy on many problems."""

import argparse
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from treedecode.cli.errors import at_least_one, errors_of_argument, run_command, whole_number

if TYPE_CHECKING:
    from treedecode.strategies import Strategy
    from treedecode.tasks import Problem, Task

_NUM_SHOTS = 8
_NUM_PROBLEMS = 20
_JOURNAL = "solutions.jsonl"


def add_parser(commands: Any) -> None:
    """Adds `solve` to the commands of `treedecode`."""
    parser = commands.add_parser(
        "solve",
        help="run a search strategy on problems: accuracy, what it cost, and the trees",
        description="Runs a search strategy on problems. The same command with the same --out goes on where it ended.",
    )
    add = parser.add_argument
    add("--strategy", required=True, metavar="NAME[:SETTING=VALUE,...]", help="'help' lists all with their settings")
    add("--model", help="folder, hub name or .gguf file; default: the demo model that comes with the task 'countdown'")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--task", help="countdown (the default), or reasoning_gym:NAME")
    source.add_argument("--data", metavar="FILE.jsonl", help='problems, {"question": ..., "answer": ...} a line')
    add("--num-problems", type=at_least_one, metavar="N", help=f"default: {_NUM_PROBLEMS}, or all of --data")
    add("--split", choices=("train", "validation", "test"), default="test")
    add("--few-shot", metavar="FILE.jsonl", help="worked examples before every problem; default: the task's own")
    add(
        "--shots",
        type=whole_number,
        metavar="N",
        help=f"how many; default: {_NUM_SHOTS} with --few-shot, otherwise none",
    )
    add("--chat", action="store_true", help="put prompts into the tokenizer's chat template")
    add("--verifier", default="none", metavar="NAME", help="what scores branches; 'help' lists the choices")
    limits = "tokens, flops, kv_bytes, joules, seconds"
    add("--budget", metavar="LIMIT=NUMBER,...", default="", help=f"hard limits of the whole run: {limits}")
    add("--budget-per-problem", metavar="LIMIT=NUMBER,...", default="", help="the same of each problem (no joules)")
    add("--forecast", action="store_true", help="say what the run will probably cost, by a gate, and do not run it")
    add("--gate", metavar="FILE", help="of dynamic_allocation and of --forecast; default: the one beside the model")
    add("--max-new-tokens", type=at_least_one, help="of a solution; by default as the task says (512 for a file)")
    add("--temperature", type=float, default=1.0)
    add("--top-p", type=float, default=1.0)
    add("--top-k", type=int, default=0)
    add("--seed", type=whole_number, default=0, help="of the problems drawn and of everything sampled")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's")
    add("--device", default="cpu")
    add("--kv-memory", metavar="SIZE", help="for keys and values, such as 2GiB; default: by the machine")
    add("--max-branches", type=at_least_one, metavar="N", default=512, help="decoded at once")
    add("--out", metavar="DIR", help="where solutions, ledger and trees go; what is there already is not solved again")
    add("--trees", type=whole_number, default=0, metavar="N", help="of so many problems the tree as a page and as JSON")
    add("--progress", action=argparse.BooleanOptionalAction, help="a bar; default: on a terminal")
    add("--metrics-port", type=int, metavar="PORT", help="serve Prometheus metrics there while it runs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        the exit status: 0; 2, with a line on standard error, where an argument is wrong; 130 after Ctrl-C.
    """
    if arguments.strategy == "help" or arguments.verifier == "help":
        print("\n".join(_strategies() if arguments.strategy == "help" else _verifiers()))
        return 0

    def interrupted() -> str:
        if arguments.out is None:
            return "with --out DIR it could go on later"
        where = os.path.join(arguments.out, _JOURNAL)
        return f"the same command goes on from {where}" if os.path.exists(where) else "nothing was written yet"

    return run_command("solve", lambda: _solve(arguments), interrupted)


def _strategies() -> Iterator[str]:
    from treedecode.cli.settings import describe
    from treedecode.strategies import STRATEGIES

    for name, strategy in STRATEGIES.items():
        yield f"{name}{' (needs --verifier)' if strategy.needs_verifier else ''}"
        yield from describe(strategy)


def _verifiers() -> Iterator[str]:
    from treedecode.cli.verifiers import VERIFIERS

    width = max(map(len, VERIFIERS))
    yield from (f"{name:<{width}}  {meaning}" for name, meaning in VERIFIERS.items())


def strategy_named(text: str, gate: "Callable[[], str] | None" = None) -> "Strategy":
    """Makes the strategy that `name:setting=value,...` describes.

    Args:
        gate: gives the file of the gate, for a strategy that has one, where the text names none.

    Raises:
        ValueError: there is no such strategy or setting (the existing ones are listed), or a value is out of range.
        TypeError: a value has the wrong type.
    """
    from treedecode.cli.settings import parse, settings_of
    from treedecode.strategies import STRATEGIES

    name, _, settings = text.partition(":")
    if name not in STRATEGIES:
        raise ValueError(f"strategy: no {name!r}; there are {', '.join(STRATEGIES)} (--strategy help says more)")
    strategy = STRATEGIES[name]
    defaults = {"gate": gate} if gate is not None and "gate" in settings_of(strategy) else {}
    return parse(strategy, settings, f"strategy {name}", defaults)


def _solve(arguments: argparse.Namespace) -> int:
    # checks that need no model come first, so that a typing error does not cost the loading of one
    from treedecode import tasks
    from treedecode.accounting.budget import Budget
    from treedecode.cli.models import check_device, decoder_for, gate_file, gate_for, model_for, task_for
    from treedecode.cli.outputs import Outputs, forecast_summary, summary
    from treedecode.cli.settings import parse
    from treedecode.cli.verifiers import verifier_named
    from treedecode.decoding.decoder import Prompt
    from treedecode.engine.sampling import Sampling
    from treedecode.reporting.progress import Progress
    from treedecode.search.checks import checked_prompts
    from treedecode.search.solve import solve

    limit = arguments.max_new_tokens
    if arguments.data is not None:
        task = task_for(arguments.data, "data", limit)
    else:
        task = task_for(arguments.task or "countdown", max_new_tokens=limit)
    model = model_for(arguments.model, task)
    strategy = strategy_named(arguments.strategy, lambda: str(gate_file(arguments.gate, model)))
    if arguments.gate is not None and not arguments.forecast and not hasattr(strategy, "gate"):
        raise ValueError(f"gate: {strategy.name} has none, so expected it with --forecast alone")
    sampling = Sampling(temperature=arguments.temperature, top_p=arguments.top_p, top_k=arguments.top_k)
    per_problem = parse(Budget, arguments.budget_per_problem, "budget-per-problem", per_problem=None)
    budget = parse(Budget, arguments.budget, "budget", per_problem=None if per_problem == Budget() else per_problem)
    problems = _problems(arguments, task)
    examples = _examples(arguments, task)
    if strategy.needs_verifier and arguments.verifier == "none":
        raise ValueError(f"verifier: {strategy.name} scores branches and needs one (--verifier help)")
    check_device(arguments.device)
    verifier = verifier_named(arguments.verifier, task, model, arguments.device)
    port = arguments.metrics_port
    if port is not None and not 0 <= port < 2**16:
        raise ValueError(f"metrics-port: expected 0 to {2**16 - 1}, got {port}")
    gate = gate_for(arguments.gate, strategy, model) if arguments.forecast else None
    outputs = Outputs(arguments.out, [problem.id for problem in problems[: arguments.trees]])

    options = {"max_branches": arguments.max_branches, "kv_memory": arguments.kv_memory}
    with decoder_for(model, dtype=arguments.dtype, device=arguments.device, **options) as decoder:
        prompts = tasks.format_prompts(problems, examples, tokenizer=decoder.tokenizer, chat=arguments.chat)
        by_id: dict[str, Prompt] = dict(zip([problem.id for problem in problems], prompts, strict=True))
        if gate is not None:
            ids = list(checked_prompts(decoder, by_id).values())
            print("\n".join(forecast_summary(decoder, ids, strategy, gate, budget)))
            return 0
        metrics, stop_serving = None, None
        if port is not None:
            from treedecode.reporting.metrics import serve

            with errors_of_argument("metrics-port"):
                metrics, stop_serving = serve(decoder, strategy.name, port)
        num_resumed = outputs.num_solved
        try:
            with Progress(decoder, len(problems), num_resumed, show=arguments.progress) as progress:
                num_solutions = 0

                def report(solution: Any) -> None:
                    nonlocal num_solutions
                    num_solutions += 1
                    if num_solutions == 1 and num_resumed:
                        progress.write(
                            f"resuming: {num_resumed} of {len(problems)} problems are solved in {outputs.journal}"
                        )
                    if num_solutions > num_resumed:
                        progress.advance()
                        if metrics is not None:
                            metrics.observe(solution)
                    outputs.add(solution)

                result = solve(
                    decoder,
                    problems,
                    strategy=strategy,
                    task=task,
                    verifier=verifier,
                    budget=budget,
                    sampling=sampling,
                    seed=arguments.seed,
                    prompt=lambda problem: by_id[problem.id],
                    journal=outputs.journal,
                    callback=report,
                )
        finally:
            if stop_serving is not None:
                stop_serving()
        outputs.finish(result, len(problems) - num_resumed)
    print("\n".join(summary(result, strategy, arguments.verifier, num_resumed)))
    return 0


def _problems(arguments: argparse.Namespace, task: "Task") -> "list[Problem]":
    from treedecode.cli.models import num_lines

    count = arguments.num_problems
    if count is None and arguments.data is not None:
        count = num_lines(arguments.data)
    count = _NUM_PROBLEMS if count is None else count
    return task.problems(count, split=arguments.split, seed=arguments.seed)


def _examples(arguments: argparse.Namespace, task: "Task") -> list[tuple[str, str]]:
    from treedecode.tasks import few_shot

    source = arguments.few_shot
    if source is not None and not os.path.isfile(source):
        raise ValueError(f"few-shot: expected a file of examples, and there is no {source!r}")
    if source is not None and arguments.data is not None and os.path.samefile(source, arguments.data):
        raise ValueError("few-shot: is the file of the problems itself, whose answers the examples would give away")
    shots = arguments.shots if arguments.shots is not None else _NUM_SHOTS if source is not None else 0
    with errors_of_argument("shots" if source is None else "few-shot", "count"):
        return few_shot(task if source is None else source, shots)
