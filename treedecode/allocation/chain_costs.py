"""Costs of chains, in the units a budget may be in."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from treedecode.allocation.chains import Chain

if TYPE_CHECKING:
    from treedecode.decoding.decoder import Decoder

# unit -> the field of `Spending` that counts it
UNITS = {"tokens": "generated_tokens", "kv_bytes": "kv_bytes"}


def kv_tokens(prompt_tokens: np.ndarray | int, num_tokens: np.ndarray) -> np.ndarray:
    """Tokens of keys and values that chains of so many tokens read, each alone: P L + L (L - 1) / 2.

    The prompt's last token is computed with the first of the chain, and the chain's last one never is.
    """
    return prompt_tokens * num_tokens + num_tokens * (num_tokens - 1) / 2


def shared_tokens(prompt_tokens: int, page_size: int) -> int:
    """Of a prompt, what its branches read once for all: the full pages of all but its last token."""
    return (prompt_tokens - 1) // page_size * page_size


def kv_sizes(decoder: "Decoder") -> dict[str, int]:
    """`token_bytes` and `page_size` of a decoder's cache."""
    return {"token_bytes": decoder.meter.token_bytes, "page_size": decoder.pool.page_size}


def chain_costs(
    unit: str, prompt_tokens: int, chains: Sequence[Chain], *, wave: int, token_bytes: int = 0, page_size: int = 1
) -> tuple[float, float]:
    """What one chain alone would have cost, and what one more in a wave costs; mean over chains.

    Args:
        unit: "tokens" generated, or "kv_bytes" read.
        token_bytes: of a token's keys and values.
    """
    lengths = np.array([chain.num_tokens for chain in chains])
    if unit == "tokens":
        return float(lengths.mean()), float(lengths.mean())
    alone = float(kv_tokens(prompt_tokens, lengths).mean())
    spared = shared_tokens(prompt_tokens, page_size) * float(lengths.mean()) * (1 - 1 / wave)
    return token_bytes * alone, token_bytes * (alone - spared)
