"""sample: temperature, top-k, top-p, min-p and a draw that depends on the row's seed and position alone."""

from functools import lru_cache

import torch
from torch import Tensor

from treedecode import reference
from treedecode.ops._native import USE_REFERENCE, call


def sample(
    logits: Tensor,
    *,
    temperature: Tensor | float,
    top_k: Tensor | int = 0,
    top_p: Tensor | float = 1.0,
    min_p: Tensor | float = 0.0,
    seed: Tensor | int,
    position: Tensor | int,
    token_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one token per row.

    Tokens are ranked by (logit descending, token ascending), so ties are defined. The filters compose as in
    `transformers`: logits are divided by the temperature; top-k keeps the first k; top-p keeps, of these, every token
    whose better tokens hold less than `top_p` of their mass; min-p drops what is less likely than `min_p` times the
    best. The best token is always kept. The draw inverts the cumulative distribution of the kept tokens in increasing
    token order at a uniform number from Philox4x32-10 (Salmon et al., SC 2011; key = seed, counter = position), so it
    depends on the row's own arguments alone: not on other rows, the batch's size or the number of threads.

    Args:
        logits: `[rows, vocab]` fp32, bf16 or fp16, unit stride along vocab. -inf = impossible.
        temperature: 0 = the best token, whatever the filters say. This and the following: a tensor `[rows]` (fp32;
            integers for top_k, seed, position) or one number for all rows.
        top_k: 0 = off.
        top_p: in [0, 1], 1 = off.
        min_p: in [0, 1], 0 = off.
        seed, position: 64-bit integers; equal pairs give equal random numbers.
        token_mask: `[rows, ceil(vocab / 32)]` int32, bit `v % 32` of word `v // 32` set = token v is allowed. What it
            forbids counts as -inf, NaN included.

    Returns:
        token `[rows]` int32; logprob `[rows]` fp32, the drawn token's natural log probability; entropy `[rows]` fp32 in
        nats. Both are of the model's own distribution, `softmax(masked logits)` before temperature and filters.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or value is wrong; a row has NaN or +inf, or no token that is
            possible and allowed (the message names the row).
    """
    device = logits.device
    settings = (
        _per_row(temperature, torch.float32, device),
        _per_row(top_k, torch.int32, device),
        _per_row(top_p, torch.float32, device),
        _per_row(min_p, torch.float32, device),
        _per_row(seed, torch.int64, device),
        _per_row(position, torch.int64, device),
    )
    if USE_REFERENCE:
        names = ("temperature", "top_k", "top_p", "min_p", "seed", "position")
        rows = {name: value.expand(logits.shape[0]) for name, value in zip(names, settings, strict=True)}
        token, logprob, entropy = reference.sample(logits, **rows, token_mask=token_mask)
        return token, logprob.float(), entropy.float()
    return call(torch.ops.treedecode.sample.default, logits, *settings, token_mask)


def _per_row(value: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        # An integer of any width will do for an integer setting; a float never becomes one silently.
        if value.dtype != dtype and not (value.dtype.is_floating_point and not dtype.is_floating_point):
            return value.to(dtype)
        return value
    return _one_row(value, dtype, device)


@lru_cache(maxsize=4096)
def _one_row(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One number as a tensor `[1]`, which the op takes for all rows. Nobody writes to it, so it can be kept."""
    return torch.tensor([value], dtype=dtype, device=device)


@torch.library.register_fake("treedecode::sample")
def _(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    token_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    return (
        logits.new_empty(rows, dtype=torch.int32),
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.float32),
    )
