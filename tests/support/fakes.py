"""A language model that hashes the token history it reads from the pages, and a tokenizer of a few bytes.

A wrong page, a stale page, a missing copy-on-write or a row mixed up with another changes the text. The hash is exact,
so texts are equal whatever the batch was.
"""

import numpy as np
import torch

import treedecode as td
from treedecode.engine.graph_runner import SIZES, GraphRunner
from treedecode.models import ModelAdapter

EOS = 1
_PIECES: list[bytes] = [
    b"",
    b"",  # end of sequence
    *(bytes([c]) for c in b"abcdefghijklmnopqrstuvwxyz .,\n0123456789"),
    b"the",
    b" a",
    b"\n\n",
    b"END",
    b"EN",
    b"D.",
    b"\xc3",
    b"\xa9",
    b"\xf0\x9f",
    b"\x8c\xb3",
]
VOCAB = len(_PIECES)


class FakeTokenizer:
    """Joins byte pieces as byte-level BPE does; token 1 is special. Unknown bytes are left out."""

    bos_token = None

    def __len__(self):
        return VOCAB

    def decode(self, ids, skip_special_tokens=True, clean_up_tokenization_spaces=False):
        return b"".join(_PIECES[int(i)] for i in ids).decode("utf-8", errors="replace")

    def batch_decode(self, batch, **options):
        return [self.decode(ids, **options) for ids in batch]

    def convert_ids_to_tokens(self, ids):
        return [_PIECES[i].decode("latin-1") for i in ids]

    def encode(self, text, add_special_tokens=True):
        data, ids = text.encode(), []
        while data:
            prefixes = [i for i, piece in enumerate(_PIECES) if piece and data.startswith(piece)]
            best = max(prefixes, key=lambda i: len(_PIECES[i]), default=None)
            ids += [] if best is None else [best]
            data = data[1 if best is None else len(_PIECES[best]) :]
        return ids


def history_hash(tokens):
    """Returns a 64-bit word that depends on every token of a history."""
    state = np.uint64(0x243F6A8885A308D3)
    with np.errstate(over="ignore"):
        for token in tokens:
            state = (state ^ np.uint64(token + 1)) * np.uint64(0x100000001B3)
            state ^= state >> np.uint64(29)
    return state


def next_logits(tokens, vocab_size=VOCAB, eos_logit=-1.0, scale=4.0):
    """Returns the logits `[vocab_size]` float32 after a history, the same in every environment."""
    with np.errstate(over="ignore"):
        words = (history_hash(tokens) + np.arange(vocab_size, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        words ^= words >> np.uint64(31)
        words *= np.uint64(0xBF58476D1CE4E5B9)
    logits = ((words >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24) - np.float32(0.5)) * np.float32(scale)
    logits[EOS] = eos_logit
    return logits


class FakeModel(ModelAdapter):
    """Adapts `next_logits` to the decoder; K of a token holds its id and position.

    Args:
        free: skip all computation, to time what is around the model.
    """

    num_layers, num_kv_heads, num_qo_heads, head_dim = 2, 1, 2, 16
    vocab_size = VOCAB
    dtype, device = torch.float32, torch.device("cpu")
    eos_token_ids = (EOS,)
    module = None

    def __init__(self, max_position=512, eos_logit=-1.0, free=False):
        self.max_position = max_position
        self.eos_logit = eos_logit
        self.free = free
        self.forwards = []  # q_lens of every forward
        self.fail_at = None  # number of the forward that raises

    def forward(self, input_ids, position_ids, context, logit_rows):
        if self.free:
            return torch.zeros(len(logit_rows), self.vocab_size)
        q_indptr = context.plan.q_indptr.numpy()
        self.forwards.append([n for n in np.diff(q_indptr).tolist() if n])
        if self.fail_at == len(self.forwards):
            raise ArithmeticError("the model broke")
        # a captured step has idle rows at the end
        count = int(q_indptr[-1])
        assert len(input_ids) == len(position_ids) == len(context.slots) >= count
        assert (context.slots[count:] == -1).all()
        if count and context.slots[0] < 0:  # out of pages
            return torch.zeros(len(logit_rows), self.vocab_size)
        input_ids, position_ids, slots = input_ids[:count], position_ids[:count], context.slots[:count]
        assert len(slots.unique()) == count
        for layer in range(self.num_layers):
            k_pages, v_pages = context.layer(layer)
            page_size = k_pages.shape[1]
            page, offset = slots // page_size, slots % page_size
            k_pages[page, offset, 0, 0] = input_ids.float()
            k_pages[page, offset, 0, 1] = position_ids.float()
            v_pages[page, offset, 0, 0] = input_ids.float()
        logits = np.zeros((len(logit_rows), self.vocab_size), np.float32)
        for i, token in enumerate(logit_rows[logit_rows < count].tolist()):
            row = int(np.searchsorted(q_indptr, token, side="right")) - 1
            length = int(context.seq_lens[row]) - (int(q_indptr[row + 1]) - 1 - token)
            pages = context.page_table[row, : -(-length // page_size)].long()
            seen = k_pages[pages].reshape(-1, self.head_dim)[:length]
            assert seen[:, 1].tolist() == list(range(length)), "a page holds another position"
            logits[i] = next_logits(seen[:, 0].long().tolist(), self.vocab_size, self.eos_logit)
        return torch.from_numpy(logits)


def fake_decoder(model=None, *, captured=False, num_pages=200, tokenizer=True, page_size=4, **options):
    """Makes a decoder on a fake model.

    A captured one takes decode steps as on a GPU, one step behind and with idle rows; only the graph is missing.
    """
    model = model or FakeModel()
    kv_memory = num_pages * page_size * 2 * model.num_layers * model.num_kv_heads * model.head_dim * 4
    options |= {"kv_memory": kv_memory, "page_size": page_size}
    tokenizer = FakeTokenizer() if tokenizer is True else tokenizer or None
    decoder = td.Decoder(model, tokenizer, **options)
    if captured:
        decoder.engine.runner.graphs = GraphRunner(model, decoder.pool, SIZES[::2])
    return decoder
