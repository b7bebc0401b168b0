"""Times N sampled continuations of one prompt by SmolLM2-135M, beside `transformers.generate`."""

import statistics
import time

import pytest
import torch

import treedecode as td
from examples.smollm2 import gguf_path
from treedecode.models import load_pretrained

PROMPT_LEN = 512
NEW_TOKENS = 32
ROUNDS = 5
SAMPLING = td.Sampling(temperature=0.8, top_p=0.95, seed=0, ignore_eos=True)


@pytest.fixture(scope="module")
def decoder():
    with td.Decoder.from_pretrained(gguf_path(), dtype=torch.bfloat16) as dec:
        yield dec


@pytest.fixture(scope="module")
def peer_model():
    """The same weights in a model of their own."""
    return load_pretrained(gguf_path(), dtype=torch.bfloat16)[0].eval()


def fresh_prompt() -> list[int]:
    """Draws a prompt that no earlier round has left in the cache."""
    return torch.randint(1000, 40000, (PROMPT_LEN,)).tolist()


def ours(decoder, num_branches: int, new_tokens: int = NEW_TOKENS) -> float:
    """Returns the seconds from the prompt to all continuations by treedecode."""
    prompt = fresh_prompt()
    begin = time.perf_counter()
    (outs,) = decoder.generate([prompt], num_branches=num_branches, sampling=SAMPLING, max_new_tokens=new_tokens)
    duration = time.perf_counter() - begin
    assert [len(out.token_ids) for out in outs] == [new_tokens] * num_branches
    return duration


def theirs(model, num_branches: int, new_tokens: int = NEW_TOKENS) -> float:
    """Returns the seconds from the prompt to all continuations by `transformers.generate`."""
    ids = torch.tensor([fresh_prompt()])
    begin = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids, do_sample=True, temperature=0.8, top_p=0.95, top_k=0, num_return_sequences=num_branches,
            max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0,
        )  # fmt: skip
    duration = time.perf_counter() - begin
    assert out.shape == (num_branches, PROMPT_LEN + new_tokens)
    return duration


@pytest.mark.parametrize("num_branches", [1, 16, 64])
def bench_generate(benchmark, peaks, decoder, peer_model, num_branches):
    ours(decoder, num_branches)
    theirs(peer_model, 1, new_tokens=2)
    totals, prefills, singles = [], [], []

    def one_round():
        prefills.append(ours(decoder, num_branches, new_tokens=1))
        singles.append(ours(decoder, 1))
        totals.append(ours(decoder, num_branches))

    benchmark.pedantic(one_round, rounds=ROUNDS)
    peer_rounds = 3 if num_branches == 1 else 1  # a minute and more each
    peer_prefill = statistics.median(theirs(peer_model, num_branches, new_tokens=1) for _ in range(peer_rounds))
    peer_total = statistics.median(theirs(peer_model, num_branches) for _ in range(peer_rounds))

    total, prefill = statistics.median(totals), statistics.median(prefills)
    num_decoded = num_branches * (NEW_TOKENS - 1)
    weights = sum(p.numel() for p in peer_model.parameters())  # tied embeddings count once, as the output projection
    num_flops = 2.0 * weights * (PROMPT_LEN + num_decoded)
    num_bytes = 2.0 * weights * NEW_TOKENS  # one pass over the bf16 weights for the prompt and for each later token
    roofline = peaks.roofline_seconds(num_bytes, num_flops, torch.bfloat16)
    benchmark.extra_info.update(
        bytes=num_bytes,
        flops=num_flops,
        dtype="bfloat16",
        median_seconds=total,
        min_seconds=min(totals),
        roofline_seconds=roofline,
        roofline_percent=100 * roofline / total,
        peers={
            "transformers.generate": {
                "median_seconds": peer_total,
                "min_seconds": peer_total,
                "ratio": peer_total / total,
            }
        },
        prefill_seconds=prefill,
        decode_tokens_per_second=num_decoded / (total - prefill),
        latency_over_one_branch=statistics.median(t / s for t, s in zip(totals, singles, strict=True)),
        transformers_prefill_seconds=peer_prefill,
        transformers_decode_tokens_per_second=num_decoded / (peer_total - peer_prefill),
    )
