"""Beam search on pages, with a model whose logits are a hash of what its pages hold."""

import asyncio

import pytest
import torch
from support.fakes import EOS, FakeModel, next_logits

import treedecode as td
from treedecode.cache.page_pool import OutOfBranches
from treedecode.decoding.beams import Beams, BeamSearch

PROMPTS = [[5, 6, 7], [5, 6, 7, 8, 9, 10, 11, 12, 13], [9], [20, 21, 22, 23, 24]]


@pytest.fixture
def make_decoder(make_decoder):
    """Decoders of a model that ends its texts often."""

    def make(model=None, *, num_pages=400, **options):
        return make_decoder(model or FakeModel(eos_logit=1.7), num_pages=num_pages, **options)

    return make


def expected(prompts, settings, *, eos_logit=1.7, penalty=1.0, stop=None):
    """The search with the hash of whole token histories."""
    beams = Beams(settings, len(prompts))
    texts = [list(prompt) for prompt in prompts]
    while beams.num_rows:
        logits = torch.stack([torch.from_numpy(next_logits(text, eos_logit=eos_logit)) for text in texts])
        if penalty != 1:
            logits = logits.log_softmax(1)
            for row, text in zip(logits, texts, strict=True):
                row[list(set(text))] *= penalty

        def ask(parent, token, texts=texts):
            pairs = zip(parent.flatten().tolist(), token.flatten().tolist(), strict=True)
            new = [[*texts[p][len(texts[p]) - beams.num_steps :], t] for p, t in pairs]
            return torch.tensor([stop(text) for text in new]).view_as(parent)

        step = beams.step(logits, is_logprobs=penalty != 1, stop=ask if stop else None)
        texts = [texts[p] + [t] for p, t in zip(step.parent.tolist(), step.token.tolist(), strict=True)]
    return [[hyp.token_ids.tolist() for hyp in beams.results(i)] for i in range(len(prompts))]


def tokens(outs):
    return [[out.token_ids for out in branches] for branches in outs]


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("num_beams", [1, 3, 8])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_is_the_search_over_whole_texts(make_decoder, page_size, num_beams, early_stopping):
    dec = make_decoder(page_size=page_size)
    settings = {"num_beams": num_beams, "early_stopping": early_stopping, "max_new_tokens": 9, "length_penalty": 0.5}
    outs = dec.beam_search(PROMPTS, **settings)
    assert tokens(outs) == expected(PROMPTS, BeamSearch(**settings, eos_token_ids=(EOS,)))
    for out in (out for branches in outs for out in branches):
        assert out.text == dec.decode(out.token_ids)
        assert out.finish_reason == ("stop" if out.token_ids[-1] == EOS else "length")
        assert len(out.logprobs) == len(out.token_ids)
        assert sum(out.logprobs) == pytest.approx(out.cum_logprob)
    assert any(EOS in out.token_ids for branches in outs for out in branches)


def test_logprobs_are_the_models(make_decoder):
    for prompt, branches in zip(PROMPTS, make_decoder().beam_search(PROMPTS, max_new_tokens=6), strict=True):
        for out in branches:
            texts = [prompt + out.token_ids[:i] for i in range(len(out.token_ids))]
            logits = [torch.from_numpy(next_logits(text, eos_logit=1.7)) for text in texts]
            want = [float(x.log_softmax(0)[token]) for x, token in zip(logits, out.token_ids, strict=True)]
            assert out.logprobs == pytest.approx(want, abs=1e-5)


def test_all_prompts_share_every_forward(make_decoder):
    dec = make_decoder(FakeModel(eos_logit=-50.0))
    dec.beam_search(PROMPTS, num_beams=4, max_new_tokens=10)
    assert dec.stats.num_forwards == 10
    assert sorted(dec.model.forwards[0]) == [1, 3, 5, 9]
    assert all(q_lens == [1] * 16 for q_lens in dec.model.forwards[1:])


def test_more_prompts_than_branches_take_turns(make_decoder):
    settings = {"num_beams": 3, "max_new_tokens": 7}
    want = expected(PROMPTS, BeamSearch(**settings, eos_token_ids=(EOS,)))
    assert tokens(make_decoder(max_branches=7).beam_search(PROMPTS, **settings)) == want
    with pytest.raises(ValueError, match="num_beams: expected at most the decoder's 7 branches, got 8"):
        make_decoder(max_branches=7).beam_search(PROMPTS, num_beams=8)


def test_preempted_beams_come_back_the_same(make_decoder):
    settings = {"num_beams": 6, "max_new_tokens": 12, "early_stopping": "never"}
    prompts = [list(range(10, 30)), list(range(12, 40))]
    dec = make_decoder(num_pages=24)
    want = expected(prompts, BeamSearch(**settings, eos_token_ids=(EOS,)))
    assert tokens(dec.beam_search(prompts, **settings)) == want
    assert dec.stats.num_preemptions > 0


def test_stops(make_decoder):
    dec = make_decoder()
    settings = {"num_beams": 4, "max_new_tokens": 8}
    ends = BeamSearch(**settings, eos_token_ids=(EOS, 12, 30))
    outs = dec.beam_search(PROMPTS, **settings, stop=[12, 30])
    assert tokens(outs) == expected(PROMPTS, ends)
    assert any(out.token_ids[-1] in (12, 30) and out.finish_reason == "stop" for outs_ in outs for out in outs_)

    outs = dec.beam_search(PROMPTS, **settings, stop=["a", "END"], ignore_eos=True)
    found = [out for branches in outs for out in branches if out.finish_reason == "stop"]
    assert found
    assert all("a" not in out.text and "END" not in out.text for branches in outs for out in branches)
    assert all("a" in dec.decode(out.token_ids) or "END" in dec.decode(out.token_ids) for out in found)

    def stop(text):
        return any(s in dec.decode(text) for s in ("a", "END")) and not any(
            s in dec.decode(text[:-1]) for s in ("a", "END")
        )

    assert tokens(outs) == expected(PROMPTS, BeamSearch(**settings), stop=stop)


