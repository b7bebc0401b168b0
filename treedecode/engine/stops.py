"""Finds where a branch's text ends: stop strings across token borders, stop tokens, streaming without the stop."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

_CONTEXT = 6  # tokens; a character is at most four
_PARTIAL = "\ufffd"  # how a tokenizer shows bytes that are not yet a whole character

StopLike = str | int | Sequence[str | int] | None


@dataclass(frozen=True)
class StopSet:
    """The stops of an extend: any of `strings` in the new text, or any of `token_ids`, ends it."""

    strings: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()

    def find(self, text: str, before: str = "") -> int:
        """Returns where the first stop string begins that ends after the first part `before`; -1 = there is none."""
        searched = len(before.rstrip(_PARTIAL))
        begins = [text.find(stop, max(0, searched - len(stop) + 1)) for stop in self.strings]
        return min((begin for begin in begins if begin >= 0), default=-1)


def parse_stop(
    stop: StopLike, *, vocab_size: int, has_tokenizer: bool, special: Mapping[str, int] | None = None
) -> StopSet:
    """Converts a `stop` argument (strings, token ids, or a mix of both) to a set of stops.

    Args:
        special: ids of special tokens. They leave no text to find such a string in, so it stands for the token as well.

    Raises:
        TypeError: an item is neither a string nor an int.
        ValueError: a string is empty, or there is no tokenizer to find it with; an id lies outside of the vocabulary.
    """
    if stop is None:
        return StopSet()
    items = [stop] if isinstance(stop, (str, int)) else list(stop) if isinstance(stop, (list, tuple, set)) else None
    if items is None:
        raise TypeError(f"stop: expected strings or token ids, got {type(stop).__name__}")
    strings, ids = [], []
    for item in items:
        if isinstance(item, str):
            if not item:
                raise ValueError("stop: an empty string would stop everywhere")
            if not has_tokenizer:
                raise ValueError(
                    f"stop: the string {item!r} needs a tokenizer and this decoder has none; pass token ids"
                )
            strings.append(item)
            if special and item in special:
                ids.append(special[item])
        elif isinstance(item, (int, np.integer)) and not isinstance(item, bool):
            if not 0 <= item < vocab_size:
                raise ValueError(f"stop: token id {item} is outside the vocabulary of {vocab_size}")
            ids.append(int(item))
        else:
            raise TypeError(f"stop: expected strings or token ids, got {item!r}")
    return StopSet(tuple(dict.fromkeys(strings)), tuple(dict.fromkeys(ids)))


def _decodes_as_backend(tokenizer: Any) -> bool:
    """Returns whether `tokenizer.decode` only calls its Rust backend; calling that directly is five times faster."""
    kind, fast = type(tokenizer), getattr(sys.modules.get("transformers"), "PreTrainedTokenizerFast", None)
    return (
        fast is not None
        and isinstance(tokenizer, fast)
        and all(getattr(kind, name) is getattr(fast, name) for name in ("decode", "_decode"))
        and not {"decode", "_decode"} & set(vars(tokenizer))
    )


class StopMatcher:
    """Finds stops in generated tokens; decodes text only after a token that could complete one."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._decodes_as_backend = _decodes_as_backend(tokenizer)
        self._pieces: list[tuple[str, ...]] | None = None
        self._sets: list[StopSet] = [StopSet()]
        self._masks: list[np.ndarray | None] = [None]

    def decode(self, tokens: np.ndarray) -> str:
        """Decodes tokens; special tokens leave no text. Without a tokenizer the text is empty."""
        if self._tokenizer is None or len(tokens) == 0:
            return ""
        if self._decodes_as_backend:
            return str(self._tokenizer.backend_tokenizer.decode(tokens.tolist(), skip_special_tokens=True))
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def decode_after(self, tokens: np.ndarray, begin: int) -> str:
        """Decodes `tokens[begin:]` as they continue the tokens before them.

        Some tokenizers leave out the space of the first token of a text, and a character may begin in the token before.
        """
        if begin == 0:
            return self.decode(tokens)
        context = max(0, begin - _CONTEXT)
        before, text = self.decode(tokens[context:begin]), self.decode(tokens[context:])
        for start in (before, before.rstrip(_PARTIAL)):  # the second where the tokens complete a character
            if text.startswith(start):
                return text[len(start) :]
        return self.decode(tokens[begin:])

    @cached_property
    def special(self) -> dict[str, int]:
        """The ids of special tokens that the model can produce, by the text they are written as."""
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        return {str(token): i for i, token in added.items() if token.special and i < self._vocab_size}

    def register(self, stops: StopSet) -> int:
        """Returns a small id for `stops`; 0 is the empty set."""
        if stops not in self._sets:
            self._sets.append(stops)
            self._masks.append(None)
        return self._sets.index(stops)

    def __getitem__(self, stop_id: int) -> StopSet:
        return self._sets[stop_id]

    def mask(self, stop_id: int) -> np.ndarray:
        """Returns `[vocab_size]` bool: tokens that can complete a stop of the set."""
        mask = self._masks[stop_id]
        if mask is None:
            stops = self._sets[stop_id]
            mask = np.zeros(self._vocab_size, bool)
            mask[list(stops.token_ids)] = True
            if stops.strings:
                ends = tuple(stop[-n:] for stop in stops.strings for n in range(1, len(stop) + 1))
                for token, forms in enumerate(self._token_texts()):
                    mask[token] |= _PARTIAL in forms[0] or any(
                        form.startswith(ends) or any(stop in form for stop in stops.strings) for form in forms
                    )
            self._masks[stop_id] = mask
        return mask

    def stopped(self, stop_id: int, tokens: np.ndarray, begin: int = 0) -> bool:
        """Returns whether the last of `tokens` completes a stop of the set in the text of `tokens[begin:]`."""
        stops = self._sets[stop_id]
        if int(tokens[-1]) in stops.token_ids:
            return True
        if not stops.strings:
            return False
        # A character is at most four byte tokens; the margin keeps what tokenizers do at a text's start out of sight.
        begin = max(begin, len(tokens) - 4 * max(map(len, stops.strings)) - 8)
        text = self.decode_after(tokens, begin)
        if stops.find(text) < 0:
            return False
        return stops.find(text, self.decode_after(tokens[:-1], begin)) >= 0

    def text(self, stop_id: int, tokens: np.ndarray, begin: int = 0, *, cut: bool) -> str:
        """Decodes `tokens[begin:]`; `cut`: without the stop string that the last one completed."""
        text = self.decode_after(tokens, begin)
        if cut and self._sets[stop_id].strings:
            position = self._sets[stop_id].find(text, self.decode_after(tokens[:-1], begin))
            return text[:position] if position >= 0 else text
        return text

    def _token_texts(self) -> list[tuple[str, ...]]:
        """Returns the texts a token may have: alone, and after others, where a space may come before it."""
        if self._pieces is None:
            count = min(self._vocab_size, len(self._tokenizer))
            single = [[i] for i in range(count)]
            fast = getattr(self._tokenizer, "backend_tokenizer", None)  # a hundred times faster than one by one
            if fast is not None:
                texts = fast.decode_batch(single, skip_special_tokens=True)
            else:
                options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
                texts = self._tokenizer.batch_decode(single, **options)
            self._pieces = [(text, " " + text) for text in texts]
        return self._pieces


