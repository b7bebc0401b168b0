"""Captured steps without a GPU: the same buffers and the same lag, each replay being the step itself.

The other tests of the decoder run on captured steps too, see `make_decoder`.
"""

import asyncio

import numpy as np
import pytest
import torch
from support.fakes import FakeModel, FakeTokenizer
from support.transformers_models import make_model

import treedecode as td
from treedecode import ops
from treedecode.decoding.beam_graph_step import BeamGraphStep
from treedecode.engine import graph_step
from treedecode.engine.graph_runner import GraphRunner, ReplayedBatch
from treedecode.models import TransformersModel

ANY = td.Sampling(seed=3, ignore_eos=True)
PROMPTS = [list(range(2, 15)), list(range(2, 12)), [40, 41, 42], list(range(20, 45))]


@pytest.fixture
def decoder():
    """A function that makes decoders which take captured steps of the sizes given."""

    def make(model=None, sizes=(2, 4, 16, 32), num_pages=200, **options):
        model = model or FakeModel()
        kv_memory = num_pages * 4 * 2 * model.num_layers * model.num_kv_heads * model.head_dim * 4
        dec = td.Decoder(model, FakeTokenizer(), kv_memory=kv_memory, page_size=4, **options)
        dec.engine.runner.graphs = GraphRunner(model, dec.engine.pool, sizes)
        return dec

    return make


@pytest.fixture
def launches(monkeypatch):
    """Records the number of steps in flight after each launch."""
    seen = []
    launch = ReplayedBatch.launch
    monkeypatch.setattr(ReplayedBatch, "launch", lambda run: (launch(run), seen.append(run.num_in_flight)))
    return seen


def test_the_host_is_one_step_behind(decoder, launches):
    dec = decoder()
    [[out]] = dec.generate([[2, 3, 4]], sampling=ANY, max_new_tokens=12)
    assert launches == [1] + [2] * 10  # the first token comes from the prompt's own forward
    assert len(out.token_ids) == 12
    assert len(dec.model.forwards) == 1 + 11
    assert dec.stats.num_forwards == 12
    assert dec.stats.num_sampled_tokens == 12


def test_a_step_too_many_leaves_no_trace(decoder, launches):
    """A stop is seen when the next step is on its way: that step's tokens and pages must not be."""
    plain, dec = td.Decoder(FakeModel(), FakeTokenizer(), page_size=4), decoder()
    stop = plain.generate([[2, 3, 4]], sampling=ANY, max_new_tokens=30)[0][0].token_ids[10]

    async def search(dec):
        frontier = await dec.roots([[2, 3, 4]])
        await frontier.extend(sampling=ANY, max_new_tokens=30, stop=[stop])
        rows = frontier.branches
        assert dec.engine.pool.seq_lens[rows].tolist() == dec.engine.table.num_cached[rows].tolist()
        await frontier.fork(2).extend(sampling=ANY, max_new_tokens=30)
        await frontier.extend(sampling=ANY, max_new_tokens=30)
        return frontier.token_ids()

    expected = asyncio.run(search(plain))
    assert launches == []
    assert asyncio.run(search(dec)) == expected
    assert launches.count(2) > 20
    dec.check_integrity()


@pytest.mark.parametrize("num_pages", [14, 17, 30])
def test_out_of_pages_within_a_run(decoder, launches, num_pages):
    settings = {"num_branches": 4, "sampling": ANY, "max_new_tokens": 30}
    expected = td.Decoder(FakeModel(), FakeTokenizer(), page_size=4).generate(PROMPTS, **settings)
    dec = decoder(num_pages=num_pages, prefill_tokens=16)
    assert dec.generate(PROMPTS, **settings) == expected
    assert dec.stats.num_preemptions > 0
    assert 2 in launches
    dec.check_integrity()


