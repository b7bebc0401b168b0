"""Times decoding end to end at the shape of Llama-3-8B with random weights: `python -m bench.gpu.decode [--smoke]`.

Compares a step of 16 and of 64 branches with one of a single branch, and 64 continuations of one prompt with
`generate(num_return_sequences=64)` of Transformers over as many tokens.
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import treedecode as td
from bench.gpu import harness, timing
from treedecode import ops
from treedecode.models import TransformersModel

NAME = "treedecode"
ROUNDS = 3
BRANCHES = (1, 16, 64)


@dataclass(frozen=True)
class Shape:
    config: dict[str, Any]
    prompt_len: int = 4096
    new_tokens: int = 128
    kv_memory: str = "8GiB"
    prefill_tokens: int = 4096


LLAMA_3_8B = Shape(
    {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
    }
)
SMOKE = Shape(
    {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
    },
    40,
    6,
    "1MiB",
    16,
)


def make_model(shape: Shape, device: torch.device) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(**shape.config, rope_theta=500000.0, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.to(device).eval()


def seconds(function: Callable[[], object], device: torch.device) -> float:
    timing.synchronize(device)
    begin = time.perf_counter()
    function()
    timing.synchronize(device)
    return time.perf_counter() - begin


class Ours:
    """A decoder that samples from prompts it has not seen before."""

    def __init__(self, adapter: TransformersModel, shape: Shape) -> None:
        self.shape, self.device, self._num_prompts = shape, adapter.device, 0
        self.decoder = td.Decoder(
            adapter, kv_memory=shape.kv_memory, max_branches=max(BRANCHES), prefill_tokens=shape.prefill_tokens
        )

    def tokens(self, num_branches: int, new_tokens: int) -> list[list[int]]:
        return self._tokens(num_branches, new_tokens, self._next_prompt())

    def is_repeatable(self, num_branches: int, new_tokens: int) -> bool:
        """Returns whether two runs from an empty cache give the same tokens."""
        prompt, runs = self._next_prompt(), []
        for _ in range(2):
            self.decoder.reset()
            runs.append(self._tokens(num_branches, new_tokens, prompt))
        return runs[0] == runs[1]

    def _next_prompt(self) -> list[int]:
        generator = torch.Generator().manual_seed(self._num_prompts)
        self._num_prompts += 1
        return torch.randint(3, self.shape.config["vocab_size"], (self.shape.prompt_len,), generator=generator).tolist()

    def _tokens(self, num_branches: int, new_tokens: int, prompt: list[int]) -> list[list[int]]:
        sampling = td.Sampling(temperature=0.8, top_p=0.95, seed=0, ignore_eos=True)
        (outs,) = self.decoder.generate(
            [prompt], num_branches=num_branches, sampling=sampling, max_new_tokens=new_tokens
        )
        token_ids = [out.token_ids for out in outs]
        if [len(tokens) for tokens in token_ids] != [new_tokens] * num_branches:
            raise ArithmeticError("branches ended early")
        return token_ids

    def close(self) -> None:
        """Gives the pages back to the device."""
        self.decoder.close()
        del self.decoder
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def total(self, num_branches: int, new_tokens: int) -> float:
        """Returns the seconds from the prompt to the last token."""
        return seconds(lambda: self.tokens(num_branches, new_tokens), self.device)

    def step(self, num_branches: int) -> timing.Timing:
        """Times a decode step as the difference of runs with twice as many tokens, after its graph was captured."""
        half = self.shape.new_tokens // 2
        self.total(num_branches, half)
        steps = []
        for _ in range(ROUNDS):
            short, long = self.total(num_branches, half), self.total(num_branches, 2 * half)
            steps.append((long - short) / half)
        median = statistics.median(steps)
        return timing.Timing(median, (max(steps) - min(steps)) / median, "clock")


def step_floor(session: harness.Session, model: PreTrainedModel, shape: Shape, num_branches: int) -> dict[str, float]:
    """Counts the bytes and flops of a step: all weights but the embeddings once, and the unique keys and values."""
    config = shape.config
    weights = sum(p.numel() for p in model.parameters()) - config["vocab_size"] * config["hidden_size"]
    token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 2
    tokens = shape.prompt_len + num_branches * shape.new_tokens * 3 // 4  # on average over the second half
    path = num_branches * (shape.prompt_len + shape.new_tokens * 3 // 4)
    head_flops = 4 * config["num_hidden_layers"] * config["num_attention_heads"] * config["head_dim"]
    num_bytes, num_flops = 2.0 * weights + token * tokens, 2.0 * weights * num_branches + head_flops * path
    return {
        "bytes": num_bytes,
        "flops": num_flops,
        "floor_seconds": session.peaks.roofline_seconds(num_bytes, num_flops, torch.bfloat16),
    }


def step_title(shape: Shape, num_branches: int) -> str:
    return f"step of {num_branches} branches, {shape.prompt_len} tokens"


def run_steps(session: harness.Session, ours: Ours, shape: Shape, num_branches: int) -> None:
    """Adds the row of a step."""
    case, single = step_title(shape, num_branches), session.seconds_of(step_title(shape, 1))
    entry: dict[str, Any] = {"name": NAME, "ours": True}
    if session.has_hung(case, NAME):
        entry |= {"skipped": "hung", "failed": True}
    else:
        with session.watched(case, NAME):
            entry["repeatable"] = ours.is_repeatable(num_branches, shape.new_tokens)
            step = ours.step(num_branches)
        entry |= {"warm": asdict(step), "failed": not entry["repeatable"]}
        entry["notes"] = "the same tokens twice" if entry["repeatable"] else "tokens differ from run to run"
        if single is not None:
            entry["over_one_branch"] = step.seconds / single
    floor = step_floor(session, ours.decoder.model.model, shape, num_branches)
    session.add({"case": case, **floor, "entries": [entry]})


def run_total(session: harness.Session, case: str, model: PreTrainedModel, ours: Ours, shape: Shape) -> None:
    """Adds the row of the whole job: our time, and that of `generate` after our pages were given back."""
    num_branches = max(BRANCHES)
    entries: list[dict[str, Any]] = [{"name": NAME, "ours": True}]
    if session.has_hung(case, NAME):
        entries[0] |= {"skipped": "hung", "failed": True}
    else:
        with session.watched(case, NAME):
            ours.total(num_branches, shape.new_tokens)
            times = [ours.total(num_branches, shape.new_tokens) for _ in range(ROUNDS)]
        median = statistics.median(times)
        entries[0]["warm"] = asdict(timing.Timing(median, (max(times) - min(times)) / median, "clock"))
    ours.close()

    def theirs() -> None:
        prompt = torch.randint(3, shape.config["vocab_size"], (1, shape.prompt_len), device=session.device)
        with torch.inference_mode():
            out = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=0.8, top_p=0.95, top_k=0,
                num_return_sequences=num_branches, max_new_tokens=shape.new_tokens, min_new_tokens=shape.new_tokens,
                pad_token_id=0,
            )  # fmt: skip
        assert out.shape == (num_branches, shape.prompt_len + shape.new_tokens)

    peer: dict[str, Any] = {"name": f"generate(num_return_sequences={num_branches})", "ours": False}
    try:
        peer_seconds = seconds(theirs, session.device)  # once: it takes so long that a warm-up would not show
        peer["warm"] = asdict(timing.Timing(peer_seconds, 0.0, "clock"))
        if "warm" in entries[0]:
            entries[0]["speedup"] = peer_seconds / entries[0]["warm"]["seconds"]
    except Exception as error:  # out of memory, most likely: it keeps 64 copies of the prompt
        peer["skipped"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    weights = sum(p.numel() for p in model.parameters())
    num_flops = 2.0 * weights * (shape.prompt_len + num_branches * (shape.new_tokens - 1))
    num_bytes = 2.0 * weights * shape.new_tokens
    session.add(
        {
            "case": case,
            "bytes": num_bytes,
            "flops": num_flops,
            "floor_seconds": session.peaks.roofline_seconds(num_bytes, num_flops, torch.bfloat16),
            "entries": [*entries, peer],
        }
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = harness.parser(__doc__).parse_args(argv)
    session = harness.Session("decode", args)
    shape = SMOKE if args.smoke else LLAMA_3_8B
    model = make_model(shape, session.device)
    session.note("backends", {op: ops.explain(op, session.device.type).backend for op in ops.names()})
    ours = Ours(TransformersModel(model), shape)
    total = f"{max(BRANCHES)} x {shape.new_tokens} tokens after {shape.prompt_len}"
    for case, num_branches in session.cases({step_title(shape, n): n for n in BRANCHES} | {total: None}):
        if num_branches is None:
            run_total(session, case, model, ours, shape)
        else:
            run_steps(session, ours, shape, num_branches)
    return int(session.failed)


if __name__ == "__main__":
    sys.exit(main())
