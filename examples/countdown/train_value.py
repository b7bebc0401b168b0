"""Trains the countdown model's value head on the model's own rollouts, and measures both on held-out problems.

    python -m examples.countdown.train_value --model runs/countdown/model

A state is the text before the next line: the prompt, or the prompt with some lines. Its label tells whether the rollout
that passed through it came out right, so the head learns the success rate of rollouts from there (Monte Carlo, as in
Math-Shepherd, 2312.08935, with the outcome of every visit in place of a mean over several).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

import treedecode as td
from examples.countdown.rollouts import Rollouts, grades, hidden_states, roll_out, sample
from treedecode.allocation.calibration import auc, expected_calibration_error
from treedecode.models import load_pretrained
from treedecode.models.value_head import ValueHead
from treedecode.tasks.countdown import Countdown


def log_loss(values: np.ndarray, success: np.ndarray) -> float:
    clipped = np.clip(values.astype(np.float64), 1e-7, 1 - 1e-7)
    return float(-np.where(success, np.log(clipped), np.log1p(-clipped)).mean())


def fit(
    head: ValueHead, hidden: Tensor, success: Tensor, *, epochs: int, batch_size: int, learning_rate: float
) -> None:
    """Fits the head to `[n]` outcomes of states with `[n, hidden_size]` hidden states."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=0.01)
    total = epochs * -(-len(success) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=total, pct_start=0.1)
    for _ in range(epochs):
        for index in torch.randperm(len(success)).split(batch_size):
            loss = binary_cross_entropy_with_logits(head.logits(hidden[index]), success[index].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def all_hidden_states(model: Any, rollouts: Rollouts) -> Tensor:
    batches = tqdm(torch.arange(len(rollouts.ids)).split(256), desc="hidden states", unit="batch")
    with torch.no_grad():
        return torch.cat([hidden_states(model, rollouts[rows]) for rows in batches])


def measure(values: np.ndarray, rollouts: Rollouts) -> dict[str, float]:
    """Measures `[number of states]` values: over all states, and by number of lines of a state."""
    success = rollouts.state_labels().numpy()
    rows = rollouts.ends.nonzero()[:, 0]
    counts = rollouts.counts[rows].numpy()
    lines = (rollouts.ends.cumsum(dim=1)[rollouts.ends] - 1).numpy()  # the prompt's newline is the first
    figures = {
        "states": len(values),
        "log-loss": log_loss(values, success),
        "log-loss of the mean": log_loss(np.full(len(values), success.mean()), success),
        "ECE": expected_calibration_error(values, success),
        "AUC": auc(values, success),
    }
    for count in np.unique(counts):
        for line in range(count):
            chosen = (counts == count) & (lines == line)
            figures[f"AUC, {count} numbers, {line} lines"] = auc(values[chosen], success[chosen])
    return figures


def pass_at_k(right: np.ndarray, k: int) -> float:
    """Estimates pass@k without bias (2107.03374), as the mean over problems, from `[problems, samples]` grades."""
    n, c = right.shape[1], right.sum(axis=1)
    failing = np.ones(len(c))
    for i in range(k):
        failing *= np.maximum(n - c - i, 0) / (n - i)
    return float(1 - failing.mean())


def report_model(dec: td.Decoder, num_problems: int, branches: int) -> dict[str, Any]:
    """Measures pass@1 and pass@8 on test problems, and the spread of problems, for the model card."""
    problems = Countdown().problems(num_problems, split="test")
    right = grades(problems, sample(dec, problems, branches=branches, seed=0))
    counts = np.array([len(problem.data["numbers"]) for problem in problems])
    share = right.mean(axis=1)
    figures: dict[str, Any] = {"problems": num_problems, "samples": branches}
    for name, rows in (("all", counts > 0), *((f"{count} numbers", counts == count) for count in np.unique(counts))):
        figures[f"pass@1, {name}"] = pass_at_k(right[rows], 1)
        figures[f"pass@8, {name}"] = pass_at_k(right[rows], 8)
        figures[f"deciles of the share right, {name}"] = np.quantile(share[rows], np.arange(1, 10) / 10).tolist()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the trained model; the head is put there")
    parser.add_argument("--problems", type=int, default=8000)
    parser.add_argument("--branches", type=int, default=4)
    parser.add_argument("--eval-problems", type=int, default=300)
    parser.add_argument("--eval-branches", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    task = Countdown()
    model, _ = load_pretrained(arguments.model)
    with td.Decoder.from_pretrained(arguments.model) as dec:
        figures = {"model": report_model(dec, arguments.eval_problems, arguments.eval_branches)}
        print(json.dumps(figures["model"], indent=2), flush=True)
        data = []
        for split, num_problems, branches in (
            ("train", arguments.problems, arguments.branches),
            ("validation", arguments.eval_problems, arguments.eval_branches),
        ):
            problems = task.problems(num_problems, split=split, seed=arguments.seed)
            data.append(roll_out(dec, problems, sample(dec, problems, branches=branches, seed=arguments.seed)))
    head = ValueHead(model.config.hidden_size)
    fit(
        head,
        all_hidden_states(model, data[0]),
        data[0].state_labels(),
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
    )
    with torch.no_grad():
        figures["value head"] = measure(head(all_hidden_states(model, data[1])).numpy(), data[1])
    print(json.dumps(figures["value head"], indent=2))
    head.save(arguments.model / "value_head.safetensors")
    (arguments.model.parent / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