def test_a_row_whose_logits_are_bad_fails_alone(decoder, monkeypatch):
    """On a GPU sample marks the row; the others keep the tokens of that very step."""

    def marking_sample(logits, **settings):
        bad = logits.isnan().any(dim=1)
        token, logprob, entropy = ops_sample(logits.nan_to_num(), **settings)
        return token.masked_fill(bad, -1), logprob.masked_fill(bad, torch.nan), entropy

    class Poisoned(FakeModel):
        def forward(self, ids, positions, context, logit_rows):
            logits = super().forward(ids, positions, context, logit_rows)
            logits[positions[logit_rows] == 9] = torch.nan
            return logits

    ops_sample = ops.sample
    monkeypatch.setattr(graph_step.ops, "sample", marking_sample)
    dec = decoder(Poisoned())

    async def both():
        return await asyncio.gather(
            dec.generate_async([[2, 3, 4]], sampling=ANY, max_new_tokens=5),
            dec.generate_async([[5, 6, 7, 8]], num_branches=3, sampling=ANY, max_new_tokens=8),
            return_exceptions=True,
        )

    good, bad = asyncio.run(both())
    plain = td.Decoder(FakeModel(), FakeTokenizer(), page_size=4)
    assert good == plain.generate([[2, 3, 4]], sampling=ANY, max_new_tokens=5)
    assert isinstance(bad, ValueError)
    assert "position 10" in str(bad)
    dec.check_integrity()
    assert dec.num_branches == 0


def test_a_released_branch_leaves_the_run(decoder):
    dec = decoder()

    def stop(branch, token, text):
        if branch == 0 and len(seen) == 6:
            other.cancel()
        seen.append(token)

    async def search():
        nonlocal other
        other = asyncio.ensure_future(dec.generate_async([[5, 6, 7]], num_branches=3, sampling=ANY, max_new_tokens=40))
        out = await dec.generate_async([[2, 3, 4]], sampling=ANY, max_new_tokens=30, callback=stop)
        with pytest.raises(asyncio.CancelledError):
            await other
        return out

    seen, other = [], None
    out = asyncio.run(search())
    plain = td.Decoder(FakeModel(), FakeTokenizer(), page_size=4)
    assert out == plain.generate([[2, 3, 4]], sampling=ANY, max_new_tokens=30)
    dec.check_integrity()
    assert dec.num_branches == 0


def test_work_that_steps_differ_in_is_not_captured(decoder, launches):
    dec = decoder()
    for sampling in (td.Sampling(repetition_penalty=1.3), td.Sampling(min_new_tokens=8)):
        dec.generate([[2, 3, 4]], sampling=sampling, max_new_tokens=8)
    assert launches == []


def test_a_changed_model_is_captured_anew(decoder):
    class Changing(FakeModel):
        num_changes = 0

    dec = decoder(Changing())
    dec.generate([[2, 3, 4]], sampling=ANY, max_new_tokens=6)
    before = dict(dec.engine.runner.graphs._steps)
    assert before
    dec.model.num_changes += 1
    dec.generate([[2, 3, 4]], sampling=ANY, max_new_tokens=6)
    assert not set(map(id, before.values())) & set(map(id, dec.engine.runner.graphs._steps.values()))


def test_sizes_are_those_of_the_pool_at_most(decoder):
    dec = decoder(sizes=(64,), max_branches=5)
    dec.generate([[2, 3, 4]], num_branches=5, sampling=ANY, max_new_tokens=6)
    assert [step.size for step in dec.engine.runner.graphs._steps.values()] == [5]
    dec.check_integrity()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_real_model(name):
    model = TransformersModel(make_model(name))
    prompts = [list(range(5, 40)), [7, 8, 9]]
    outs = []
    for sizes in (None, (8, 16)):
        dec = td.Decoder(model, kv_memory="16MiB")
        if sizes is not None:
            dec.engine.runner.graphs = GraphRunner(model, dec.engine.pool, sizes)
        outs.append(dec.generate(prompts, num_branches=3, sampling=ANY, max_new_tokens=20))
        dec.check_integrity()
    assert outs[0] == outs[1]
    assert all(np.isfinite(out.logprobs).all() for branches in outs[0] for out in branches)


