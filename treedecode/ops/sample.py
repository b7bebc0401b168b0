"""sample: temperature, top-k, top-p, min-p and a draw that depends only on the row's seed and position."""

import numbers
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from treedecode import reference
from treedecode.ops._native import USE_REFERENCE, call, register_fake

_DTYPES = {
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "seed": torch.int64,
    "position": torch.int64,
}
_MAX_TOP_K = 2**31 - 1  # more than any vocabulary has


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
    whose better tokens hold less than `top_p` of their mass; min-p drops tokens less likely than `min_p` times the
    best one. The best token is always kept. The draw inverts the cumulative distribution of the kept tokens in
    increasing token order at a uniform number from Philox4x32-10 (Salmon et al., SC 2011; key = seed, counter =
    position), so it depends only on the row's own arguments: not on other rows, the size of the batch or the number of
    threads.

    Args:
        logits: `[rows, vocab]` fp32, bf16 or fp16, unit stride along vocab. -inf = impossible.
        temperature: 0 = the best token, without filters. This and the following: a tensor `[rows]` (fp32;
            integers for top_k, seed, position) or one number for all rows.
        top_k: 0 = off.
        top_p: in [0, 1], 1 = off.
        min_p: in [0, 1], 0 = off.
        seed, position: 64-bit integers; equal pairs give equal random numbers.
        token_mask: `[rows, ceil(vocab / 32)]` int32, bit `v % 32` of word `v // 32` set = token v is allowed. The
            logit of another token counts as -inf, also if it is NaN.

    Returns:
        token `[rows]` int32; logprob `[rows]` fp32, the drawn token's natural log probability; entropy `[rows]` fp32 in
        nats. Both are of the model's own distribution, `softmax(masked logits)` before temperature and filters.

    Raises:
        ValueError: an argument's shape or value is wrong; a row has NaN or +inf, or no token that is possible and
            allowed (the message names the row). On a GPU the host does not read values: such a row, or one with a
            setting out of range, gets token -1, and logprob and entropy NaN.
        TypeError: an argument's dtype is wrong.
    """
    device = logits.device
    one_row = _cached_row if not torch.compiler.is_compiling() and _is_plain(logits) else _one_row
    settings = (
        _per_row("temperature", temperature, device, one_row),
        _per_row("top_k", top_k, device, one_row),
        _per_row("top_p", top_p, device, one_row),
        _per_row("min_p", min_p, device, one_row),
        _per_row("seed", seed, device, one_row),
        _per_row("position", position, device, one_row),
    )
    if USE_REFERENCE:
        rows = {name: value.expand(logits.shape[0]) for name, value in zip(_DTYPES, settings, strict=True)}
        token, logprob, entropy = reference.sample(logits, **rows, token_mask=token_mask)
        return token, logprob.float(), entropy.float()
    return call(torch.ops.treedecode.sample.default, logits, *settings, token_mask)


def _per_row(name: str, value: Tensor | float, device: torch.device, one_row: Callable[..., Tensor]) -> Tensor:
    if type(value) is float or type(value) is int:
        return one_row(name, value, device)
    if not isinstance(value, Tensor):
        return one_row(name, _number(name, value), device)
    dtype = _DTYPES[name]
    if value.dtype == dtype or value.dtype.is_complex or (value.dtype.is_floating_point and dtype != torch.float32):
        return value  # integers of any width are converted below; the op refuses floats for integer settings
    if dtype == torch.int32:
        value = value.to(torch.int64).clamp(-1, _MAX_TOP_K)
    return value.to(dtype)


def _number(name: str, value: object) -> float:
    """Converts NumPy's numbers to int or float; symbolic numbers of tracing stay."""
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value  # type: ignore[return-value]
    raise TypeError(f"{name}: expected a number or a tensor, got {value!r}")


def _one_row(name: str, value: float, device: torch.device) -> Tensor:
    """Returns one number as a tensor `[1]`, which the op takes for all rows."""
    dtype = _DTYPES[name]
    if type(value) is float and dtype != torch.float32:
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if dtype == torch.int32 and value > _MAX_TOP_K:
        value = _MAX_TOP_K
    try:
        return torch.tensor([value], dtype=dtype, device=device)
    except (RuntimeError, OverflowError, ValueError):
        raise ValueError(f"{name}: expected a number that {dtype} holds, got {value!r}") from None


@lru_cache(maxsize=4096, typed=True)  # typed: 2 and 2.0 are equal, but only one of them is an integer
def _cached_row(name: str, value: float, device: torch.device) -> Tensor:
    """As `_one_row`, cached, since nobody writes to the tensor. Not for tracing, whose tensors are not real."""
    with torch.inference_mode(False):
        return _one_row(name, value, device)


def _is_plain(x: Tensor) -> bool:
    """Returns whether x is a real tensor: not fake, and no wrapper of `torch.func`."""
    return (
        type(x) is Tensor
        and not torch._is_functional_tensor(x)
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


@register_fake("sample")
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
