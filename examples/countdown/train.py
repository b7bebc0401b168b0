"""Trains the countdown model that comes with the package, from scratch, on generated problems.

    torchrun --nproc-per-node 2 -m examples.countdown.train --out runs/countdown

One process per core, each on its share of every batch: on CPUs this is faster than one process with threads. A run that
was stopped goes on from its last checkpoint when the same command is given again.

The model learns random derivations of solved problems. In the last `--value-steps`, in which the learning rate falls to
0, it also learns to predict the outcome of its own rollouts. Next-token prediction alone does not need to know whether
the remaining numbers still lead to the target, so without this phase the hidden states would not tell. The value head
of the phase is thrown away; the one that ships is trained on rollouts of the finished model, by
`python -m examples.countdown.train_value`.
"""

import argparse
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from examples.countdown.rollouts import Rollouts, grades, hidden_states, make_decoder, roll_out, sample
from examples.countdown.tokenizer import build_tokenizer
from treedecode.models.value_head import ValueHead
from treedecode.tasks.base import Problem
from treedecode.tasks.countdown import Countdown

CHUNK = 100  # steps whose data is drawn at once; a resumed run draws its chunk anew
BRANCHES = 8  # rollouts per problem
MISSES = 0.25  # share of texts in the last phase that do not come to the target


def build_model(tokenizer: PreTrainedTokenizerBase, hidden_size: int, num_layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
        max_position_embeddings=256,
        rope_theta=1000.0,  # texts have about sixty tokens
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # for texts this short its backward is the faster one on CPUs
    return model


def batches(
    task: Countdown,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    seed: int,
    first_step: int,
    last_phase: int,
) -> Iterator[list[tuple[Tensor, int]]]:
    """Yields the batches of every step from `first_step` on: (`[batch_size, length]` ids, prompt length) by count of
    numbers.

    Texts about the same count have the same length, so nothing is padded.
    """
    chunk = first_step // CHUNK
    while True:
        parts = []
        for count in task.counts:
            misses = MISSES if chunk * CHUNK >= last_phase else 0.0
            stream = task.solved(count, split="train", seed=(seed << 32) + chunk, misses=misses)
            pairs = [next(stream) for _ in range(CHUNK * batch_size)]
            prompt_len = len(tokenizer.encode(pairs[0][0]))
            ids = tokenizer([f"{prompt}{solution}<eos>" for prompt, solution in pairs])["input_ids"]
            parts.append((torch.tensor(ids).view(CHUNK, batch_size, -1), prompt_len))
        for step in range(first_step % CHUNK, CHUNK):
            yield [(ids[step], prompt_len) for ids, prompt_len in parts]
        chunk, first_step = chunk + 1, 0


def loss_sum(model: LlamaForCausalLM, ids: Tensor, prompt_len: int) -> Tensor:
    """Sums the cross entropy of the solutions' tokens; the prompt is given, not learned."""
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, prompt_len - 1 :])
    return cross_entropy(logits.flatten(0, 1).float(), ids[:, prompt_len:].flatten(), reduction="sum")