@pytest.fixture
def beam_steps(monkeypatch):
    """Number of every replay of a beam step."""
    seen = []
    replay = BeamGraphStep.replay
    monkeypatch.setattr(BeamGraphStep, "replay", lambda step, i: (seen.append(i), replay(step, i))[1])
    return seen


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("eos_logit", [-50.0, 1.2])
def test_beam_search(decoder, beam_steps, early_stopping, eos_logit):
    settings = {"num_beams": 3, "max_new_tokens": 40, "length_penalty": 0.7, "early_stopping": early_stopping}
    plain = td.Decoder(FakeModel(eos_logit=eos_logit), FakeTokenizer(), page_size=4)
    expected = plain.beam_search(PROMPTS, **settings)
    assert beam_steps == []
    dec = decoder(FakeModel(eos_logit=eos_logit), num_pages=300)
    assert dec.beam_search(PROMPTS, **settings) == expected
    assert len(beam_steps) > 10
    dec.check_integrity()
    assert dec.num_branches == 0


def test_beam_searches_of_other_lengths_share_a_step(decoder):
    plain, dec = (
        td.Decoder(FakeModel(eos_logit=-50.0), FakeTokenizer(), page_size=4),
        decoder(FakeModel(eos_logit=-50.0)),
    )
    for length in (9, 14):
        settings = {"num_beams": 3, "max_new_tokens": length}
        assert dec.beam_search([[2, 3, 4]], **settings) == plain.beam_search([[2, 3, 4]], **settings)
    assert len(dec.engine.runner.graphs._steps) == 1


def test_beam_search_with_a_minimum_length(decoder, beam_steps):
    settings = {"num_beams": 3, "max_new_tokens": 12, "min_new_tokens": 8}
    plain = td.Decoder(FakeModel(eos_logit=2.0), FakeTokenizer(), page_size=4)
    expected = plain.beam_search(PROMPTS, **settings)
    dec = decoder(FakeModel(eos_logit=2.0))
    assert dec.beam_search(PROMPTS, **settings) == expected
    assert 0 < len(beam_steps) <= 4


@pytest.mark.parametrize("num_pages", [10, 12])
def test_beam_search_that_runs_out_of_pages(decoder, beam_steps, num_pages):
    """Resting branches of a frontier give way, in the middle of the captured steps."""
    plain = td.Decoder(FakeModel(eos_logit=-50.0), FakeTokenizer(), page_size=4)
    expected = plain.beam_search([[2, 3, 4]], num_beams=2, max_new_tokens=20)
    dec = decoder(FakeModel(eos_logit=-50.0), num_pages=num_pages)

    async def search():
        with await dec.roots([[9] * 20]) as resting:
            await resting.extend(max_new_tokens=4, sampling=ANY)
            return await dec.beam_search_async([[2, 3, 4]], num_beams=2, max_new_tokens=20)

    assert asyncio.run(search()) == expected
    assert dec.stats.num_preemptions > 0
    assert len(beam_steps) > 5
    dec.check_integrity()
    assert dec.num_branches == 0


def test_beam_search_says_that_logits_are_bad(decoder, monkeypatch):
    """On a GPU beam_prune marks the group."""

    def marking_prune(logits, scores, indptr, count, **options):
        bad = logits.isnan().any(dim=1)
        found = ops_prune(logits.nan_to_num(), scores, indptr, count, **options)
        if bad.any():
            return found[0].fill_(torch.nan), found[1].fill_(-1), found[2].fill_(-1), found[3]
        return found

    class Poisoned(FakeModel):
        def forward(self, ids, positions, context, logit_rows):
            logits = super().forward(ids, positions, context, logit_rows)
            logits[positions[logit_rows] == 9] = torch.nan
            return logits

    ops_prune = ops.beam_prune
    monkeypatch.setattr(graph_step.ops, "beam_prune", marking_prune)
    dec = decoder(Poisoned(eos_logit=-50.0))
    with pytest.raises(ValueError, match="NaN"):
        dec.beam_search([[2, 3, 4], [5, 6]], num_beams=3, max_new_tokens=20)
    dec.check_integrity()
    assert dec.num_branches == 0


def test_beam_search_of_a_real_model(beam_steps):
    model = TransformersModel(make_model("llama"))
    prompts = [list(range(5, 40)), [7, 8, 9]]
    outs = []
    for sizes in (None, ()):
        dec = td.Decoder(model, kv_memory="16MiB")
        if sizes is not None:
            dec.engine.runner.graphs = GraphRunner(model, dec.engine.pool, sizes)
        outs.append(dec.beam_search(prompts, num_beams=4, max_new_tokens=20))
        dec.check_integrity()
    assert outs[0] == outs[1]
    assert len(beam_steps) > 10
