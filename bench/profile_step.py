"""Prints the time of a decode step of SmolLM2-135M by op: `python -m bench.profile_step [branches]`."""

import dataclasses
import sys
import time

import torch
from torch.profiler import ProfilerActivity, profile

from bench.bench_forward import context_of
from examples.smollm2 import gguf_path
from treedecode import ops
from treedecode.models import TransformersModel, load_pretrained

STEPS = 10


def timed(call) -> tuple[float, float]:
    """Returns seconds by the clock, and of CPU time of all threads, which other load hardly stretches."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - begin, time.process_time() - begin_cpu


def main(num_branches: int) -> None:
    adapter = TransformersModel(load_pretrained(gguf_path(), dtype=torch.bfloat16)[0])
    context = context_of(adapter, num_branches)
    ids, rows = torch.randint(1000, 40000, (num_branches,)), torch.arange(num_branches)
    positions = torch.full((num_branches,), 543)
    sampling = {"temperature": 0.8, "top_k": 0, "top_p": 0.95, "min_p": 0.0, "seed": rows, "position": positions}

    plain = TransformersModel(adapter.model, optimize=False)

    layer_by_layer = dataclasses.replace(context, kv=None)  # or all layers would be one op

    def forward(model, context=context) -> torch.Tensor:
        return model.forward(ids, positions, context, rows)

    def step(context=context) -> None:
        ops.sample(forward(adapter, context), **sampling)

    print(f"\n{num_branches} branches, {torch.get_num_threads()} threads; the least of {STEPS} rounds:\n")
    print("| | ms | CPU ms |\n|---|---|---|")
    cases = {
        "step": step,
        "forward": lambda: forward(adapter),
        "forward, layer by layer": lambda: forward(adapter, layer_by_layer),
        "forward, optimize=False": lambda: forward(plain),
    }
    for name, case in cases.items():
        wall, cpu = zip(*[timed(case) for _ in range(STEPS + 2)], strict=True)
        print(f"| {name} | {min(wall) * 1e3:.1f} | {min(cpu) * 1e3:.1f} |")
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(STEPS):
            step(layer_by_layer)
    events = [e for e in recorded.key_averages() if not e.key.startswith("ProfilerStep")]
    total = sum(e.self_cpu_time_total for e in events)
    print("\n| op | calls a step | ms a step | share |\n|---|---|---|---|")
    for e in sorted(events, key=lambda e: -e.self_cpu_time_total)[:12]:
        took = e.self_cpu_time_total
        print(f"| `{e.key}` | {e.count / STEPS:.0f} | {took / STEPS / 1e3:.2f} | {100 * took / total:.0f}% |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 16)
