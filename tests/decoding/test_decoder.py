"""Decoder.generate on a model whose text is a hash of what its pages hold."""

import asyncio
from itertools import chain

import numpy as np
import pytest
import torch
from support.fakes import EOS, FakeModel, next_logits

import treedecode as td

GREEDY = td.Sampling(temperature=0)


def greedy(prompt, count, change=lambda logits, tokens: None, **model):
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and (len(tokens) == len(prompt) or tokens[-1] != EOS):
        logits = next_logits(tokens, **model)
        change(logits, tokens)
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def test_greedy_is_the_models_own_text(make_decoder):
    dec = make_decoder()
    prompts = [[5, 6, 7], [5, 6, 7, 8, 9, 10, 11, 12], [9]]
    outs = dec.generate(prompts, sampling=GREEDY, max_new_tokens=12)
    for prompt, [out] in zip(prompts, outs, strict=True):
        assert out.token_ids == greedy(prompt, 12)
        logits = [torch.from_numpy(next_logits(prompt + out.token_ids[:i])) for i in range(len(out.token_ids))]
        expected = [float(x.log_softmax(0)[token]) for x, token in zip(logits, out.token_ids, strict=True)]
        assert out.logprobs == pytest.approx(expected, abs=1e-5)
        assert out.cum_logprob == pytest.approx(sum(expected), abs=1e-4)
        assert out.finish_reason == ("stop" if out.token_ids[-1] == EOS else "length")
        assert out.text == dec.decode(out.token_ids)


def test_branches_are_what_they_are_alone(make_decoder):
    prompts = ["the cat sat", "the cat ran far away", "a"]
    settings = {"sampling": td.Sampling(seed=7), "max_new_tokens": 15}
    together = make_decoder().generate(prompts, num_branches=5, **settings)
    for prompt, outs in zip(prompts, together, strict=True):
        assert make_decoder(page_size=1, prefill_tokens=2).generate(prompt, num_branches=5, **settings) == [outs]
        assert make_decoder().generate(prompt, num_branches=2, **settings) == [outs[:2]]
        assert make_decoder().generate([prompt] * 5, **settings) == [[out] for out in outs]
        assert len({tuple(out.token_ids) for out in outs}) == 5
    assert make_decoder().generate(prompts[::-1], num_branches=5, **settings) == together[::-1]


def test_works_inside_a_running_event_loop(make_decoder):
    dec = make_decoder()
    expected = dec.generate("the", sampling=td.Sampling(seed=1), max_new_tokens=5)

    async def notebook():
        return dec.generate("the", sampling=td.Sampling(seed=1), max_new_tokens=5)

    assert asyncio.run(notebook()) == expected


def test_a_prompt_is_computed_once(make_decoder):
    dec = make_decoder(page_size=4)
    shared = list(range(2, 22))
    prompts = [[*shared, 30, 31, 32], [*shared, 40], [*shared, 30, 31, 33, 34, 35], [*shared, 30, 31, 32]]
    dec.generate(prompts, num_branches=3, sampling=GREEDY, max_new_tokens=2)
    # five full pages are shared; the first to come computes them, the last prompt of all is a fork of the first
    assert dec.stats.num_prefix_tokens == 2 * 20
    assert dec.stats.num_prefill_tokens == 23 + 5
    before = dec.stats.num_prefill_tokens
    dec.generate([*shared, 30, 31, 32, 49, 50, 51], sampling=GREEDY, max_new_tokens=2)
    assert dec.stats.num_prefix_tokens == 2 * 20 + 20
    assert dec.stats.num_prefill_tokens == before + 6


def test_prefill_is_chunked_and_mixed_with_decoding(make_decoder):
    dec = make_decoder(prefill_tokens=8, num_pages=100)
    outs = dec.generate([[2, 3, 4], list(range(2, 42))], sampling=GREEDY, max_new_tokens=12)
    assert outs[1][0].token_ids == greedy(list(range(2, 42)), 12)
    assert max(map(sum, dec.model.forwards)) <= 8 + 2
    assert any(1 in q_lens and max(q_lens) > 1 for q_lens in dec.model.forwards)


def test_more_branches_than_rows_wait_their_turn(make_decoder):
    settings = {"num_branches": 7, "sampling": td.Sampling(seed=3), "max_new_tokens": 9}
    expected = make_decoder().generate(["the", "a cat"], **settings)
    dec = make_decoder(max_branches=3)
    assert dec.generate(["the", "a cat"], **settings) == expected
    assert max(map(len, dec.model.forwards)) == 3


