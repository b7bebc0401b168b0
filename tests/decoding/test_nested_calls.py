"""Calls inside calls: from callbacks, from score functions, in event loops that wait for them."""

import asyncio

import pytest

import treedecode as td

SETTINGS = {"sampling": td.Sampling(seed=1), "max_new_tokens": 4}


def test_a_callback_may_not_wait_for_the_decoder(make_decoder):
    dec = make_decoder()
    expected = dec.generate("the", num_branches=2, **SETTINGS)
    asked = []

    def callback(branch, token, text):
        for call in (dec.generate, dec.beam_search):
            with pytest.raises(RuntimeError, match="called from a callback"):
                call("a", max_new_tokens=2)
        asked.append(branch)

    assert dec.generate("the", num_branches=2, callback=callback, **SETTINGS) == expected
    assert set(asked) == {0, 1}
    assert dec.generate("the", num_branches=2, **SETTINGS) == expected


@pytest.mark.parametrize("in_a_loop", [False, True])
def test_a_score_function_may_generate(make_decoder, in_a_loop):
    dec = make_decoder()
    expected = dec.generate("the", **SETTINGS)

    def score(texts):
        return [dec.generate("the", **SETTINGS) == expected for _ in texts]

    async def search():
        with await dec.roots("the") as frontier:
            return (await frontier.score(score)).tolist()

    async def notebook():
        return dec.run(search())

    assert (asyncio.run(notebook()) if in_a_loop else dec.run(search())) == [1.0]


def test_a_closed_decoder_says_so_in_a_running_loop_too(make_decoder):
    dec = make_decoder()

    async def notebook():
        assert dec.generate("the", **SETTINGS)
        dec.close()
        with pytest.raises(RuntimeError, match="the decoder is closed"):
            dec.generate("the", **SETTINGS)

    asyncio.run(notebook())
