"""Costs of chains, in the units a budget may be in."""

from collections.abc import Sequence

from treedecode.gate.chains import Chain

# unit -> the field of `Spending` that counts it
UNITS = {"tokens": "generated_tokens", "kv_bytes": "kv_bytes"}


def chain_costs(
    unit: str, prompt_tokens: int, chains: Sequence[Chain], *, wave: int, token_bytes: int
) -> tuple[float, float]:
    """What one chain alone would have cost, and what one more in a wave costs; mean over chains.

    A chain of L tokens on a prompt of P reads P L + L (L + 1) / 2 tokens of keys and values. In a wave the prompt is
    read once for all.

    Args:
        unit: "tokens" generated, or "kv_bytes" read.
        token_bytes: of a token's keys and values.
    """
    if unit == "tokens":
        mean = sum(chain.num_tokens for chain in chains) / len(chains)
        return mean, mean
    prompt = sum(prompt_tokens * chain.num_tokens for chain in chains) / len(chains) * token_bytes
    own = sum(chain.num_tokens * (chain.num_tokens + 1) / 2 for chain in chains) / len(chains) * token_bytes
    return prompt + own, prompt / wave + own
