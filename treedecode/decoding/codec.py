"""Codec: converts between text and token ids, and checks prompts, stops and lengths."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from treedecode.common.arrays import IntArray
from treedecode.common.special_tokens import encode_as_text
from treedecode.common.validation import ints_per_branch, token_ids
from treedecode.engine.stops import StopLike, StopMatcher, StopSet, parse_stop

Prompt = str | Sequence[int] | np.ndarray
ForcedText = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]


class Codec:
    """A tokenizer, its stops, and the lengths that a model and its pages allow.

    Args:
        tokenizer: None = prompts are token ids, and texts are empty.
        max_position: tokens that the model was made for; max_position_reason: why they are fewer.
        capacity: tokens that the pages hold.
    """

    def __init__(
        self, tokenizer: Any, *, vocab_size: int, max_position: int, capacity: int, max_position_reason: str = ""
    ) -> None:
        self.tokenizer = tokenizer
        self.matcher = StopMatcher(tokenizer, vocab_size)
        self.vocab_size = vocab_size
        self.max_position = max_position
        self._limit = f"{max_position} tokens" + (f" ({max_position_reason})" if max_position_reason else "")
        self._is_limited = bool(max_position_reason)
        self.capacity = capacity
        self.max_tokens = min(max_position, capacity)

    def encode(self, text: str, *, special: bool = True, special_tokens: bool = True) -> list[int]:
        """Converts text to token ids.

        Args:
            special: put the tokens before it that a text begins with, unless it spells them out itself.
            special_tokens: tokens such as `<|im_end|>` count as such where the text spells them out; otherwise they are
                text.

        Raises:
            ValueError: there is no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("this decoder has no tokenizer; give token ids instead of text")
        if not special_tokens:
            return encode_as_text(self.tokenizer, text, add_special_tokens=special)
        bos = getattr(self.tokenizer, "bos_token", None)
        # White space of a template may come before it.
        has_bos = bos is not None and bos != "" and text.lstrip().startswith(bos)
        return list(self.tokenizer.encode(text, add_special_tokens=special and not has_bos))

    def decode(self, ids: Sequence[int] | IntArray) -> str:
        """Converts token ids to text without special tokens; empty without a tokenizer."""
        return self.matcher.decode(np.asarray(ids))

    def prompt_ids(self, prompts: Prompt | Sequence[Prompt], *, fill: bool = False) -> list[IntArray]:
        """Converts prompts to token ids, `[n]` int32 each; one prompt alone counts as a list of one.

        Args:
            fill: they may fill all positions, since nothing comes after the one token that is then generated.

        Raises:
            TypeError: they are not strings or lists of token ids.
            ValueError: one is empty, has an id outside of the vocabulary, or leaves no room for a new token (named).
        """
        if isinstance(prompts, str):
            return [self._prompt(prompts, "prompts", fill)]
        if isinstance(prompts, (bytes, dict)) or not (hasattr(prompts, "__len__") and hasattr(prompts, "__getitem__")):
            raise TypeError(f"prompts: expected strings or lists of token ids, got {type(prompts).__name__}")
        if len(prompts) == 0:
            raise ValueError("prompts: is empty; expected at least one prompt with at least one token")
        if isinstance(prompts[0], int) or getattr(prompts[0], "ndim", None) == 0:
            return [self._prompt(cast(Prompt, prompts), "prompts", fill)]
        return [self._prompt(cast(Prompt, prompt), f"prompts[{i}]", fill) for i, prompt in enumerate(prompts)]

    def _prompt(self, prompt: Prompt, name: str, fill: bool) -> IntArray:
        tokens = token_ids(name, self.encode(prompt) if isinstance(prompt, str) else prompt, self.vocab_size)
        if len(tokens) == 0:
            raise ValueError(f"{name}: is empty")
        if len(tokens) >= self.max_position + fill:
            raise ValueError(f"{name}: {len(tokens)} tokens leave no room for a new one in the model's {self._limit}")
        if len(tokens) >= self.capacity + fill:
            raise ValueError(
                f"{name}: {len(tokens)} tokens and a new one do not fit the {self.capacity} tokens of kv_memory"
            )
        return tokens.astype(np.int32)

    def forced_ids(self, text: ForcedText, num_tokens: IntArray) -> list[IntArray]:
        """Converts text to append to branches of `[n]` tokens: the same for all, or a list with one for each.

        Raises:
            TypeError: it is neither strings nor token ids.
            ValueError: there is another number of them, or a branch would be too long.
        """
        if isinstance(text, bytes) or not isinstance(text, (Sequence, np.ndarray)):
            raise TypeError(f"text: expected strings or token ids, got {type(text).__name__}")
        items = [text] * len(num_tokens) if isinstance(text, str) or _is_ids(text) else list(text)
        if len(items) != len(num_tokens):
            raise ValueError(f"text: expected one for all or {len(num_tokens)}, one per branch, got {len(items)}")
        encoded: dict[str, list[int]] = {}
        tokens: list[IntArray] = []
        for item in items:
            if isinstance(item, str) and item not in encoded:
                encoded[item] = self.encode(item, special=False)
            ids = encoded[item] if isinstance(item, str) else item
            tokens.append(token_ids(f"text[{len(tokens)}]", ids, self.vocab_size))
        for i, ids in enumerate(tokens):
            if num_tokens[i] + len(ids) > self.max_tokens:
                raise ValueError(f"text: branch {i} would be longer than {self.max_tokens} tokens")
        return tokens

    def parse_stop(self, stop: StopLike) -> StopSet:
        """Converts a `stop` argument to the strings and tokens that end a branch.

        Raises:
            TypeError: it is neither strings nor token ids.
            ValueError: a string is empty, or there is no tokenizer to find it with; an id is out of range.
        """
        special = self.matcher.special
        return parse_stop(stop, vocab_size=self.vocab_size, has_tokenizer=self.tokenizer is not None, special=special)

    def new_token_limits(
        self, num_tokens: IntArray, max_new_tokens: int | Sequence[int] | IntArray | None, *, fill: bool = False
    ) -> IntArray:
        """Checks how many tokens branches of `[n]` tokens may generate: one number for all, or one for each.

        Args:
            fill: the last one is never computed, so it needs no position of the model and no room in the pages.

        Returns:
            `[n]` int64; with None all that the model and the pages hold.

        Raises:
            TypeError: not integers.
            ValueError: one is below 1, or there is no room for so many.
        """
        if max_new_tokens is None:
            return np.full(len(num_tokens), self.max_tokens + fill)
        limits = ints_per_branch("max_new_tokens", max_new_tokens, len(num_tokens))
        if (limits < 1).any():
            raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        too_long = np.flatnonzero(np.minimum(num_tokens + limits, self.max_position + fill) > self.capacity + fill)
        if len(too_long):
            raise ValueError(
                f"max_new_tokens: {num_tokens[too_long[0]]} tokens and {limits[too_long[0]]} new ones do not fit the "
                f"{self.capacity} tokens of kv_memory"
            )
        if self._is_limited and (num_tokens + limits > self.max_position + fill).any():
            raise ValueError(
                f"max_new_tokens: {num_tokens.max()} tokens and {limits.max()} new ones are more than the model's "
                f"{self._limit}"
            )
        return limits


def _is_ids(items: Sequence) -> bool:
    return len(items) > 0 and all(isinstance(item, (int, np.integer)) and not isinstance(item, bool) for item in items)