def test_seeds(make_decoder):
    dec = make_decoder()
    drawn = [dec.generate("the cat", max_new_tokens=8)[0][0].token_ids for _ in range(3)]
    assert len(set(map(tuple, drawn))) == 3
    torch.manual_seed(5)
    first = dec.generate("the cat", max_new_tokens=8)
    torch.manual_seed(5)
    assert dec.generate("the cat", max_new_tokens=8) == first


def test_ends(make_decoder):
    model = FakeModel(max_position=20, eos_logit=2.0)
    dec = make_decoder(model)
    [out] = dec.generate([[2, 3, 4]], sampling=GREEDY, max_new_tokens=100)[0]
    assert out.token_ids == [EOS]
    assert (out.text, out.finish_reason) == ("", "stop")
    [out] = dec.generate([[2, 3, 4]], sampling=td.Sampling(temperature=0, ignore_eos=True), max_new_tokens=100)[0]
    assert out.token_ids == [EOS] * 18, "the model has 20 positions, and the last token needs none"
    assert out.finish_reason == "length"
    [out] = dec.generate([[2, 3, 4]], sampling=td.Sampling(temperature=0, min_new_tokens=5), max_new_tokens=7)[0]

    def no_eos(logits, tokens):
        if len(tokens) < 3 + 5:
            logits[EOS] = -np.inf

    assert out.token_ids == greedy([2, 3, 4], 7, no_eos, eos_logit=2.0)
    assert EOS not in out.token_ids[:5]
    [out] = make_decoder().generate([[2, 3, 4]], sampling=GREEDY, max_new_tokens=50, stop=[out.token_ids[0], 0])[0]
    assert out.finish_reason == "stop" or len(out.token_ids) == 50


def test_end_tokens_the_model_does_not_have_end_nothing(make_decoder):
    class Odd(FakeModel):
        eos_token_ids = (-1, EOS, 10**6)

    last = FakeModel.vocab_size - 1
    settings = {"sampling": td.Sampling(seed=0, min_new_tokens=2), "max_new_tokens": 40, "num_branches": 40}
    outs = make_decoder(Odd()).generate("the", **settings)
    assert outs == make_decoder().generate("the", **settings)
    assert any(last in out.token_ids[:-1] for out in outs[0])


def test_stop_tokens(make_decoder):
    dec = make_decoder()
    expected = greedy([2, 3, 4], 30)
    [out] = dec.generate([[2, 3, 4]], sampling=GREEDY, max_new_tokens=30, stop=[expected[4]])[0]
    cut = expected.index(expected[4]) + 1
    assert (out.token_ids, out.finish_reason) == (expected[:cut], "stop")


def test_repetition_penalty_is_that_of_transformers(make_decoder):
    from transformers import RepetitionPenaltyLogitsProcessor

    processor = RepetitionPenaltyLogitsProcessor(2.0)

    def penalise(logits, tokens):
        logits[:] = processor(torch.tensor([tokens]), torch.from_numpy(logits)[None])[0].numpy()

    prompt = [2, 3, 4, 2, 5]
    dec = make_decoder()
    asked = td.Sampling(temperature=0, repetition_penalty=2.0)
    assert dec.generate([prompt], sampling=asked, max_new_tokens=40)[0][0].token_ids == greedy(prompt, 40, penalise)
    assert greedy(prompt, 40, penalise) != greedy(prompt, 40)


def test_callback_streams_what_the_completion_says(make_decoder):
    dec = make_decoder()
    texts, tokens = {}, {}

    def callback(branch, token, text):
        texts[branch] = texts.get(branch, "") + text
        tokens.setdefault(branch, []).append(token)

    settings = {"num_branches": 4, "sampling": td.Sampling(seed=2, temperature=2.0), "max_new_tokens": 60}
    outs = [*chain(*dec.generate(["the", "a"], stop=["END", "\n\n"], callback=callback, **settings))]
    assert [tokens[i] for i in range(8)] == [out.token_ids for out in outs]
    assert [texts[i] for i in range(8)] == [out.text for out in outs]
    assert any(out.finish_reason == "stop" and out.token_ids[-1] != EOS for out in outs)


def test_errors_lose_nothing(make_decoder):
    dec = make_decoder()
    expected = dec.generate("the cat", sampling=GREEDY, max_new_tokens=9)

    def broken(branch, token, text):
        raise KeyError("callback")

    with pytest.raises(KeyError, match="callback"):
        dec.generate(["the dog", "a"], num_branches=3, callback=broken)
    dec.check_integrity()
    assert dec.num_branches == 0
    dec.model.fail_at = len(dec.model.forwards) + 3
    with pytest.raises(ArithmeticError, match="the model broke"):
        dec.generate(["the dog", "a"], num_branches=3)
    dec.check_integrity()
    assert dec.num_branches == 0
    assert dec.generate("the cat", sampling=GREEDY, max_new_tokens=9) == expected


