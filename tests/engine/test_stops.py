"""Stops: token borders, partial characters, and the mask that says when to look."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fakes import VOCAB, FakeTokenizer
from transformers import AutoTokenizer

from treedecode import Decoder, Sampling
from treedecode.engine.stops import StopMatcher, StopSet, TextStream, parse_stop
from treedecode.tasks.countdown import model_path

TOKENIZER = FakeTokenizer()
MATCHER = StopMatcher(TOKENIZER, VOCAB)
STOPS = [("END",), ("\n",), ("\n\n",), ("é", "the a"), (" a", ".", "ab"), ("END.", "D.9"), ("🌳",)]
tokens_of_stops = st.lists(
    st.sampled_from([2, 3, 4, 28, 30, 31, *range(VOCAB - 10, VOCAB)]), min_size=1, max_size=40
)  # mostly tokens that make up the stops above


def where_text_stops(stops, tokens):
    """(tokens up to the stop, text before it), by decoding everything after every token."""
    for n in range(1, len(tokens) + 1):
        text = TOKENIZER.decode(tokens[:n])
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            return n, text[: min(found)]
    return None, TOKENIZER.decode(tokens)


@settings(deadline=None, max_examples=300)
@given(tokens_of_stops, st.sampled_from(STOPS))
def test_stops_where_the_text_does(tokens, strings):
    stops = StopSet(strings)
    stop_id = MATCHER.register(stops)
    expected, text = where_text_stops(strings, tokens)
    stream, shown = TextStream(MATCHER.decode, stops), ""
    for n in range(1, len(tokens) + 1):
        new = np.array(tokens[:n], np.int32)
        stopped = bool(MATCHER.mask(stop_id)[tokens[n - 1]]) and MATCHER.stopped(stop_id, new)
        assert stopped == (n == expected)
        shown += stream.push(new, last=stopped or n == len(tokens), cut=stopped)
        assert text.startswith(shown)
        if stopped:
            assert MATCHER.text(stop_id, new, cut=True) == text
            break
    assert shown == text


@settings(deadline=None, max_examples=300)
@given(tokens_of_stops, st.sampled_from([*STOPS, (" ab", " a", "EN"), ("END.", "N")]), st.integers(0, 6))
def test_streams_show_the_text_where_stops_are_passed_over(tokens, strings, min_tokens):
    stop_id = MATCHER.register(StopSet(strings))
    stream, shown, stopped, n = TextStream(MATCHER.decode, MATCHER[stop_id]), "", False, 0
    while not stopped and n < len(tokens):
        n += 1
        new = np.array(tokens[:n], np.int32)
        stopped = n >= min_tokens and bool(MATCHER.mask(stop_id)[tokens[n - 1]]) and MATCHER.stopped(stop_id, new)
        shown += stream.push(new, last=stopped or n == len(tokens), cut=stopped)
    assert shown == MATCHER.text(stop_id, new, cut=stopped)


def test_the_mask_is_worth_having():
    mask = MATCHER.mask(MATCHER.register(StopSet(("END",))))
    assert TOKENIZER.decode([np.flatnonzero(mask)[0]]) == "END"
    assert mask.sum() == 1 + 1 + 4  # END, D., and the pieces of characters


def test_a_stop_that_was_passed_over_is_not_found_again():
    stop_id = MATCHER.register(StopSet(("\n",)))
    newline, letter = TOKENIZER.encode("\n")[0], 5
    passed = np.array([letter, newline, letter], np.int32)
    assert not MATCHER.stopped(stop_id, passed)
    again = np.append(passed, [newline])
    assert MATCHER.stopped(stop_id, again)
    assert MATCHER.text(stop_id, again, cut=True) == TOKENIZER.decode(passed)


def test_sentencepiece_spaces_are_seen():
    """A piece that begins with a space decodes to a text without one, alone; yet it completes a stop that has one."""

    class Pieces(FakeTokenizer):
        pieces = ("\u2581the", "\u2581end", "s")

        def __len__(self):
            return 3

        def convert_ids_to_tokens(self, ids):
            return [self.pieces[i] for i in ids]

        def decode(self, ids, **options):
            return "".join(self.pieces[int(i)] for i in ids).replace("\u2581", " ").removeprefix(" ")

    matcher = StopMatcher(Pieces(), 4)
    stop_id = matcher.register(StopSet((" end",)))
    assert matcher.mask(stop_id).tolist() == [False, True, False, False]
    assert not matcher.stopped(stop_id, np.array([1]))
    assert matcher.stopped(stop_id, np.array([0, 1]))


def test_a_special_token_stops_by_its_string(make_decoder):
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocab = {chr(ord("a") + i): i for i in range(VOCAB)}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"additional_special_tokens": [chr(ord("a") + 7)]})
    tokenizer.add_special_tokens({"pad_token": "<pad>"})  # beyond what the model can produce
    dec = make_decoder(tokenizer=False)
    free = dec.generate([[2, 3]], num_branches=20, sampling=Sampling(seed=1, ignore_eos=True), max_new_tokens=40)[0]
    assert any(7 in out.token_ids for out in free)
    dec = Decoder(dec.model, tokenizer, kv_memory=2**20)
    settings = {"sampling": Sampling(seed=1, ignore_eos=True), "max_new_tokens": 40, "stop": ["h", "<pad>"]}
    for out, whole in zip(dec.generate([[2, 3]], num_branches=20, **settings)[0], free, strict=True):
        end = whole.token_ids.index(7) + 1 if 7 in whole.token_ids else 40
        assert out.token_ids == whole.token_ids[:end]
        assert out.text == tokenizer.decode(whole.token_ids[:end], skip_special_tokens=True)


def test_parse_stop():
    options = {"vocab_size": 10, "has_tokenizer": True}
    assert parse_stop(None, **options) == StopSet()
    assert parse_stop("a", **options) == StopSet(("a",))
    assert parse_stop(3, **options) == StopSet((), (3,))
    assert parse_stop(["a", 3, "a", np.int64(9)], **options) == StopSet(("a",), (3, 9))
    for wrong, error in [
        (1.5, TypeError),
        ([None], TypeError),
        ([True], TypeError),
        ("", ValueError),
        (10, ValueError),
    ]:
        with pytest.raises(error, match="stop: "):
            parse_stop(wrong, **options)


FAST = AutoTokenizer.from_pretrained(model_path())


@given(st.lists(st.integers(0, len(FAST) - 1), max_size=20))
def test_text_is_what_the_tokenizer_says(tokens):
    text = StopMatcher(FAST, len(FAST)).decode(np.array(tokens, np.int32))
    assert text == FAST.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("method", ["decode", "_decode"])
@pytest.mark.parametrize("where", ["class", "object"])
def test_a_tokenizer_that_decodes_in_its_own_way_is_asked(method, where):
    def own(self, token_ids, **options):
        return "its own"

    tokenizer = AutoTokenizer.from_pretrained(model_path())
    if where == "class":
        tokenizer.__class__ = type("Own", (type(tokenizer),), {method: own})
    else:
        setattr(tokenizer, method, own.__get__(tokenizer))
    assert StopMatcher(tokenizer, len(FAST)).decode(np.array([5, 6])) == "its own"
