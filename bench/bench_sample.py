import pytest
import torch
from transformers.generation import logits_process as warpers

from bench.bench_beam_prune import SHAPES, make_logits
from treedecode import ops

TOP_P = {"temperature": 1.0, "top_p": 0.95}
CASES = [(SHAPES[0], kind, TOP_P) for kind in ("normal", "peaked", "flat", "ascending")]
CASES += [
    (SHAPES[0], "normal", settings)
    for settings in (
        {"temperature": 0.8, "top_p": 0.95},
        {"temperature": 1.0},
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 50, "top_p": 0.95},
    )
]
CASES += [(shape, "peaked", TOP_P) for shape in SHAPES[1:]]


def name(value):
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return "-".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("shape", "kind", "settings"), CASES, ids=name)
def bench_sample(compare, dtype, shape, kind, settings):
    rows, vocab = shape
    logits = make_logits(kind, rows, vocab, dtype)
    dtypes = {"top_k": torch.int32}
    tensors = {key: torch.full((rows,), value, dtype=dtypes.get(key, torch.float32)) for key, value in settings.items()}
    seed, position = torch.arange(rows), torch.arange(rows)

    def transformers():
        """Filters and draws as `generate` does, without log-probability and entropy."""
        scores = logits.float()
        if settings["temperature"] == 0:
            return scores.argmax(-1)
        if settings["temperature"] != 1:
            scores = warpers.TemperatureLogitsWarper(settings["temperature"])(None, scores)
        if "top_k" in settings:
            scores = warpers.TopKLogitsWarper(settings["top_k"])(None, scores)
        if "top_p" in settings:
            scores = warpers.TopPLogitsWarper(settings["top_p"])(None, scores)
        return torch.multinomial(scores.softmax(-1), 1)

    compare(
        lambda: ops.sample(logits, **tensors, seed=seed, position=position),
        {"transformers": transformers},
        num_bytes=logits.nbytes,
        dtype=dtype,
        peer_seconds=1.5,
    )


@pytest.mark.parametrize("rows", [1, 64])
def bench_sample_call(compare, rows):
    """sample on 32 tokens, where the time is that of the call itself."""
    logits = torch.randn(rows, 32)
    seed, position = torch.arange(rows), torch.arange(rows)
    compare(
        lambda: ops.sample(logits, temperature=0.8, top_p=0.9, seed=seed, position=position),
        {},
        num_bytes=logits.nbytes,
    )
