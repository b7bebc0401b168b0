"""Edges of the engine and of what holds it: minimum lengths, stops that overlap themselves, failed searches."""

import asyncio
import time

import numpy as np
import pytest
import torch
from support.fakes import EOS, FakeModel, FakeTokenizer, next_logits

import treedecode as td
from treedecode.decoding.beams import Beams, BeamSearch
from treedecode.engine.branch_table import Work
from treedecode.engine.stops import StopSet, TextStream
from treedecode.search.run_account import RunAccount

GREEDY = td.Sampling(temperature=0, ignore_eos=True)
PROMPT = [5, 6, 7]


def greedy_tokens(count):
    tokens = list(PROMPT)
    while len(tokens) < len(PROMPT) + count:
        tokens.append(int(next_logits(tokens, eos_logit=-9.0).argmax()))
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize("min_new_tokens", [3, 4, 5, 6])
def test_a_stop_string_counts_from_the_last_token_of_the_minimum_on(make_decoder, min_new_tokens):
    """The stop is complete with the fourth token: that is enough where four are the minimum, and too early for five."""
    dec = make_decoder(FakeModel(eos_logit=-9.0))
    tokens = greedy_tokens(8)
    fourth = dec.decode(tokens[:4])
    stop = fourth[len(dec.decode(tokens[:2])) :]
    assert stop in fourth
    assert stop not in dec.decode(tokens[:3])
    sampling = td.Sampling(temperature=0, ignore_eos=True, min_new_tokens=min_new_tokens)
    [[out]] = dec.generate([PROMPT], sampling=sampling, max_new_tokens=8, stop=stop)
    if min_new_tokens <= 4:
        assert (len(out.token_ids), out.finish_reason) == (4, "stop")
    else:
        assert len(out.token_ids) > 4


def test_a_stop_that_overlaps_itself_is_held_back_in_a_stream():
    """Line breaks are shown once it is clear that they are no stop."""
    tokenizer = FakeTokenizer()
    stream, shown = TextStream(tokenizer.decode, StopSet(strings=("\n\n\n",))), []
    pieces = ["a", "\n", "\n", "b", "\n", "\n", "\n"]
    tokens: list[int] = []
    for i, piece in enumerate(pieces):
        tokens += tokenizer.encode(piece, add_special_tokens=False)
        is_last = i == len(pieces) - 1
        shown.append(stream.push(np.array(tokens), last=is_last, cut=is_last))
    assert shown == ["a", "", "", "\n\nb", "", "", ""]


def test_seeds_given_later_do_not_depend_on_other_trees(make_decoder):
    async def texts(prompts, which):
        dec = make_decoder()
        with await dec.roots(prompts, sampling=td.Sampling(seed=1)) as roots, roots.fork(2) as frontier:
            await frontier.extend(max_new_tokens=4, sampling=td.Sampling(seed=9, ignore_eos=True))
            return [tokens for tokens, tree in zip(frontier.token_ids(), frontier.tree, strict=True) if tree == which]

    alone = asyncio.run(texts([[9, 8]], 0))
    assert alone[0] != alone[1]
    assert asyncio.run(texts([[3, 4, 5], [7], [9, 8]], 2)) == alone


def test_counts_stay_with_their_branches(make_decoder):
    dec = make_decoder()

    async def run():
        frontier = (await dec.roots([[2], [3]])).fork([3, 1])
        frontier.append(["a", "b", "a", "c"])
        merged = frontier.merge()
        assert merged.counts.tolist() == [2, 1, 1]
        with merged.fork([2, 0, 1]) as children:
            assert children.counts.tolist() == [2, 2, 1]
        with merged.select(np.array([2, 0])) as chosen:
            assert chosen.counts.tolist() == [1, 2]
        with merged.fork_at(merged.num_tokens) as again:
            assert again.counts.tolist() == [2, 1, 1]
        merged.scores = np.array([1.0, 5.0, 0.0])
        pruned = merged.prune(1)
        assert pruned.counts.tolist() == [1, 1]
        pruned.scores = np.array([0.0, 1.0])
        spread = pruned.spread([0, 3])
        assert spread.counts.tolist() == [1, 1, 1]
        spread.release()

    dec.run(run())
    assert dec.num_branches == 0


def test_a_beam_search_that_fails_gives_its_branches_back(make_decoder):
    model = FakeModel(eos_logit=-9.0)
    dec = make_decoder(model, num_pages=40)
    prompts = [[5, 6, 7], [9, 10]]
    want = dec.beam_search(prompts, num_beams=3, max_new_tokens=6)
    num_forwards = len(model.forwards)
    for fail_at in range(1, num_forwards + 1):
        model.fail_at = len(model.forwards) + fail_at
        with pytest.raises(ArithmeticError, match="the model broke"):
            dec.beam_search([[7 * fail_at % 40 + 2, *prompt] for prompt in prompts], num_beams=3, max_new_tokens=6)
        model.fail_at = None
        dec.check_integrity()
        assert dec.num_branches == 0
        assert not dec.engine.only_a_beam_search_runs
    assert dec.beam_search(prompts, num_beams=3, max_new_tokens=6) == want


def test_the_callers_token_mask_stays_as_it_is():
    settings = BeamSearch(num_beams=2, max_new_tokens=4, eos_token_ids=(EOS,), min_new_tokens=3)
    beams = Beams(settings, 1)
    logits = torch.from_numpy(np.stack([next_logits(PROMPT)] * beams.num_rows))
    mask = torch.full((beams.num_rows, -(-logits.shape[1] // 32)), -1, dtype=torch.int32)
    before = mask.clone()
    beams.step(logits, token_mask=mask)
    assert torch.equal(mask, before)


def test_an_account_starts_without_the_limits_of_the_one_before(make_decoder):
    dec = make_decoder()
    meter = dec.meter
    first = meter.open(generated_tokens=3)
    meter.charge_prompt(first, 5)
    meter.close(first)
    second = meter.open(computed_tokens=10**9)
    assert second == first, "the number is used again"

    async def run():
        with await dec.roots([PROMPT], account=second) as frontier:
            await frontier.extend(max_new_tokens=9, sampling=GREEDY)
            return frontier.num_tokens.tolist()

    assert dec.run(run()) == [len(PROMPT) + 9]
    assert not meter.is_over(second)
    assert meter.close(second).generated_tokens == 9


def test_work_without_a_job_is_found(make_decoder):
    dec = make_decoder()

    async def check():
        with await dec.roots([PROMPT, PROMPT]) as roots:
            dec.check_integrity()
            table = dec.engine.table
            row = int(roots.branches[1])
            table.work[row] = Work.SAMPLE
            with pytest.raises(AssertionError, match="a row works without a job"):
                dec.check_integrity()
            table.work[row] = Work.NONE
            dec.check_integrity()

    asyncio.run(check())


@pytest.mark.parametrize("seconds", [2.0, 30.0])
def test_a_run_has_the_seconds_of_its_budget_from_its_beginning(make_decoder, seconds):
    account = RunAccount(make_decoder(), td.Budget(seconds=seconds))
    account.open(None)
    left = account.deadline(td.Budget()) - time.monotonic()
    assert seconds - 0.9 < left <= seconds
    account.close()


def test_the_branch_that_is_too_long_is_named(make_decoder):
    async def extend():
        dec = make_decoder(num_pages=10, page_size=4)
        with await dec.roots([PROMPT, PROMPT[:2], PROMPT]) as roots:
            await roots.extend(max_new_tokens=[3, 39, 300])

    with pytest.raises(ValueError, match="2 tokens and 39 new ones do not fit the 40 tokens of kv_memory"):
        asyncio.run(extend())
