"""sample's CUDA kernels, run on the host; the checks of the draws are those of the CPU kernel."""

import math

import cuda_library
import pytest
import torch
from cuda_logits import logits_params
from logits_cases import DTYPES, KINDS, make_logits, pack
from simt_kernels import SEEDS, run
from test_sample import FILTERS, OFF, assert_drawn_right, per_row

from treedecode import ops
from treedecode.reference.sample import uniform

SLOT = 160  # kSampleSlot of csrc/cuda/sample.h


def sample(logits, settings, *, token_mask=None, chunk_len=None, **options):
    rows = logits.shape[0]
    params = logits_params(logits, token_mask, chunk_len)
    chunks = rows * params["num_chunks"]
    out = (torch.empty(rows, dtype=torch.int32), torch.empty(rows), torch.empty(rows))
    names = {"seed": "seeds", "position": "positions"}  # a seed of `run` is the schedule's
    run(
        "sample",
        logits=params,
        **{names.get(name, name): value for name, value in settings.items()},
        **dict(zip(("token", "logprob", "entropy"), out, strict=True)),
        chunk_sums=torch.empty(chunks, 4),
        chunk_least=torch.empty(chunks, dtype=torch.int64),
        chunk_keys=torch.empty(chunks, SLOT, dtype=torch.int64),
        strides=tuple(0 if len(settings[name]) == 1 else settings[name].stride(0) for name in OFF),
        **options,
    )
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filters", FILTERS, ids=lambda f: "-".join(f"{k}{v}" for k, v in f.items()) or "plain")
def test_matches_reference(filters, kind):
    rows, vocab = 3, 2003
    for seed, dtype in enumerate(DTYPES):
        logits = make_logits(kind, rows, vocab).to(dtype)
        settings = per_row(rows, **filters, seed=torch.arange(rows), position=77)
        got = sample(logits, settings, chunk_len=(None, 512, 2048)[seed], seed=seed, resident_blocks=2)
        assert_drawn_right(logits, got, settings)
