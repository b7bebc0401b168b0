"""Runs the CUDA kernels of beam_prune, beam_update and sample on the host, called much like the ops."""

import math

import torch
from support.sample_cases import OFF
from support.simt_kernels import run

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType of csrc/cpu/dtypes.h
LONGEST_CHUNK = {torch.float32: 8192, torch.bfloat16: 16384, torch.float16: 16384}


def logits_params(logits, token_mask=None, chunk_len=None):
    """Returns LogitsParams of csrc/cuda/logits/logits.h, with a shorter `chunk_len` than the launcher takes."""
    vocab = logits.shape[1]
    if chunk_len is None:
        num = -(-vocab // LONGEST_CHUNK[logits.dtype])
        chunk_len = (-(-vocab // num) + 31) // 32 * 32
    return {
        "data": logits,
        "token_mask": token_mask,
        "rows": logits.shape[0],
        "vocab": vocab,
        "stride": logits.stride(0),
        "mask_stride": 0 if token_mask is None else token_mask.stride(0),
        "num_chunks": -(-vocab // chunk_len),
        "chunk_len": chunk_len,
        "dtype": DTYPE_CODES[logits.dtype],
    }


SHARED_KEYS = 2048  # kSharedKeys of csrc/cuda/logits/select.cuh


def sort_len(num_keys):
    """Returns the keys of global memory that sorting needs."""
    return 0 if num_keys <= SHARED_KEYS else 2 ** math.ceil(math.log2(num_keys))


def beam_prune(logits, cum, groups, k, *, token_mask=None, is_logprobs=False, chunk_len=None, **options):
    """Runs `ops.beam_prune` in chunks of `chunk_len` tokens."""
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


MODES = {False: 0, True: 1, "never": 2}


def beam_update(args, **options):
    """Runs `ops.beam_update`: returns the running beams, and updates the pool and `done` in `args`."""
    args = {"length_penalty": 1.0, "early_stopping": False, "stop": None} | args
    num_groups, num_candidates = args["scores"].shape
    num_beams = len(args["pool_scores"])
    out = (torch.empty(num_beams), *(torch.empty(num_beams, dtype=torch.int32) for _ in range(2)))
    run(
        "beam_update",
        **args | {"early_stopping": MODES[args["early_stopping"]]},
        **dict(zip(("running_scores", "running_parent", "running_token"), out, strict=True)),
        lists=torch.empty(num_groups, 3, num_candidates, dtype=torch.int32),
        num_groups=num_groups,
        num_candidates=num_candidates,
        num_beams=num_beams,
        num_eos=len(args["eos_ids"]),
        **options,
    )
    return out


def cloned(args):
    """Copies the tensors in a dictionary of arguments."""
    return {name: value.clone() if torch.is_tensor(value) else value for name, value in args.items()}


SLOT = 160  # kSampleSlot of csrc/cuda/logits/sample.h


def sample(logits, settings, *, token_mask=None, chunk_len=None, **options):
    """Runs `ops.sample` in chunks of `chunk_len` tokens; `settings` are tensors."""
    rows = logits.shape[0]
    params = logits_params(logits, token_mask, chunk_len)
    chunks = rows * params["num_chunks"]
    out = (torch.empty(rows, dtype=torch.int32), torch.empty(rows), torch.empty(rows))
    names = {"seed": "seeds", "position": "positions"}  # `seed` of `run` is that of the schedule
    run(
        "sample",
        logits=params,
        **{names.get(name, name): value for name, value in settings.items()},
        **dict(zip(("token", "logprob", "entropy"), out, strict=True)),
        chunk_sums=torch.empty(chunks, 4),
        chunk_min_key=torch.empty(chunks, dtype=torch.int64),
        chunk_keys=torch.empty(chunks, SLOT, dtype=torch.int64),
        strides=tuple(0 if len(settings[name]) == 1 else settings[name].stride(0) for name in OFF),
        **options,
    )
    return out
