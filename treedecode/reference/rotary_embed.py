"""Reference of rotary_embed."""

from torch import Tensor


def rotary_embed(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """See `treedecode.ops.rotary_embed`."""
    half = q.shape[-1] // 2
    for x in (q, k):
        for token in range(x.shape[0]):
            for head in range(x.shape[1]):
                a, b = x[token, head].double().clone().split(half)
                c, s = cos[token].double(), sin[token].double()
                x[token, head, :half] = (a * c[:half] - b * s[:half]).to(x.dtype)
                x[token, head, half:] = (b * c[half:] + a * s[half:]).to(x.dtype)