def test_nan_logits_fail_only_who_has_them(make_decoder):
    class Poisoned(FakeModel):
        def forward(self, ids, positions, context, logit_rows):
            logits = super().forward(ids, positions, context, logit_rows)
            logits[ids[logit_rows] == 8] = torch.nan
            return logits

    dec = make_decoder(Poisoned())

    async def both():
        good = dec.generate_async([[2, 3, 4]], sampling=GREEDY, max_new_tokens=4)
        return await asyncio.gather(good, dec.generate_async([[2, 8]]), return_exceptions=True)

    good, bad = asyncio.run(both())
    assert 8 not in greedy([2, 3, 4], 4)
    assert good[0][0].token_ids == greedy([2, 3, 4], 4)
    assert isinstance(bad, ValueError)
    assert "NaN" in str(bad)
    assert "position 2" in str(bad)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompts": []}, ValueError, "prompts: is empty"),
        ({"prompts": ["the", ""]}, ValueError, r"prompts\[1\]: is empty"),
        ({"prompts": [[]]}, ValueError, r"prompts\[0\]: is empty"),
        ({"prompts": [[3, 99]]}, ValueError, r"prompts\[0\]: expected token ids from 0 to \d+, got 99"),
        ({"prompts": [[3, -1]]}, ValueError, r"prompts\[0\]: expected token ids from 0 to \d+, got -1"),
        ({"prompts": None}, TypeError, "prompts: expected strings or lists of token ids, got NoneType"),
        ({"prompts": 5}, TypeError, "prompts: expected strings or lists of token ids, got int"),
        ({"prompts": {"a": 1}}, TypeError, "prompts: expected strings or lists of token ids, got dict"),
        ({"prompts": b"abc"}, TypeError, "prompts: expected strings or lists of token ids, got bytes"),
        ({"prompts": ["a", 5]}, TypeError, r"prompts\[1\]: expected a string or token ids, got int 5"),
        ({"prompts": [b"abc"]}, TypeError, r"prompts\[0\]: expected a string or token ids, got bytes"),
        ({"prompts": [[True]]}, TypeError, r"prompts\[0\]: expected a string or token ids"),
        ({"prompts": [[2], [[3], [4, 5]]]}, TypeError, r"prompts\[1\]: expected a string or token ids"),
        ({"sampling": {}}, TypeError, "sampling: expected a treedecode.Sampling, got dict"),
        ({"prompts": [[3, 1.5]]}, TypeError, r"prompts\[0\]: expected a string or token ids"),
        ({"prompts": [[2] * 513]}, ValueError, r"prompts\[0\]: 513 tokens leave no room .* 512"),
        ({"prompts": [[2], [2] * 81]}, ValueError, r"prompts\[1\]: 81 tokens and a new one do not fit the 80"),
        ({"num_branches": 0}, ValueError, "num_branches: expected an int >= 1, got 0"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens: expected at least 1, got 0"),
        ({"max_new_tokens": 2.5}, TypeError, "max_new_tokens: expected an int"),
        ({"max_new_tokens": 79}, ValueError, "max_new_tokens: 3 tokens and 79 new ones do not fit the 80"),
        ({"stop": 3.5}, TypeError, "stop: expected strings or token ids, got float"),
        ({"stop": ["a", None]}, TypeError, "stop: expected strings or token ids, got None"),
        ({"stop": ""}, ValueError, "stop: an empty string"),
        ({"stop": [4000]}, ValueError, "stop: token id 4000 is outside the vocabulary"),
    ],
)
def test_bad_arguments(make_decoder, arguments, error, message):
    dec = make_decoder(num_pages=20)
    with pytest.raises(error, match=message):
        dec.generate(**{"prompts": [[2, 3, 4]], **arguments})
    assert dec.model.forwards == []
    assert dec.engine.pool.num_free_pages == 20


def test_prompts_may_be_arrays_and_tensors(make_decoder):
    expected = make_decoder().generate([[5, 6], [7, 8]], sampling=GREEDY, max_new_tokens=4)
    for prompts in (np.array([[5, 6], [7, 8]]), torch.tensor([[5, 6], [7, 8]]), (range(5, 7), range(7, 9))):
        assert make_decoder().generate(prompts, sampling=GREEDY, max_new_tokens=4) == expected
    for prompt in (np.array([5, 6]), torch.tensor([5, 6]), [*torch.tensor([5, 6])], range(5, 7)):
        assert make_decoder().generate(prompt, sampling=GREEDY, max_new_tokens=4) == expected[:1]


