"""`treedecode gate train` and `treedecode gate eval`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from treedecode.decoder import Decoder
from treedecode.gate.model import Gate
from treedecode.gate_training.evaluate import evaluate, table
from treedecode.gate_training.fit import train
from treedecode.gate_training.rollouts import Rollouts, collect
from treedecode.sampling import Sampling
from treedecode.tasks import load
from treedecode.verify.value import Value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `treedecode gate`."""
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    fit = commands.add_parser("train", help="sample training problems and fit a gate to how they come out")
    fit.add_argument("--menu", nargs="*", default=[], metavar="DEPTH,WIDTH,KEEP", type=_menu, help="tree searches")
    fit.add_argument("--max-chains", type=int, default=16, help="the gate looks after up to so many chains")
    fit.set_defaults(run=lambda arguments: _run(arguments, _train), split="train")
    judge = commands.add_parser("eval", help="judge a gate on held-out problems, and audit what groups of them get")
    judge.add_argument("gate", type=Path, help="file of the gate")
    judge.add_argument("--budgets", nargs="+", type=float, default=[3.0, 4.0, 6.0, 8.0], help="in chains per problem")
    judge.add_argument("--floors", nargs="+", type=int, default=[0, 3], help="minimum chains per problem to compare")
    judge.add_argument("--probes", type=int, default=2)
    judge.add_argument("--wave", type=int, default=4)
    judge.add_argument("--repeats", type=int, default=8, help="random orders of the chains")
    judge.set_defaults(run=lambda arguments: _run(arguments, _eval), split="test")
    for command in (fit, judge):
        command.add_argument("--out", type=Path, required=True, help="folder for what comes out")
        command.add_argument("--rollouts", type=Path, help="npz of an earlier call, in place of sampling anew")
        command.add_argument("--model", help="folder, hub id or GGUF file")
        command.add_argument("--task", default="countdown", help="name of a task, or a JSONL file of problems")
        command.add_argument("--value-head", type=Path, help="file of a value head that scores branches")
        command.add_argument("--problems", type=int, default=300 if command is judge else 1500)
        command.add_argument("--chains", type=int, default=24, help="sampled per problem")
        command.add_argument("--temperature", type=float, default=1.0)
        command.add_argument("--seed", type=int, default=0)


def _menu(text: str) -> tuple[int, int, int]:
    depth, width, keep = (int(part) for part in text.split(","))
    return depth, width, keep


def _run(arguments: argparse.Namespace, command: Any) -> int:
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        command(arguments)
    except (ValueError, TypeError, OSError) as error:
        print(f"treedecode gate: {error}", file=sys.stderr)
        return 2
    return 0


def _rollouts(arguments: argparse.Namespace, menu: list[tuple[int, int, int]]) -> Rollouts:
    """The rollouts that were asked for; new ones are kept in `out`, and go on where an earlier process was ended."""
    if arguments.rollouts is not None:
        return Rollouts.load(arguments.rollouts)
    if arguments.model is None:
        raise ValueError("--model: is needed to sample rollouts; or give --rollouts")
    task = load(arguments.task)
    with Decoder.from_pretrained(arguments.model) as decoder:
        data = collect(
            decoder,
            task.problems(arguments.problems, split=arguments.split, seed=arguments.seed),
            task=task,
            num_chains=arguments.chains,
            verifier=None if arguments.value_head is None else Value(arguments.value_head),
            menu=menu,
            sampling=Sampling(temperature=arguments.temperature),
            seed=arguments.seed,
            journal=str(arguments.out / f"rollouts-{arguments.split}.jsonl"),
        )
    data.save(arguments.out / f"rollouts-{arguments.split}.npz")
    return data


def _train(arguments: argparse.Namespace) -> None:
    data = _rollouts(arguments, arguments.menu)
    gate, figures = train(
        data, max_chains=arguments.max_chains, task=arguments.task, model=arguments.model or "", seed=arguments.seed
    )
    gate.save(arguments.out / "gate.safetensors")
    (arguments.out / "gate.json").write_text(json.dumps({"gate": repr(gate), **figures}, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def _eval(arguments: argparse.Namespace) -> None:
    gate = Gate.load(arguments.gate)
    menu = [(entry.depth, entry.width, entry.keep) for entry in gate.config.menu]
    report = evaluate(
        gate,
        _rollouts(arguments, menu),
        budgets=arguments.budgets,
        probes=arguments.probes,
        wave=arguments.wave,
        floors=arguments.floors,
        repeats=arguments.repeats,
        seed=arguments.seed,
    )
    (arguments.out / "gate_report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))
