"""Costs of chains, in the units that a budget may have."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from treedecode.allocation.chains import Chain

if TYPE_CHECKING:
    from treedecode.decoding.decoder import Decoder

# unit -> the field of `Spending` that counts it
UNITS = {"tokens": "generated_tokens", "kv_bytes": "kv_bytes"}


def kv_tokens(prompt_tokens: np.ndarray | int, num_tokens: np.ndarray) -> np.ndarray:
    """Counts the tokens whose K and V single chains of `num_tokens` read: P L + L (L - 1) / 2.

    The prompt's last token is computed with the first of the chain, and the chain's last one never is.
    """
    return prompt_tokens * num_tokens + num_tokens * (num_tokens - 1) / 2


def shared_tokens(prompt_tokens: int, page_size: int) -> int:
    """Counts the tokens of a prompt that its branches read once for all: full pages of all but its last token."""
    return (prompt_tokens - 1) // page_size * page_size


def kv_sizes(decoder: "Decoder") -> dict[str, int]:
    """Returns `token_bytes` and `page_size` of a decoder's cache."""
    return {"token_bytes": decoder.meter.token_bytes, "page_size": decoder.pool.page_size}


def chain_costs(
    unit: str, prompt_tokens: int, chains: Sequence[Chain], *, wave: int, token_bytes: int = 0, page_size: int = 1
) -> tuple[float, float]:
    """Computes the mean costs of a chain that shares nothing, and of a further one in a wave.

    Args:
        unit: "tokens" generated, or "kv_bytes" read.
        chains: whose lengths are averaged.
        token_bytes: of a token's K and V.
    """
    lengths = np.array([chain.num_tokens for chain in chains])
    if unit == "tokens":
        return float(lengths.mean()), float(lengths.mean())
    single = float(kv_tokens(prompt_tokens, lengths).mean())
    saved = shared_tokens(prompt_tokens, page_size) * float(lengths.mean()) * (1 - 1 / wave)
    return token_bytes * single, token_bytes * (single - saved)
