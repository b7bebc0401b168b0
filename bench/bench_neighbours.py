"""Times decode steps beside a process that keeps one CPU busy, with all threads and with one.

The peer of a step beside the neighbour is the same step with one thread beside it: threads that wait for each other are
slower than that as soon as one of them has no CPU. The rounds of all cases alternate, in one process.
"""

import statistics
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext

import pytest
import torch

import treedecode as td
from examples.smollm2 import gguf_path
from treedecode.tasks.countdown import model_path

PROMPT_LEN, NEW_TOKENS, ROUNDS = 64, 24, 9
SAMPLING = td.Sampling(temperature=1.0, seed=0, ignore_eos=True)


@contextmanager
def busy_neighbour():
    """Runs a process that computes for ever, with the machine's usual priority."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def threads(count: int):
    """Sets the number of threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def step_seconds(decoder, num_branches: int) -> float:
    """Returns the seconds of one decode step: those of a generation without those of its prompt and first token."""

    def seconds(new_tokens: int) -> float:
        begin = time.perf_counter()
        decoder.generate([prompt], num_branches=num_branches, sampling=SAMPLING, max_new_tokens=new_tokens)
        return time.perf_counter() - begin

    prompt = torch.randint(1, 20, (PROMPT_LEN,)).tolist()
    seconds(1)  # keeps the prompt's pages, so that the two calls below differ in steps alone
    return (seconds(NEW_TOKENS) - seconds(1)) / (NEW_TOKENS - 1)


@pytest.mark.parametrize(("name", "num_branches"), [("countdown-3.9M", 64), ("SmolLM2-135M", 16)])
def bench_step_beside_a_busy_process(benchmark, peaks, name, num_branches):
    path = gguf_path() if name == "SmolLM2-135M" else model_path()
    if torch.get_num_threads() < 2:
        pytest.skip("needs two threads")
    seconds = defaultdict(list)
    with td.Decoder.from_pretrained(path, dtype=torch.bfloat16) as decoder:
        step_seconds(decoder, num_branches)
        assert decoder.model.optimizations[-1] == "all layers and the head in one op"
        weights = sum(p.numel() for p in decoder.model.module.parameters())

        def one_round():
            for neighbours in ("quiet", "busy"):
                with busy_neighbour() if neighbours == "busy" else nullcontext():
                    for count in (torch.get_num_threads(), 1):
                        with threads(count):
                            seconds[neighbours, count > 1].append(step_seconds(decoder, num_branches))

        benchmark.pedantic(one_round, rounds=ROUNDS)
    medians = {case: statistics.median(values) for case, values in seconds.items()}
    busy = medians["busy", True]
    num_bytes, num_flops = 2.0 * weights, 2.0 * weights * num_branches  # the bf16 weights are read once
    roofline = peaks.roofline_seconds(num_bytes, num_flops, torch.bfloat16)
    benchmark.extra_info.update(
        bytes=num_bytes,
        flops=num_flops,
        dtype="bfloat16",
        roofline_seconds=roofline,
        roofline_percent=100 * roofline / busy,
        median_seconds=busy,
        min_seconds=min(seconds["busy", True]),
        quiet_seconds=medians["quiet", True],
        quiet_one_thread_seconds=medians["quiet", False],
        over_quiet=busy / medians["quiet", True],
        peers={
            "one thread": {
                "median_seconds": medians["busy", False],
                "min_seconds": min(seconds["busy", False]),
                "ratio": medians["busy", False] / busy,
            }
        },
    )
