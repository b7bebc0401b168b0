"""A model whose answers are given by a function of the text before them."""

import numpy as np
from support import fakes


class ByteTokenizer(fakes.FakeTokenizer):
    """Has a token for every byte, after padding and end of sequence."""

    def __len__(self):
        return 258

    def decode(self, ids, skip_special_tokens=True, clean_up_tokenization_spaces=False):
        return bytes(int(i) - 2 for i in ids if int(i) > 1).decode("utf-8", errors="replace")

    def encode(self, text, add_special_tokens=True):
        return [byte + 2 for byte in text.encode()]


class ScriptedModel(fakes.FakeModel):
    vocab_size = 258


def follow(monkeypatch, marker, answer):
    """Makes models write `answer(text before the marker)` after a marker; of a set of characters one at random."""
    tokenizer = ByteTokenizer()

    def next_logits(tokens, vocab_size, eos_logit):
        before, found, said = tokenizer.decode(tokens).rpartition(marker)
        assert found, "nothing was asked"
        logits = np.full(vocab_size, -1e4, np.float32)
        for character in [*answer(before), "\n"][min(len(said), len(answer(before)))]:  # a captured step looks ahead
            logits[tokenizer.encode(character)] = 0
        return logits

    monkeypatch.setattr(fakes, "next_logits", next_logits)
