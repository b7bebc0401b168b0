"""`treedecode solve`: runs a strategy on many problems."""

import argparse
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from treedecode.cli.errors import at_least_one, errors_of_argument, folder, run_command, whole_number
from treedecode.cli.problems import add_arguments, examples_of, problems_of, prompts_of, task_of
from treedecode.cli.user_files import is_reference, load_object

if TYPE_CHECKING:
    from treedecode.cli.outputs import Outputs
    from treedecode.decoding.decoder import Decoder
    from treedecode.search.solutions import Result, Solution
    from treedecode.strategies import Strategy

_SAMPLING = ("temperature", "top_p", "top_k")
_JOURNAL = "solutions.jsonl"


def add_parser(commands: Any) -> None:
    """Adds `solve` to the commands of `treedecode`."""
    parser = commands.add_parser(
        "solve",
        help="run a search strategy on problems: accuracy, what it cost, and the trees",
        description="Runs a search strategy on problems. The same command with the same --out goes on where it ended.",
    )
    add = parser.add_argument
    add(
        "--strategy",
        metavar="NAME[:SETTING=VALUE,...]",
        help="'help' lists all with their settings; or FILE.py:NAME[:SETTING=VALUE,...], a strategy of your own",
    )
    add("--model", help="folder, hub name or .gguf file; default: the demo model that comes with the task 'countdown'")
    add_arguments(parser)
    add("--verifier", default="none", metavar="NAME", help="what scores branches; 'help' lists the choices")
    limits = "tokens, flops, kv_bytes, joules, seconds"
    add("--budget", metavar="LIMIT=NUMBER,...", default="", help=f"hard limits of the whole run: {limits}")
    add("--budget-per-problem", metavar="LIMIT=NUMBER,...", default="", help="the same of each problem (no joules)")
    add("--forecast", action="store_true", help="say what the run will probably cost, by a gate, and do not run it")
    add("--gate", metavar="FILE", help="of dynamic_allocation and of --forecast; default: the one beside the model")
    add("--max-new-tokens", type=at_least_one, help="of a solution; by default as the task says (512 for a file)")
    add("--temperature", type=float, help="default, as of --top-p and --top-k: as the model's generation_config says")
    add("--top-p", type=float)
    add("--top-k", type=int)
    add("--seed", type=whole_number, default=0, help="of the problems drawn and of everything sampled")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's")
    add("--device", default="cpu")
    add("--kv-memory", metavar="SIZE", help="for keys and values, such as 2GiB; default: by the machine")
    add("--max-branches", type=at_least_one, metavar="N", default=512, help="decoded at once")
    where = "where solutions, ledger and trees go; what is there already is not solved again"
    add("--out", type=folder, metavar="DIR", help=where)
    add("--trees", type=whole_number, default=0, metavar="N", help="of so many problems the tree as a page and as JSON")
    add("--progress", action=argparse.BooleanOptionalAction, help="a bar; default: on a terminal")
    add("--metrics-port", type=int, metavar="PORT", help="serve Prometheus metrics there while it runs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        the exit status, as of `run_command`.
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
    from treedecode.strategies import STRATEGIES, Strategy

    if is_reference(text):
        own, settings = load_object(text, "strategy")
        if isinstance(own, Strategy) and not settings:
            return own
        if not (isinstance(own, type) and issubclass(own, Strategy)):
            raise ValueError(f"strategy: expected a class of treedecode.strategies.Strategy, or one made, got {own!r}")
        return parse(own, settings, f"strategy {own.__name__}")
    name, _, settings = text.partition(":")
    if name not in STRATEGIES:
        raise ValueError(f"strategy: no {name!r}; there are {', '.join(STRATEGIES)} (--strategy help says more)")
    strategy = STRATEGIES[name]
    defaults = {"gate": gate} if gate is not None and "gate" in settings_of(strategy) else {}
    return parse(strategy, settings, f"strategy {name}", defaults)


def _solve(arguments: argparse.Namespace) -> int:
    # checks that need no model come first, so that a typing error does not cost the loading of one
    from treedecode.accounting.budget import Budget
    from treedecode.cli.models import check_device, decoder_for, gate_file, gate_for, model_for
    from treedecode.cli.outputs import Outputs, forecast_summary, sampling_summary, summary
    from treedecode.cli.settings import parse
    from treedecode.cli.verifiers import verifier_named
    from treedecode.engine.sampling import Sampling
    from treedecode.search.checks import checked_prompts
    from treedecode.search.run_config import RunConfig
    from treedecode.tasks.base import require_gradable

    if arguments.strategy is None:
        raise ValueError("strategy: expected the name of one (--strategy help lists them)")
    task = task_of(arguments)
    model = model_for(arguments.model, task)
    strategy = strategy_named(arguments.strategy, lambda: str(gate_file(arguments.gate, model)))
    if arguments.gate is not None and not arguments.forecast and not hasattr(strategy, "gate"):
        raise ValueError(f"gate: {strategy.name} has none, so expected it with --forecast alone")
    chosen = {name: value for name in _SAMPLING if (value := getattr(arguments, name)) is not None}
    Sampling(**chosen)
    per_problem = parse(Budget, arguments.budget_per_problem, "budget-per-problem", per_problem=None)
    budget = parse(Budget, arguments.budget, "budget", per_problem=None if per_problem == Budget() else per_problem)
    problems = problems_of(arguments, task)
    examples = examples_of(arguments, task, problems)
    if strategy.needs_verifier and arguments.verifier == "none":
        raise ValueError(f"verifier: {strategy.name} scores branches and needs one (--verifier help)")
    if arguments.verifier == "task":
        require_gradable(task, problems, "verifier")
    check_device(arguments.device)
    verifier = verifier_named(arguments.verifier, task, model, arguments.device)
    port = arguments.metrics_port
    if port is not None and not 0 <= port < 2**16:
        raise ValueError(f"metrics-port: expected 0 to {2**16 - 1}, got {port}")
    gate = gate_for(arguments.gate, strategy, model) if arguments.forecast else None
    outputs = Outputs(arguments.out, [problem.id for problem in problems[: arguments.trees]])

    options = {"max_branches": arguments.max_branches, "kv_memory": arguments.kv_memory}
    with decoder_for(model, dtype=arguments.dtype, device=arguments.device, **options) as decoder:
        prompts = prompts_of(arguments, decoder, problems, examples)
        if gate is not None:
            ids = list(checked_prompts(decoder, prompts).values())
            print("\n".join(forecast_summary(decoder, ids, strategy, gate, budget)))
            return 0
        config = getattr(decoder.model.module, "generation_config", None)
        sampling = Sampling.from_generation_config(config, **chosen)
        run = {
            "problems": problems,
            "strategy": strategy,
            "task": task,
            "verifier": verifier,
            "budget": budget,
            "sampling": sampling,
            "seed": arguments.seed,
            "prompt": lambda problem: prompts[problem.id],
        }
        resumed = outputs.num_solved(RunConfig(decoder, **run).num_samples)
        result = _run(decoder, outputs, run, resumed, port=port, progress=arguments.progress)
    print("\n".join(summary(result, strategy, arguments.verifier, resumed[0], task.max_new_tokens, budget)))
    print(sampling_summary(strategy, sampling, chosen, config))
    return 0


def _run(
    decoder: "Decoder",
    outputs: "Outputs",
    run: dict[str, Any],
    resumed: tuple[int, int],
    *,
    port: int | None,
    progress: bool | None,
) -> "Result":
    """Solves the problems with a bar, and with metrics if there is a port for them; writes the ledger.

    Args:
        resumed: as of `Outputs.num_solved`.
    """
    from treedecode.reporting.progress import Progress
    from treedecode.search.solve import solve

    metrics, stop_serving = None, None
    if port is not None:
        from treedecode.reporting.metrics import serve

        with errors_of_argument("metrics-port"):
            metrics, stop_serving = serve(decoder, run["strategy"].name, port)
    num_problems, (num_resumed, num_smaller) = len(run["problems"]), resumed
    smaller = f", {num_smaller} more with fewer samples" if num_smaller else ""
    try:
        with Progress(decoder, num_problems, num_resumed, show=progress) as bar:
            num_solutions = 0

            def report(solution: "Solution") -> None:
                nonlocal num_solutions
                num_solutions += 1
                if num_solutions == 1 and any(resumed):
                    solved = f"{num_resumed} of {num_problems} problems are solved"
                    bar.write(f"resuming: {solved} in {outputs.journal}{smaller}")
                if num_solutions > num_resumed:
                    bar.advance()
                    if metrics is not None:
                        metrics.observe(solution)
                outputs.add(solution)

            result = solve(decoder, **run, journal=outputs.journal, callback=report)
    finally:
        if stop_serving is not None:
            stop_serving()
    outputs.finish(result, num_problems - num_resumed)
    return result