def test_min_new_tokens_and_repetition_penalty(make_decoder):
    model = FakeModel(eos_logit=3.0)
    settings = {"num_beams": 4, "max_new_tokens": 8, "min_new_tokens": 5}
    want = BeamSearch(**settings, eos_token_ids=(EOS,))
    assert tokens(make_decoder(model).beam_search(PROMPTS, **settings)) == expected(PROMPTS, want, eos_logit=3.0)
    outs = make_decoder(model).beam_search(PROMPTS, **settings, repetition_penalty=1.7)
    assert tokens(outs) == expected(PROMPTS, want, eos_logit=3.0, penalty=1.7)
    assert min(len(out.token_ids) for branches in outs for out in branches) == 6  # five tokens, then the end


def test_runs_beside_other_work(make_decoder):
    dec = make_decoder()
    sampling = td.Sampling(seed=3)

    async def both():
        return await asyncio.gather(
            dec.beam_search_async(PROMPTS[:2], num_beams=3, max_new_tokens=8),
            dec.generate_async(PROMPTS[2:], num_branches=3, sampling=sampling, max_new_tokens=8),
            dec.beam_search_async(PROMPTS[2:], num_beams=5, max_new_tokens=8, length_penalty=2.0),
        )

    first, texts, second = dec.run(both())
    assert dec.stats.num_forwards < 24
    assert first == make_decoder().beam_search(PROMPTS[:2], num_beams=3, max_new_tokens=8)
    assert texts == make_decoder().generate(PROMPTS[2:], num_branches=3, sampling=sampling, max_new_tokens=8)
    assert second == make_decoder().beam_search(PROMPTS[2:], num_beams=5, max_new_tokens=8, length_penalty=2.0)


@pytest.mark.parametrize("fail_at", [1, 2, 5])
def test_an_error_gives_everything_back(make_decoder, fail_at):
    model = FakeModel(eos_logit=-5.0)
    model.fail_at = fail_at
    dec = make_decoder(model)
    with pytest.raises(ArithmeticError):
        dec.beam_search(PROMPTS, num_beams=3, max_new_tokens=9)
    model.fail_at = None
    assert len(dec.beam_search(PROMPTS, num_beams=3, max_new_tokens=9)) == 4


def test_cancelling_gives_everything_back(make_decoder):
    dec = make_decoder(FakeModel(eos_logit=-50.0))

    async def cancelled():
        task = asyncio.ensure_future(dec.beam_search_async(PROMPTS, num_beams=3, max_new_tokens=100))
        while dec.stats.num_forwards < 5:
            await asyncio.sleep(0)
        assert dec.num_branches == 12
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    dec.run(cancelled())


def test_too_few_branches_left(make_decoder):
    dec = make_decoder(max_branches=8)

    async def crowded():
        with await dec.roots([[4, 5]] * 4), pytest.raises(OutOfBranches):
            await dec.beam_search_async(PROMPTS[:2], num_beams=4, max_new_tokens=5)

    dec.run(crowded())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_beams": 0}, "num_beams: expected an int >= 1, got 0"),
        ({"num_return_sequences": 5}, "num_return_sequences: expected 1 to num_beams = 4, got 5"),
        ({"num_return_sequences": 1.5}, "num_return_sequences: expected an int, got 1.5"),
        ({"max_new_tokens": 600}, "max_new_tokens: the longest prompt and 600 new tokens are 609 tokens"),
        ({"early_stopping": "often"}, "early_stopping: expected False, True or 'never'"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected a finite number > 0, got 0"),
        ({"prompts": [[]]}, r"prompts\[0\]: is empty"),
        ({"stop": ""}, "stop: an empty string"),
    ],
)
def test_bad_arguments(make_decoder, change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make_decoder().beam_search(**{"prompts": PROMPTS} | change)


def test_returns_the_best(make_decoder):
    dec = make_decoder()
    every = dec.beam_search(PROMPTS, num_beams=5, max_new_tokens=6)
    assert dec.beam_search(PROMPTS, num_beams=5, max_new_tokens=6, num_return_sequences=2) == [o[:2] for o in every]
    ranks = [[out.cum_logprob / len(out.token_ids) for out in outs] for outs in every]
    assert all(rank == sorted(rank, reverse=True) for rank in ranks)


@pytest.mark.parametrize("length_penalty", [-30.0, -300.0])
def test_scores_below_those_of_free_entries_are_refused(make_decoder, length_penalty):
    decoder = make_decoder()
    options = {"num_beams": 3, "max_new_tokens": 8, "ignore_eos": True}
    with pytest.raises(ValueError, match=r"^length_penalty: -30.* takes the scores of finished beams below -1e9"):
        decoder.beam_search(PROMPTS, **options, length_penalty=length_penalty)
    assert decoder.pool.num_free_rows == decoder.pool.max_branches
    assert all(len(beams) == 3 for beams in decoder.beam_search(PROMPTS, **options, length_penalty=-2.0))
