"""Decoder.generate on a model whose text is a hash of what its pages hold."""

import asyncio
import gc

import pytest
import torch
from fakes import EOS, FakeModel, FakeTokenizer, next_logits

import treedecode as td


@pytest.fixture
def make_decoder():
    """Makes decoders; at the end of the test each is whole and has leaked nothing."""
    made = []

    def make(model=None, *, num_pages=200, tokenizer=True, **options):
        model = model or FakeModel()
        page_size = options.setdefault("page_size", 4)
        kv_memory = num_pages * page_size * 2 * model.num_layers * model.num_kv_heads * model.head_dim * 4
        made.append(td.Decoder(model, FakeTokenizer() if tokenizer else None, kv_memory=kv_memory, **options))
        return made[-1]

    yield make
    gc.collect()
    for decoder in made:
        decoder.check_integrity()
        assert decoder.num_branches == 0, "branches leaked"
        pool = decoder.engine.pool
        assert pool.num_free_pages + len(decoder.engine.index.pages()) == pool.num_pages, "pages leaked"


def greedy(prompt, count, eos_logit=-1.0):
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and (len(tokens) == len(prompt) or tokens[-1] != EOS):
        tokens.append(int(next_logits(tokens, eos_logit=eos_logit).argmax()))
    return tokens[len(prompt) :]


def test_greedy_is_the_models_own_text(make_decoder):
    dec = make_decoder()
    prompts = [[5, 6, 7], [5, 6, 7, 8, 9, 10, 11, 12], [9]]
    outs = dec.generate(prompts, sampling=td.Sampling(temperature=0), max_new_tokens=12)
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