def test_without_a_tokenizer(make_decoder):
    dec = make_decoder(tokenizer=False)
    assert dec.generate([[2, 3]], max_new_tokens=3)[0][0].text == ""
    with pytest.raises(ValueError, match=r"this decoder has no tokenizer"):
        dec.generate("text")
    with pytest.raises(ValueError, match=r"the string '\.' needs a tokenizer"):
        dec.generate([[2]], stop=".")


def test_bad_decoders():
    class Odd(FakeModel):
        dtype = torch.float64

    with pytest.raises(ValueError, match=r"model: expected float32, bfloat16 or float16, got torch.float64$"):
        td.Decoder(Odd())
    with pytest.raises(TypeError, match=r"model: expected a transformers.PreTrainedModel, got int"):
        td.Decoder(3)
    with pytest.raises(ValueError, match="kv_memory: 10 is less than one page"):
        td.Decoder(FakeModel(), kv_memory=10)
    with pytest.raises(ValueError, match='kv_memory: expected bytes or a string like "2GiB"'):
        td.Decoder(FakeModel(), kv_memory="2 apples")
    with pytest.raises(ValueError, match='kv_memory: expected bytes or a string like "2GiB"'):
        td.Decoder(FakeModel(), kv_memory="inf")
    with pytest.raises(ValueError, match="page_size: expected an int >= 1, got 0"):
        td.Decoder(FakeModel(), page_size=0)
    with pytest.raises(ValueError, match=r"dtype: expected float32, bfloat16 or float16, got torch.int4"):
        td.Decoder.from_pretrained("nowhere", dtype="int4")


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ({"temperature": -1}, ValueError), ({"temperature": float("nan")}, ValueError), ({"top_k": -1}, ValueError),
        ({"top_p": 0}, ValueError), ({"min_p": 2}, ValueError), ({"seed": 2**63}, ValueError),
        ({"seed": 1.0}, TypeError),
        ({"top_k": 1.5}, TypeError), ({"repetition_penalty": 0}, ValueError), ({"min_new_tokens": -1}, ValueError),
        ({"temperature": "hot"}, TypeError), ({"temperature": 1e39}, ValueError),
        ({"temperature": float("inf")}, ValueError), ({"ignore_eos": "yes"}, TypeError),
        ({"repetition_penalty": 1e-60}, ValueError), ({"repetition_penalty": 1e39}, ValueError),
    ],
)  # fmt: skip
def test_bad_sampling(setting, error):
    with pytest.raises(error, match=next(iter(setting))):
        td.Sampling(**setting)


def test_settings_at_their_limits_sample(make_decoder):
    for setting in ({"temperature": 3.4e38}, {"temperature": 1e-300}, {"top_p": 1e-300}, {"min_p": 1e-300}):
        assert make_decoder().generate("the", sampling=td.Sampling(**setting), max_new_tokens=3)


def test_closed_decoder(make_decoder):
    dec = make_decoder()

    async def search():
        frontier = await dec.roots("the")
        extend = asyncio.create_task(frontier.extend())
        await asyncio.sleep(0)
        dec.close()
        with pytest.raises(RuntimeError, match="the decoder was closed"):
            await extend
        with pytest.raises(RuntimeError, match="the decoder is closed"):
            frontier.texts()

    asyncio.run(search())
    assert dec.engine.pool.num_free_pages == dec.engine.pool.num_pages
    with pytest.raises(RuntimeError, match="the decoder is closed"):
        dec.generate("the")
    dec.close()


def test_branches_draw_their_first_token_from_the_prompts_own_forward(make_decoder):
    dec = make_decoder()
    outs = dec.generate([[2, 3, 4, 5]], num_branches=6, sampling=td.Sampling(seed=0, ignore_eos=True), max_new_tokens=3)
    assert dec.model.forwards == [[4], [1] * 6, [1] * 6]
    assert len({out.token_ids[0] for out in outs[0]}) > 1
    [[done, *_]] = dec.generate([[2, 3, 4, 5]], num_branches=3, sampling=GREEDY, max_new_tokens=1)
    assert len(dec.model.forwards) == 4
    assert (done.token_ids, done.finish_reason) == (greedy([2, 3, 4, 5], 1), "length")


def test_prompts_that_wait_for_a_prefix_start_on_whole_pages_of_it(make_decoder):
    shared = list(range(2, 32))
    prompts = [[*shared, 40, 41], [*shared[:17], 42], [*shared, 43], [*shared, 40, 41, 44, 45, 46]]
    for prefill_tokens in (1, 3, 6, 7):
        dec = make_decoder(page_size=4, prefill_tokens=prefill_tokens)
        outs = dec.generate(prompts, sampling=GREEDY, max_new_tokens=5)
        assert [out.token_ids for [out] in outs] == [greedy(prompt, 5) for prompt in prompts]
        assert dec.stats.num_prefix_tokens == 16 + 28 + 32
