"""Reference of sample."""

import math

import torch
from torch import Tensor


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """Returns a number in [0, 1) with 53 random bits, a function of (seed, position) alone."""
    seed, position = seed % 2**64, position % 2**64
    low, high, _, _ = philox4x32((position % 2**32, position >> 32, 0, 0), (seed % 2**32, seed >> 32))
    return ((high << 32 | low) >> 11) * 2.0**-53


def allowed(token_mask: Tensor, vocab: int) -> Tensor:
    """Expands a packed mask `[rows, ceil(vocab / 32)]` int32 to bool `[rows, vocab]`."""
    bits = token_mask[:, :, None] >> torch.arange(32, dtype=torch.int32)
    return (bits & 1).bool().flatten(1)[:, :vocab]


def kept_tokens(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor]:
    """Returns (tokens, weights) that the filters keep of logits `[vocab]` in float64, in increasing token order."""
    if temperature == 0:
        return logits.argmax()[None], torch.ones(1, dtype=torch.float64)
    order = torch.sort(logits, descending=True, stable=True).indices  # stable: the lower token wins a tie
    order = order[logits[order] > -math.inf]
    if top_k > 0:
        order = order[:top_k]
    weights = ((logits[order] - logits[order[0]]) / temperature).exp()
    keep = torch.ones(len(order), dtype=torch.bool)
    if top_p < 1:
        before = weights.cumsum(0) - weights
        keep &= before < top_p * weights.sum()
    keep &= weights >= min_p
    keep[0] = True
    tokens, position = order[keep].sort()
    return tokens, weights[keep][position]


def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    token_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `treedecode.ops.sample`; settings are `[rows]`, and logprob and entropy are returned in float64."""
    x = logits.double()
    if token_mask is not None:
        x = x.masked_fill(~allowed(token_mask, x.shape[1]), -math.inf)
    tokens, logprobs, entropies = [], [], []
    for row in range(x.shape[0]):
        if not (x[row] < math.inf).all():
            raise ValueError(f"logits: expected numbers below +inf, got NaN or +inf in row {row}")
        if (x[row] == -math.inf).all():
            raise ValueError(
                f"logits: expected at least one token above -inf that token_mask allows, got none in row {row}"
            )
        logp = (
            x[row] - x[row].max()
        )  # before logsumexp, which would lose the logarithm of the sum beside logits of 1e38
        logp = logp - logp.logsumexp(0)
        kept, weights = kept_tokens(
            x[row], float(temperature[row]), int(top_k[row]), float(top_p[row]), float(min_p[row])
        )
        target = uniform(int(seed[row]), int(position[row])) * weights.sum()
        drawn = min(int((weights.cumsum(0) <= target).sum()), len(kept) - 1)
        tokens.append(int(kept[drawn]))
        logprobs.append(logp[tokens[-1]])
        entropies.append(-torch.where(logp > -math.inf, logp.exp() * logp, 0.0).sum())
    if not tokens:
        return torch.empty(0, dtype=torch.int32), x.new_empty(0), x.new_empty(0)
    return torch.tensor(tokens, dtype=torch.int32), torch.stack(logprobs), torch.stack(entropies)
