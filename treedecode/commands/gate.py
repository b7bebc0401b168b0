"""`treedecode gate train` and `treedecode gate eval`: a learned gate for dynamic allocation, and how good it is."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treedecode.commands.models import model_for
from treedecode.commands.verifiers import verifier_named

if TYPE_CHECKING:
    from treedecode.gate_training.rollouts import Rollouts

_SPLITS = ("train", "validation", "test")


def add_parser(commands: Any) -> None:
    """Adds `gate` to the commands of `treedecode`."""
    parser = commands.add_parser("gate", help="train the gate of dynamic allocation, or judge one")
    verbs = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    train = verbs.add_parser("train", help="sample problems and fit a gate to how they come out")
    train.add_argument(
        "--menu", nargs="*", default=[], metavar="DEPTH,WIDTH,KEEP", type=_menu, help="tree searches it may advise"
    )
    train.add_argument("--max-chains", type=int, default=16, help="it looks at a problem after up to so many chains")
    train.set_defaults(run=lambda arguments: _run(arguments, _train))
    judge = verbs.add_parser("eval", help="judge a gate on held-out problems, and audit what groups of them get")
    judge.add_argument("gate", type=Path, help="file of the gate")
    judge.add_argument("--budgets", nargs="+", type=float, default=[3.0, 4.0, 6.0, 8.0], help="in chains per problem")
    judge.add_argument("--floors", nargs="+", type=int, default=[0, 3], help="minimum chains per problem to compare")
    judge.add_argument("--probes", type=int, default=1, help="chains before its first look")
    judge.add_argument("--wave", type=int, default=1, help="chains between two looks")
    judge.add_argument("--repeats", type=int, default=8, help="random orders of the chains")
    judge.set_defaults(run=lambda arguments: _run(arguments, _eval))
    for verb, split, count in ((train, "train", 1500), (judge, "test", 300)):
        add = verb.add_argument
        add("--out", type=Path, required=True, metavar="DIR", help="where rollouts and results go")
        add("--rollouts", type=Path, metavar="FILE.npz", help="of an earlier call, in place of sampling anew")
        add("--model", help="folder, hub name or .gguf file; default: the demo model of the task 'countdown'")
        add("--task", default="countdown", help="name of a task, or a .jsonl file of problems")
        add("--verifier", default="none", metavar="NAME", help="as of `treedecode solve`")
        add("--split", choices=_SPLITS, default=split)
        add("--num-problems", type=int, default=count, metavar="N", help=f"default: {count}")
        add("--chains", type=int, default=24, metavar="N", help="sampled per problem; default: 24")
        add("--temperature", type=float, default=1.0)
        # a value head knows the training problems of seed 0
        add("--seed", type=int, default=1 if verb is train else 0, help="of the problems and of what is sampled")


def _menu(text: str) -> tuple[int, int, int]:
    depth, width, keep = (int(part) for part in text.split(","))
    return depth, width, keep


def _run(arguments: argparse.Namespace, verb: Any) -> int:
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        verb(arguments)
    except (ImportError, OSError, TypeError, ValueError) as error:
        if getattr(error, "__notes__", None):  # of a problem's search, not of an argument
            raise
        print(f"treedecode gate: error: {error}", file=sys.stderr)
        return 2
    return 0


def _rollouts(arguments: argparse.Namespace, menu: list[tuple[int, int, int]]) -> "Rollouts":
    """The rollouts that were asked for. New ones are kept, and go on where an earlier process was ended."""
    from treedecode.decoder import Decoder
    from treedecode.gate_training.rollouts import Rollouts, collect
    from treedecode.sampling import Sampling
    from treedecode.tasks import load

    if arguments.rollouts is not None:
        return Rollouts.load(arguments.rollouts)
    task = load(arguments.task)
    model = model_for(arguments.model, task)
    with Decoder.from_pretrained(model) as decoder:
        data = collect(
            decoder,
            task.problems(arguments.num_problems, split=arguments.split, seed=arguments.seed),
            task=task,
            num_chains=arguments.chains,
            verifier=verifier_named(arguments.verifier, task, model),
            menu=menu,
            sampling=Sampling(temperature=arguments.temperature),
            seed=arguments.seed,
            journal=str(arguments.out / f"rollouts-{arguments.split}.jsonl"),
        )
    data.save(arguments.out / f"rollouts-{arguments.split}.npz")
    return data


def _train(arguments: argparse.Namespace) -> None:
    from treedecode.gate_training.fit import train

    gate, figures = train(
        _rollouts(arguments, arguments.menu),
        max_chains=arguments.max_chains,
        seed=arguments.seed,
    )
    gate.save(arguments.out / "gate.safetensors")
    (arguments.out / "gate.json").write_text(json.dumps({"gate": repr(gate), **figures}, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def _eval(arguments: argparse.Namespace) -> None:
    from treedecode.gate.model import Gate
    from treedecode.gate_training.evaluate import evaluate, table

    gate = Gate.load(arguments.gate)
    report = evaluate(
        gate,
        _rollouts(arguments, [entry.shape for entry in gate.config.menu]),
        budgets=arguments.budgets,
        probes=arguments.probes,
        wave=arguments.wave,
        floors=arguments.floors,
        repeats=arguments.repeats,
        seed=arguments.seed,
    )
    (arguments.out / "gate_report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))
