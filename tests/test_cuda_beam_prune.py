"""beam_prune's CUDA kernels, run on the host; the checks of the results are those of the CPU kernel."""

import math

import pytest
import torch
from cuda_logits import logits_params
from logits_cases import DTYPES, KINDS, make_logits, pack
from simt_kernels import SEEDS, run
from test_beam_prune import assert_pruned_right, indptr

from treedecode import ops

SHARED_KEYS = 2048  # kSharedKeys of csrc/cuda/select.cuh


def sort_len(num_keys):
    return 0 if num_keys <= SHARED_KEYS else 2 ** math.ceil(math.log2(num_keys))


def beam_prune(logits, cum, groups, k, *, token_mask=None, is_logprobs=False, chunk_len=None, **options):
    rows, num_groups = logits.shape[0], len(groups) - 1
    params = logits_params(logits, token_mask, chunk_len)
    row_k = min(k, logits.shape[1])
    slot_len = min(2 * row_k if row_k <= 128 else row_k, params["chunk_len"])
    chunks = rows * params["num_chunks"]
    row_sort_len, group_sort_len = sort_len(row_k), sort_len(min(k, rows * row_k))
    out = (
        torch.empty(num_groups, k),
        torch.empty(num_groups, k, dtype=torch.int32),
        torch.empty(num_groups, k, dtype=torch.int32),
        torch.empty(rows),
    )
    run(
        "beam_prune",
        logits=params,
        cum_logprobs=cum,
        group_indptr=groups,
        **dict(zip(("scores", "parent", "token", "lse"), out, strict=True)),
        chunk_sums=torch.empty(chunks, 2),
        chunk_keys=torch.empty(chunks, slot_len, dtype=torch.int64),
        row_keys=torch.empty(rows, row_k, dtype=torch.int64),
        row_tokens=torch.empty(rows, row_k, dtype=torch.int32),
        row_sort=torch.empty(rows, row_sort_len, dtype=torch.int64),
        group_sort=torch.empty(num_groups, group_sort_len, dtype=torch.int64),
        tickets=torch.empty(num_groups, dtype=torch.int32),
        num_groups=num_groups,
        k=k,
        row_k=row_k,
        slot_len=slot_len,
        row_sort_len=row_sort_len,
        group_sort_len=group_sort_len,
        is_logprobs=is_logprobs,
        **options,
    )
    return out


@pytest.mark.parametrize("k", [1, 16, 100, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_reference(kind, k):
    cum = torch.tensor([-1.0, -2.5, -2.5, 0.0, -math.inf, -7.0])
    groups = indptr(1, 3, 0, 2)
    for seed, dtype in enumerate(DTYPES):
        logits = make_logits(kind, 6, 1003).to(dtype)
        for chunk_len in (None, 256):
            got = beam_prune(logits, cum, groups, k, chunk_len=chunk_len, seed=seed, resident_blocks=3)
            assert_pruned_right(logits, cum, groups, k, got)
