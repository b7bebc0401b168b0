"""`treedecode gate train` and `treedecode gate eval`: fits a gate for dynamic allocation, and evaluates one."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treedecode.cli.errors import at_least_one, check_folder, errors_of_argument, folder, run_command, whole_number
from treedecode.cli.models import decoder_for, gate_file, model_for, num_lines, task_for
from treedecode.cli.verifiers import verifier_named

if TYPE_CHECKING:
    from treedecode.allocation.gate import Gate
    from treedecode.allocation.training.rollouts import Rollouts

_SPLITS = ("train", "validation", "test")


def add_parser(commands: Any) -> None:
    """Adds `gate` to the commands of `treedecode`."""
    parser = commands.add_parser("gate", help="train the gate of dynamic allocation, or judge one")
    verbs = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    train = verbs.add_parser("train", help="sample problems and fit a gate to how they come out")
    train.add_argument(
        "--menu", nargs="*", default=[], metavar="DEPTH,WIDTH,KEEP", type=_menu, help="tree searches it may advise"
    )
    train.add_argument("--max-chains", type=at_least_one, default=16, help="it looks after up to so many")
    train.set_defaults(run=lambda arguments: _run(arguments, _train))
    judge = verbs.add_parser("eval", help="judge a gate on held-out problems, and audit what groups of them get")
    judge.add_argument("gate", nargs="?", type=Path, help="file of the gate; default: the one beside the model")
    judge.add_argument("--budgets", nargs="+", type=float, default=[3.0, 4.0, 6.0, 8.0], help="in chains per problem")
    judge.add_argument("--floors", nargs="+", type=whole_number, default=[0, 3], help="minimum chains to compare")
    judge.add_argument("--probes", type=at_least_one, default=1, help="chains before its first look")
    judge.add_argument("--wave", type=at_least_one, default=1, help="chains between two looks")
    judge.add_argument("--repeats", type=at_least_one, default=8, help="random orders of the chains")
    judge.set_defaults(run=lambda arguments: _run(arguments, _eval))
    for verb, split, count in ((train, "train", 1500), (judge, "test", 300)):
        add = verb.add_argument
        add("--out", type=folder, required=True, metavar="DIR", help="where rollouts and results go")
        add("--rollouts", type=Path, metavar="FILE.npz", help="of an earlier call, in place of sampling anew")
        add("--model", help="folder, hub name or .gguf file; default: the demo model of the task 'countdown'")
        add("--task", default="countdown", help="name of a task, or a .jsonl file of problems")
        add("--verifier", default="none", metavar="NAME", help="as of `treedecode solve`")
        add("--split", choices=_SPLITS, help=f"default: {split}; a file has the split test alone")
        add("--num-problems", type=at_least_one, metavar="N", help=f"default: {count}, or all of a file")
        add("--chains", type=at_least_one, default=24, metavar="N", help="sampled per problem; default: 24")
        add("--temperature", type=float, default=1.0)
        # a value head knows the training problems of seed 0
        add("--seed", type=whole_number, default=1 if verb is train else 0, help="of the problems and of all sampling")
        verb.set_defaults(default_problems=(split, count))


def _menu(text: str) -> tuple[int, int, int]:
    try:
        depth, width, keep = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected DEPTH,WIDTH,KEEP, three numbers, got {text!r}") from None
    return depth, width, keep


def _run(arguments: argparse.Namespace, verb: Any) -> int:
    def interrupted() -> str:
        has_begun = any(arguments.out.glob("rollouts-*.jsonl"))
        return f"the same command goes on from {arguments.out}" if has_begun else "nothing was written yet"

    return run_command("gate", lambda: verb(arguments), interrupted)


def _rollouts(
    arguments: argparse.Namespace,
    menu: list[tuple[int, int, int]],
    check_sizes: "Callable[[int, int], None]",
    gate: "Gate | None" = None,
) -> "Rollouts":
    """Loads rollouts, or samples new ones and saves them; sampling goes on where an earlier process ended.

    Args:
        check_sizes: raises where a number of problems, with a number of chains each, is not enough.
        gate: the gate that they evaluate; None = they train one.
    """
    from treedecode.allocation.training.rollouts import Rollouts, collect, tree_searches_of
    from treedecode.engine.sampling import Sampling
    from treedecode.strategies import TreeOfThoughts
    from treedecode.tasks.base import require_gradable
    from treedecode.verify.scorers import scorer_name, scorer_of

    check_folder(arguments.out)
    if arguments.rollouts is not None:
        with errors_of_argument("rollouts", "path"):
            rollouts = Rollouts.load(arguments.rollouts)
        check_sizes(len(rollouts), rollouts.num_chains)
        return rollouts
    task = task_for(arguments.task)
    split, count = arguments.default_problems
    if arguments.task.endswith(".jsonl"):
        split, count = "test", num_lines(arguments.task)
    split, count = arguments.split or split, arguments.num_problems or count
    check_sizes(count, arguments.chains)
    problems = task.problems(count, split=split, seed=arguments.seed)
    require_gradable(task, problems, "task")
    sampling = Sampling(temperature=arguments.temperature)
    model = model_for(arguments.model, task)
    verifier = verifier_named(arguments.verifier, task, model)
    scorer = scorer_of(verifier)
    if gate is not None:
        gate.config.provenance.require_verifier(scorer_name(scorer), gate)
    tree_searches_of(menu, TreeOfThoughts, verifier)  # reports a mistake before the model is loaded
    with decoder_for(model) as decoder:
        if gate is not None:
            gate.check(decoder, task, scorer)
        rollouts = collect(
            decoder,
            problems,
            task=task,
            num_chains=arguments.chains,
            tree_search=TreeOfThoughts,
            verifier=verifier,
            menu=menu,
            sampling=sampling,
            seed=arguments.seed,
            journal=str(arguments.out / f"rollouts-{split}.jsonl"),
        )
    rollouts.save(arguments.out / f"rollouts-{split}.npz")
    return rollouts


def _train(arguments: argparse.Namespace) -> int:
    from treedecode.allocation.training.fit import check_sizes, train

    sizes = {"max_chains": arguments.max_chains}
    gate, figures = train(
        _rollouts(arguments, arguments.menu, lambda problems, chains: check_sizes(problems, chains, **sizes)),
        **sizes,
        seed=arguments.seed,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    gate.save(arguments.out / "gate.safetensors")
    (arguments.out / "gate.json").write_text(json.dumps({"gate": repr(gate), **figures}, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from treedecode.allocation.gate import Gate
    from treedecode.allocation.training.evaluate import check_policy, evaluate, table

    if arguments.gate is None:
        arguments.gate = gate_file(None, model_for(arguments.model, task_for(arguments.task)))
    with errors_of_argument("gate", "path"):
        gate = Gate.load(arguments.gate)
    policy = {"budgets": arguments.budgets, "probes": arguments.probes, "wave": arguments.wave}
    rollouts = _rollouts(
        arguments,
        [entry.shape for entry in gate.config.menu],
        lambda problems, chains: check_policy(gate, chains, **policy),
        gate,
    )
    report = evaluate(gate, rollouts, **policy, floors=arguments.floors, repeats=arguments.repeats, seed=arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "gate_report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))
    return 0
