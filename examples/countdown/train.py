"""Trains the countdown model that comes with the package, from scratch, on generated problems.

    torchrun --nproc-per-node 2 -m examples.countdown.train --out runs/countdown

One process per core, each on its share of every batch: on CPUs this is faster than one process with threads.

A run that was stopped goes on from its last checkpoint when the same command is given again. Then train the value head
with `python -m examples.countdown.train_value`.
"""

import argparse
import copy
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

import treedecode as td
from examples.countdown.tokenizer import build_tokenizer
from treedecode.tasks.base import Problem
from treedecode.tasks.countdown import Countdown

CHUNK = 100  # steps whose data is drawn at once: a resumed run draws its chunk anew


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
    task: Countdown, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, seed: int, first_step: int
) -> Iterator[list[tuple[Tensor, int]]]:
    """For every step from `first_step` on, and for each count of numbers: `[batch_size, length]` ids, prompt length.

    Texts about the same count have the same length, so nothing is padded.
    """
    chunk = first_step // CHUNK
    while True:
        parts = []
        for count in task.counts:
            stream = task.solved(count, split="train", seed=(seed << 32) + chunk)
            pairs = [next(stream) for _ in range(CHUNK * batch_size)]
            prompt_len = len(tokenizer.encode(pairs[0][0]))
            ids = tokenizer([f"{prompt}{solution}<eos>" for prompt, solution in pairs])["input_ids"]
            parts.append((torch.tensor(ids).view(CHUNK, batch_size, -1), prompt_len))
        for step in range(first_step % CHUNK, CHUNK):
            yield [(ids[step], prompt_len) for ids, prompt_len in parts]
        chunk, first_step = chunk + 1, 0


def loss_sum(model: LlamaForCausalLM, ids: Tensor, prompt_len: int) -> Tensor:
    """Cross entropy of the solutions' tokens, summed; the prompt is given, not learned."""
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, prompt_len - 1 :])
    return cross_entropy(logits.flatten(0, 1).float(), ids[:, prompt_len:].flatten(), reduction="sum")


def pass_at_1(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, problems: list[Problem], task: Countdown, branches: int
) -> dict[str, float]:
    """Share of sampled solutions that are right, by count of numbers and overall."""
    # a copy, since a decoder puts its own attention into the model it is given
    with td.Decoder(copy.deepcopy(model).eval(), tokenizer, kv_memory="128MiB") as dec:
        outs = dec.generate(
            [problem.prompt for problem in problems],
            num_branches=branches,
            sampling=td.Sampling(seed=0),
            max_new_tokens=64,
        )
    shares = defaultdict(list)
    for problem, completions in zip(problems, outs, strict=True):
        right = [task.verify(problem, completion.text) for completion in completions]
        shares[str(problem.group)].append(np.mean(right))
        shares["all"].append(np.mean(right))
    return {name: float(np.mean(values)) for name, values in shares.items()}


def optimizers(model: LlamaForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear from 0 over 100 steps, then constant, then linear to 0 over the last 40%."""
    return min((step + 1) / 100, 1.0, (steps - step) / (0.4 * steps))


def sum_gradients(model: LlamaForCausalLM) -> None:
    """Adds up the gradients of all processes."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
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
    steppers = optimizers(model, arguments.learning_rate)
    schedules = [LambdaLR(stepper, partial(learning_rate_factor, steps=arguments.steps)) for stepper in steppers]
    checkpoint, step = arguments.out / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for part, saved in zip([*steppers, *schedules], state["parts"], strict=True):
            part.load_state_dict(saved)
        step = state["step"]
    if rank == 0:
        print(f"{model.num_parameters() / 1e6:.2f}M parameters, from step {step}", flush=True)
    problems = task.problems(arguments.eval_problems, split="validation")
    stream = batches(task, tokenizer, batch_size=arguments.batch_size, seed=arguments.seed, first_step=step)
    seconds, num_tokens, losses = 0.0, 0, []
    while step < arguments.steps:
        parts = [(ids[rank::world].to(device), prompt_len) for ids, prompt_len in next(stream)]
        begin = time.perf_counter()
        count = sum(arguments.batch_size * (ids.shape[1] - prompt_len) for ids, prompt_len in parts)
        loss = torch.zeros((), device=device)
        for ids, prompt_len in parts:
            with torch.autocast(device.type, torch.bfloat16):
                part_loss = loss_sum(model, ids, prompt_len) / count
            part_loss.backward()
            loss += part_loss.detach()
        if world > 1:
            sum_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in [*steppers, *schedules]:
            part.step()
        for stepper in steppers:
            stepper.zero_grad()
        step += 1
        losses.append(world * loss.item())  # this process's share of the batch stands for all
        num_tokens += sum(arguments.batch_size * ids.shape[1] for ids, _ in parts)
        seconds += time.perf_counter() - begin
        if rank > 0:
            continue
        if step % arguments.log_every == 0:
            print(f"step {step}  loss {np.mean(losses):.4f}  {num_tokens / seconds:.0f} tokens/s", flush=True)
            seconds, num_tokens, losses = 0.0, 0, []
        if step % arguments.eval_every == 0 or step == arguments.steps:
            shares = pass_at_1(model, tokenizer, problems, task, branches=4)
            print(
                "  validation pass@1  " + "  ".join(f"{name}: {share:.3f}" for name, share in shares.items()),
                flush=True,
            )
            states = [part.state_dict() for part in [*steppers, *schedules]]
            torch.save({"model": model.state_dict(), "parts": states, "step": step}, checkpoint)
    if rank == 0:
        model.to(torch.bfloat16).save_pretrained(arguments.out / "model")
        tokenizer.save_pretrained(arguments.out / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
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
