"""`treedecode.generate` that looks at every token, and that fills the last position, against `generate` itself."""

import threading

import pytest
import torch
from support.generate_cases import EXTRA, VOCAB, make_inputs, make_model
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

import treedecode
import treedecode as td
from treedecode.decoding.decoder import Decoder
from treedecode.models.transformers import TransformersModel

pytestmark = pytest.mark.usefixtures("one_thread")
POSITIONS = 128


class Collect(BaseStreamer):
    """Keeps all that a streamer is given."""

    def __init__(self):
        self.values, self.has_ended = [], False

    def put(self, value):
        assert not self.has_ended
        self.values.append(value.tolist())

    def end(self):
        self.has_ended = True


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


def both(model, inputs, **options):
    """Returns the results of Transformers and of treedecode."""
    want = model.generate(**inputs, **options)
    got = model.generate(**inputs, **options, custom_generate=treedecode.generate)
    decoder = vars(model)["_treedecode"].decoder
    decoder.check_integrity()
    assert decoder.num_branches == 0
    return want, got


# -- the last position --


def filling(length, batch=1):
    ids = torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("name", EXTRA)
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"stopping_criteria": StoppingCriteriaList([Never()])}, {"output_scores": True}]
)
def test_the_last_token_needs_no_position(name, options):
    model = make_model(name, 0)
    options = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, **options}
    if "output_scores" in options:
        options["return_dict_in_generate"] = True
    for batch in (1, 2):
        want, got = both(model, filling(POSITIONS - 1, batch), **options)
        if "output_scores" in options:
            want, got = want.sequences, got.sequences
        assert got.tolist() == want.tolist()
        assert got.shape == (batch, POSITIONS + 1)


@pytest.mark.parametrize("length", [POSITIONS - 1, POSITIONS])
def test_decoders_fill_the_last_position(length):
    model = make_model("llama", 0)
    new, inputs = POSITIONS + 1 - length, filling(length)
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
    [prompt] = inputs["input_ids"].tolist()
    greedy = td.Sampling(temperature=0, ignore_eos=True)
    with Decoder(TransformersModel(model)) as dec:
        want = model.generate(**inputs, **options)[0, length:].tolist()
        for branches in (1, 3):
            [outs] = dec.generate([prompt], num_branches=branches, sampling=greedy, max_new_tokens=new)
            assert [out.token_ids for out in outs] == [want] * branches
        [[out]] = dec.generate([prompt], sampling=greedy, max_new_tokens=None)
        assert (out.token_ids, out.finish_reason) == (want, "length")
        beams = model.generate(**inputs, **options, num_beams=3, num_return_sequences=3)[:, length:].tolist()
        [outs] = dec.beam_search([prompt], num_beams=3, max_new_tokens=new, ignore_eos=True)
        assert [out.token_ids for out in outs] == beams
        with pytest.raises(ValueError, match="max_new_tokens"):
            dec.beam_search([prompt], num_beams=3, max_new_tokens=new + 1)
        dec.check_integrity()


def test_nothing_is_computed_after_the_last_position(make_decoder):
    dec = make_decoder(num_pages=3, page_size=4)

    async def grow():
        with await dec.roots([[2, 3, 4]], sampling=td.Sampling(temperature=0, ignore_eos=True)) as frontier:
            await frontier.extend(max_new_tokens=10, fill=True)
            assert frontier.num_tokens.tolist() == [13]
            for use in (frontier.logits, frontier.fork(1).logits):
                with pytest.raises(ValueError, match="a branch has a token after the 12 that can be computed"):
                    await use()
            await frontier.extend(max_new_tokens=None, fill=True)
            assert frontier.num_tokens.tolist() == [13]

    dec.run(grow())
    dec.check_integrity()
    assert dec.num_branches == 0


# -- scores and logits --


SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9}


@pytest.mark.parametrize(
    ("settings", "batch", "num"),
    [
        ({}, 1, 1),
        ({}, 3, 1),
        ({"min_new_tokens": 4}, 1, 1),
        ({"min_new_tokens": 4}, 3, 1),
        ({"repetition_penalty": 1.3}, 1, 1),  # in a batch Transformers counts padding as tokens of the prompt
        (SAMPLED, 1, 1),
        (SAMPLED, 1, 3),
        (SAMPLED, 3, 1),
        (SAMPLED, 3, 3),
    ],
    ids=str,
)
def test_scores_and_logits(settings, batch, num):
    model = make_model("llama", 1, eos=(2, 5), eos_bias=1.5)
    options = {"max_new_tokens": 9, "do_sample": False, "num_return_sequences": num, "return_dict_in_generate": True}
    options |= {"output_scores": True, "output_logits": True, "eos_token_id": [2, 5], **settings}
    inputs = make_inputs(batch, 1)
    torch.manual_seed(7)
    want = model.generate(**inputs, **options)
    torch.manual_seed(7)
    got = model.generate(**inputs, **options, custom_generate=treedecode.generate)
    assert got.sequences.tolist() == want.sequences.tolist()
    for name in ("scores", "logits"):
        ours, theirs = torch.stack(getattr(got, name)), torch.stack(getattr(want, name))
        assert (
            ours.shape == theirs.shape == (want.sequences.shape[1] - inputs["input_ids"].shape[1], batch * num, VOCAB)
        )
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_scores_alone_and_logits_alone():
    model, options = make_model(), {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    _, scores = both(model, make_inputs(1), output_scores=True, **options)
    _, logits = both(model, make_inputs(1), output_logits=True, **options)
    assert scores.logits is None
    assert logits.scores is None
    assert len(scores.scores) == len(logits.logits) == 3
    plain = model.generate(**make_inputs(1), **options, custom_generate=treedecode.generate)
    assert (plain.scores, plain.logits) == (None, None)


# -- streamers --


@pytest.mark.parametrize("options", [{}, {"output_scores": True, "return_dict_in_generate": True}], ids=str)
def test_a_streamer_is_given_each_token(options):
    model = make_model("llama", 2, eos=(2, 5), eos_bias=1.5)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": [2, 5], **options}
    want, got = Collect(), Collect()
    model.generate(**make_inputs(1), **options, streamer=want)
    model.generate(**make_inputs(1), **options, streamer=got, custom_generate=treedecode.generate)
    assert got.values == want.values
    assert got.has_ended
    assert len(got.values) > 1


def test_the_text_of_an_iterator_in_another_thread():
    from transformers import AutoTokenizer

    from examples.smollm2 import gguf_path
    from treedecode.models import load_pretrained

    model, tokenizer = load_pretrained(gguf_path(), dtype=torch.float32)
    assert isinstance(tokenizer, type(AutoTokenizer.from_pretrained(model.name_or_path)))
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    want = tokenizer.decode(
        model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    )
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=120)
    options = {"max_new_tokens": 8, "do_sample": False, "streamer": streamer, "custom_generate": treedecode.generate}
    thread = threading.Thread(target=model.generate, kwargs={**inputs, **options})
    thread.start()
    parts = list(streamer)
    thread.join()
    assert "".join(parts) == want
    assert len([part for part in parts if part]) > 1
