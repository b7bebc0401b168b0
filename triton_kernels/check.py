"""Argument checks of the launchers, with the messages of csrc/check.h.

They check shapes, dtypes and strides only. Values are on the device, and the host would have to wait for them.
"""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def tensor(
    t: Tensor, name: str, text: str, shape: tuple[int, ...], *dtypes: torch.dtype, contiguous: bool = False
) -> None:
    """Checks a tensor: its shape (-1 = any size; messages call it `text`), its dtype, and unit stride at the end.

    Raises:
        ValueError: another shape, or another stride; the message names the argument.
        TypeError: a dtype that is not in `dtypes`; the message names the argument.
    """
    if t.dim() != len(shape) or any(want not in (-1, got) for want, got in zip(shape, t.shape, strict=True)):
        sizes = ", ".join("*" if size < 0 else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape {text} = [{sizes}], got {list(t.shape)}")
    if t.dtype not in dtypes:
        *first, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(
            f"{name}: expected dtype {', '.join(first)}{' or ' * bool(first)}{last}, "
            f"got {str(t.dtype).removeprefix('torch.')}"
        )
    if contiguous and not t.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor")
    if t.dim() and t.shape[-1] > 1 and t.stride(-1) != 1:
        raise ValueError(f"{name}: expected unit stride in the last dimension, got {t.stride(-1)}")


def value(ok: bool, name: str, expected: str, got: float) -> None:
    """Checks a value.

    Raises:
        ValueError: `ok` is false; the message names the argument.
    """
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {got:g}")


def is_head_dim(head_dim: int) -> bool:
    """Returns whether attention takes heads of this size."""
    return 8 <= head_dim <= 256 and head_dim % 8 == 0


def logits(t: Tensor, token_mask: Tensor | None) -> None:
    """Checks logits `[rows, vocab]` and the packed mask of allowed tokens.

    Raises:
        ValueError: a shape or a stride is wrong; the message names the argument.
        TypeError: a dtype is wrong; the message names the argument.
    """
    tensor(t, "logits", "[rows, vocab]", (-1, -1), *FLOATS)
    rows, vocab = t.shape
    if not 0 < vocab < 2**31 - 1:
        raise ValueError(f"logits: expected shape [rows, vocab] with 1 to 2^31 - 2 tokens, got {list(t.shape)}")
    if token_mask is not None:
        text = "[rows, ceil(vocab / 32)]"
        tensor(token_mask, "token_mask", text, (rows, (vocab + 31) // 32), torch.int32)


def per_row(t: Tensor, name: str, rows: int, dtype: torch.dtype) -> None:
    """Checks a setting: one value per row, or a single value for all rows, with any stride.

    Raises:
        ValueError: another shape; the message names the argument.
        TypeError: another dtype; the message names the argument.
    """
    if t.dim() != 1 or t.shape[0] not in (rows, 1):
        raise ValueError(f"{name}: expected shape [rows] = [{rows}] or [1], got {list(t.shape)}")
    if t.dtype != dtype:
        names = (str(d).removeprefix("torch.") for d in (dtype, t.dtype))
        raise TypeError("{}: expected dtype {}, got {}".format(name, *names))
