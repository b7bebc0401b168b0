"""What the tests of the CUDA kernels that read logits have in common."""

import torch

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType of csrc/cpu/dtypes.h
LONGEST_CHUNK = {torch.float32: 8192, torch.bfloat16: 16384, torch.float16: 16384}


def logits_params(logits, token_mask=None, chunk_len=None):
    """LogitsParams of csrc/cuda/logits.h; `chunk_len` shorter than a launch from torch would take it."""
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
