"""Text that is given to branches, as token ids."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from treedecode.common.arrays import IntArray
from treedecode.decoding.arguments import token_ids

if TYPE_CHECKING:
    from treedecode.decoding.decoder import Decoder

Given = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]


def given_tokens(decoder: "Decoder", text: Given, num_tokens: IntArray) -> list[IntArray]:
    """Token ids of what is added to branches of `[n]` tokens: the same for all, or a list with one for each.

    Raises:
        TypeError: neither strings nor token ids. ValueError: another number of them, or a branch would be too long.
    """
    if isinstance(text, bytes) or not isinstance(text, (Sequence, np.ndarray)):
        raise TypeError(f"text: expected strings or token ids, got {type(text).__name__}")
    items = [text] * len(num_tokens) if isinstance(text, str) or _is_ids(text) else list(text)
    if len(items) != len(num_tokens):
        raise ValueError(f"text: expected one for all or {len(num_tokens)}, one per branch, got {len(items)}")
    known: dict[str, list[int]] = {}
    tokens: list[IntArray] = []
    for item in items:
        if isinstance(item, str) and item not in known:
            known[item] = decoder.encode(item, special=False)
        ids = known[item] if isinstance(item, str) else item
        tokens.append(token_ids(ids, f"text[{len(tokens)}]", decoder.model.vocab_size))
    most = decoder.engine.table.max_tokens
    for i, ids in enumerate(tokens):
        if num_tokens[i] + len(ids) > most:
            raise ValueError(f"text: branch {i} would be longer than {most} tokens")
    return tokens


def _is_ids(items: Sequence) -> bool:
    return len(items) > 0 and all(isinstance(item, (int, np.integer)) and not isinstance(item, bool) for item in items)
