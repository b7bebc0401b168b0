"""Texts continue their prompts: `prompt + text == decode(all)`, also where a tokenizer leaves out a first space."""

import numpy as np
import pytest
import torch
from support.transformers_models import make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import treedecode
from treedecode.engine.stops import StopMatcher, StopSet, TextStream

pytestmark = pytest.mark.usefixtures("one_thread")

BYTES = "你😀".encode()
WORDS = ["<unk>", "<s>", "</s>", "▁", "▁Hello", "▁world", "▁wor", "ld", "!", "▁▁two", "Hello", "▁a", ","]


def make_tokenizer(kind="llama"):
    """Makes a tokenizer whose decoder drops the first space of a text, as those of Llama 2 and Mistral do."""
    vocabulary = WORDS + [f"<0x{byte:02X}>" for byte in sorted(set(BYTES))]
    model = models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if kind == "llama":
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def ids_of(tokenizer, *words):
    return np.array(tokenizer.convert_tokens_to_ids(list(words)), np.int32)


@pytest.mark.parametrize("kind", ["llama", "metaspace"])
@pytest.mark.parametrize(
    ("prompt", "new"),
    [
        (["<s>", "▁Hello"], ["▁world", "!"]),
        (["▁Hello"], ["▁world"]),
        (["▁Hello", "▁"], ["▁world"]),
        (["Hello"], ["▁▁two", "▁a"]),
        (["<s>"], ["▁world", "!"]),
        (["▁a"] * 20, ["▁a"] * 20),
        (["▁Hello", ","], ["ld"]),
    ],
)
def test_prompt_and_text_are_the_text_of_all(kind, prompt, new):
    tokenizer = make_tokenizer(kind)
    matcher = StopMatcher(tokenizer, len(tokenizer))
    tokens = ids_of(tokenizer, *prompt, *new)
    decoded = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (tokens[: len(prompt)], tokens)]
    assert decoded[0] + matcher.text(0, tokens, len(prompt), cut=False) == decoded[1]
    stream, shown = TextStream(matcher.decode, StopSet(), len(prompt)), ""
    for end in range(len(prompt) + 1, len(tokens) + 1):
        shown += stream.push(tokens[:end], last=end == len(tokens), cut=False)
    assert decoded[0] + shown == decoded[1]


def test_characters_of_several_tokens():
    tokenizer = make_tokenizer()
    matcher = StopMatcher(tokenizer, len(tokenizer))
    tokens = ids_of(tokenizer, "▁Hello", "▁world", *(f"<0x{byte:02X}>" for byte in BYTES), "▁a")
    assert matcher.text(0, tokens, 1, cut=False) == " world你😀 a"
    assert matcher.text(0, tokens, 2, cut=False) == "你😀 a"


def test_a_stop_string_with_a_space_fires_at_once():
    tokenizer = make_tokenizer()
    matcher = StopMatcher(tokenizer, len(tokenizer))
    stop_id = matcher.register(StopSet((" world",)))
    tokens = ids_of(tokenizer, "▁Hello", "▁world", "▁world")
    assert matcher.stopped(stop_id, tokens[:2], 1)
    assert matcher.text(stop_id, tokens[:2], 1, cut=True) == ""
    assert not matcher.stopped(stop_id, ids_of(tokenizer, "▁Hello", "▁wor"), 1)
    assert matcher.stopped(stop_id, ids_of(tokenizer, "▁Hello", "▁wor", "ld"), 1)


@pytest.fixture(scope="module")
def decoder():
    tokenizer = make_tokenizer()
    model = make_model("llama", torch.float32, vocab_size=len(tokenizer))
    with treedecode.Decoder(model, tokenizer=tokenizer, kv_memory="8MiB") as decoder:
        yield decoder


PROMPTS = [[1, 4, 5], [4], [10, 12, 11]]


def test_completions_streams_beams_and_frontiers(decoder):
    sampling = treedecode.Sampling(temperature=1.0, seed=1, ignore_eos=True)
    outs = decoder.generate(PROMPTS, num_branches=4, sampling=sampling, max_new_tokens=9)
    beams = decoder.beam_search(PROMPTS, num_beams=3, max_new_tokens=5)
    for completions in (outs, beams):
        for prompt, branches in zip(PROMPTS, completions, strict=True):
            for branch in branches:
                assert decoder.decode(prompt) + branch.text == decoder.decode([*prompt, *branch.token_ids])

    async def streamed():
        roots = await decoder.roots(PROMPTS, sampling=sampling)
        shown = [""] * len(PROMPTS)

        def show(i, token, text):
            shown[i] += text

        with roots:
            await roots.extend(max_new_tokens=7, callback=show)
            return shown, roots.texts(), roots.token_ids()

    shown, texts, token_ids = decoder.run(streamed())
    assert shown == texts
    for prompt, text, new in zip(PROMPTS, texts, token_ids, strict=True):
        assert decoder.decode(prompt) + text == decoder.decode([*prompt, *new])


def test_white_space_before_the_first_token_of_a_template(decoder):
    assert decoder._codec.encode("\n <s> Hello").count(1) == 1