class TextStream:
    """Streams one branch's text in pieces that never end within a character or show part of a stop string."""

    def __init__(self, decode: Callable[[np.ndarray], str], stops: StopSet, begin: int = 0) -> None:
        """Streams the tokens from `begin` on; those before are what they continue."""
        self._decode = decode
        self._stops = stops
        self._context = max(0, begin - _CONTEXT)  # tokens from it are needed to decode what was read last
        self._read = begin
        self._held = ""

    def push(self, tokens: np.ndarray, *, last: bool, cut: bool) -> str:
        """Returns the new text to show, given all tokens so far.

        Args:
            last: no more tokens will come.
            cut: the last token completed a stop string, which is left out.
        """
        before = self._decode(tokens[self._context : self._read])
        earlier = self._held + self._decode(tokens[self._context : -1])[len(before) :] if cut else ""
        text = self._decode(tokens[self._context :])
        if not text.endswith(_PARTIAL) or last:
            self._held += text[len(before) :]
            self._context, self._read = self._read, len(tokens)
        if last:
            begin = self._stops.find(self._held, earlier) if cut else -1
            return self._held[:begin] if begin >= 0 else self._held
        keep = max((_overlap(self._held, stop) for stop in self._stops.strings), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of `text` that begins, but does not complete, `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
