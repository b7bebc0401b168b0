"""Special tokens of tokenizers, such as `<|im_end|>`, in texts that are not meant to have any."""

from typing import Any


def spelled_out(tokenizer: Any, text: str) -> list[str]:
    """Returns the special tokens that a text spells out, which most tokenizers take for the tokens themselves."""
    added = getattr(tokenizer, "added_tokens_decoder", None)
    if added is None:
        names = [str(token) for token in getattr(tokenizer, "all_special_tokens", ())]
    else:
        names = [str(token) for token in added.values() if getattr(token, "special", False)]
    return [name for name in names if name and name in text]


def encode_as_text(tokenizer: Any, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Converts text to token ids, with special tokens that it spells out as text.

    Args:
        add_special_tokens: put the tokens before it that a text begins with.
    """
    split = {"split_special_tokens": True} if spelled_out(tokenizer, text) else {}
    return list(tokenizer.encode(text, add_special_tokens=add_special_tokens, **split))