def value_batches(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, task: Countdown, *, batch_size: int, seed: int
) -> Iterator[Rollouts]:
    """Yields `CHUNK` batches of rollouts of the present model on training problems."""
    problems = task.problems(CHUNK * batch_size // BRANCHES, split="train", seed=seed)
    with make_decoder(model, tokenizer) as dec:
        rollouts = roll_out(dec, problems, sample(dec, problems, branches=BRANCHES, seed=seed))
    for rows in torch.randperm(len(rollouts.ids)).split(batch_size):
        yield rollouts[rows]


def value_loss(model: LlamaForCausalLM, head: ValueHead, rollouts: Rollouts) -> Tensor:
    """Computes the mean cross entropy of the rollouts' outcomes, over the states they passed through."""
    logits = head.logits(hidden_states(model, rollouts))
    return binary_cross_entropy_with_logits(logits, rollouts.state_labels().float())


def pass_at_1(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, problems: list[Problem], branches: int
) -> dict[str, float]:
    """Measures the share of sampled solutions that are right, overall and by count of numbers."""
    with make_decoder(model, tokenizer) as dec:
        share = grades(problems, sample(dec, problems, branches=branches, seed=0)).mean(axis=1)
    groups = np.array([problem.group for problem in problems])
    return {"all": share.mean()} | {group: share[groups == group].mean() for group in dict.fromkeys(groups)}


def optimizers(model: LlamaForCausalLM, head: ValueHead, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Makes Muon for the matrices of the layers, AdamW for embeddings, norms and the value head."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    adamw = partial(torch.optim.AdamW, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw(others), adamw(head.parameters())]


def learning_rate_factor(step: int, steps: int, value_steps: int) -> float:
    """Rises linearly from 0 over 100 steps, is constant, and falls linearly to 0 over the last `value_steps`."""
    return min((step + 1) / 100, 1.0, (steps - step) / value_steps)


def sum_gradients(parameters: list[Tensor]) -> None:
    """Adds up the gradients of all processes."""
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(summed.view_as(grad))


def train(arguments: argparse.Namespace) -> None:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(arguments.seed)
    device = torch.device(arguments.device)
    task, tokenizer = Countdown(), build_tokenizer()
    model = build_model(tokenizer, arguments.hidden_size, arguments.layers).to(device)
    head = ValueHead(arguments.hidden_size).to(device)
    parameters = [*model.parameters(), *head.parameters()]
    factor = partial(learning_rate_factor, steps=arguments.steps, value_steps=arguments.value_steps)
    steppers = optimizers(model, head, arguments.learning_rate)
    schedules = [LambdaLR(stepper, factor) for stepper in steppers]
    saved = {"model": model, "head": head} | {f"part {i}": part for i, part in enumerate([*steppers, *schedules])}
    checkpoint, step = arguments.out / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        step = state.pop("step")
        for name, part in saved.items():
            part.load_state_dict(state[name])
    if rank == 0:
        print(f"{model.num_parameters() / 1e6:.2f}M parameters, from step {step}", flush=True)
    problems = task.problems(arguments.eval_problems, split="validation")
    last_phase = arguments.steps - arguments.value_steps
    stream = batches(
        task,
        tokenizer,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        first_step=step,
        last_phase=last_phase,
    )
    value_stream: Iterator[Rollouts] = iter(())
    begin, num_tokens, losses, value_losses = time.perf_counter(), 0, [], []
    while step < arguments.steps:
        parts = [(ids[rank::world].to(device), prompt_len) for ids, prompt_len in next(stream)]
        count = sum(arguments.batch_size * (ids.shape[1] - prompt_len) for ids, prompt_len in parts)
        loss = torch.zeros((), device=device)
        for ids, prompt_len in parts:
            with torch.autocast(device.type, torch.bfloat16):
                part_loss = loss_sum(model, ids, prompt_len) / count
            part_loss.backward()
            loss += part_loss.detach()
        losses.append(world * loss.item())  # this process's share of the batch stands for all
        num_tokens += sum(arguments.batch_size * ids.shape[1] for ids, _ in parts)
        if step >= last_phase:
            rollouts = next(value_stream, None)
            if rollouts is None:
                seed = (arguments.seed << 32) + (1 << 31) + step * world + rank  # none of `batches`
                value_stream = value_batches(
                    model, tokenizer, task, batch_size=arguments.value_batch_size // world, seed=seed
                )
                rollouts = next(value_stream)
            with torch.autocast(device.type, torch.bfloat16):
                loss = value_loss(model, head, rollouts.to(device))
            (arguments.value_weight / world * loss).backward()
            value_losses.append(loss.item())
        if world > 1:
            sum_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for part in [*steppers, *schedules]:
            part.step()
        for stepper in steppers:
            stepper.zero_grad()
        step += 1
        if rank > 0:
            continue
        if step % arguments.log_every == 0:
            value = f"  value loss {np.mean(value_losses):.4f}" if value_losses else ""
            speed = num_tokens / (time.perf_counter() - begin)
            print(f"step {step}  loss {np.mean(losses):.4f}{value}  {speed:.0f} tokens/s", flush=True)
            begin, num_tokens, losses, value_losses = time.perf_counter(), 0, [], []
        if step % arguments.eval_every == 0 or step == arguments.steps:
            shares = pass_at_1(model, tokenizer, problems, branches=4)
            print(
                "  validation pass@1: " + ", ".join(f"{name} {share:.3f}" for name, share in shares.items()), flush=True
            )
            torch.save({name: part.state_dict() for name, part in saved.items()} | {"step": step}, checkpoint)
    if rank == 0:
        model.to(torch.bfloat16).save_pretrained(arguments.out / "model")
        tokenizer.save_pretrained(arguments.out / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--value-steps", type=int, default=1200)
    parser.add_argument("--value-batch-size", type=int, default=96, help="rollouts per step")
    parser.add_argument("--value-weight", type=float, default=0.2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--eval-every", type=int, default=200)
    parser.add_argument("--eval-problems", type=int, default=90)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        torch.set_num_threads(1)
    train(arguments)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
