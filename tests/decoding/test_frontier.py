"""Frontiers: searches as coroutines on one decoder, exact on a model that is a hash of its pages."""

import asyncio
import gc
import json

import numpy as np
import pytest
from support import paths
from support.fakes import EOS

import treedecode as td
from treedecode.engine.branch_table import child_seeds

GOLDEN = paths.GOLDEN / "frontier_search.json"
WARM = td.Sampling(seed=4, temperature=1.0)
GREEDY = td.Sampling(temperature=0, ignore_eos=True)


def lengths(texts):
    return [len(text) for text in texts]


async def search(dec, prompts, depth=3, width=3, keep=2, sampling=WARM):
    frontier = await dec.roots(prompts, sampling=sampling)
    for _ in range(depth):
        frontier = frontier.fork(width)
        await frontier.extend(stop="\n", max_new_tokens=6)
        await frontier.score(lengths)
        frontier = frontier.prune(keep)
    return await frontier.finish()


def test_a_recorded_search_replays_exactly(make_decoder):
    outs = make_decoder().run(search(make_decoder(), ["the cat", "a dog", "the"]))
    found = [[[out.token_ids, round(out.cum_logprob, 4), out.finish_reason] for out in tree] for tree in outs]
    assert found == json.loads(GOLDEN.read_text())


def test_searches_side_by_side_are_as_alone_and_share_forwards(make_decoder):
    prompts = [["the cat"], ["a dog", "the"], ["0123456789" * 4]]
    alone, forwards = [], []
    for batch in prompts:
        dec = make_decoder()
        alone.append(dec.run(search(dec, batch)))
        forwards.append(len(dec.model.forwards))
    dec = make_decoder()

    async def all_of_them():
        return await asyncio.gather(*(search(dec, batch) for batch in prompts))

    assert asyncio.run(all_of_them()) == alone
    assert len(dec.model.forwards) <= max(forwards) + 2
    tight = make_decoder(num_pages=26, prefill_tokens=5)
    assert tight.run(_gather(search(tight, batch) for batch in prompts)) == alone
    assert tight.stats.num_preemptions > 0


async def _gather(coroutines):
    return await asyncio.gather(*coroutines)


def test_two_extends_take_the_ticks_of_one(make_decoder):
    dec = make_decoder()

    async def both():
        a, b = await dec.roots([[2, 3, 4]]), await dec.roots([[5, 6, 7, 8]])
        before = len(dec.model.forwards)
        await asyncio.gather(
            a.extend(max_new_tokens=9, sampling=GREEDY),
            b.extend(max_new_tokens=9, sampling=td.Sampling(ignore_eos=True)),
        )
        return dec.model.forwards[before:]

    assert asyncio.run(both()) == [[1, 1]] * 9


def test_fork_shares_everything_and_siblings_differ(make_decoder):
    dec = make_decoder(page_size=4)

    async def run():
        root = await dec.roots([[2] * 18, [3] * 5], sampling=WARM)
        used = dec.engine.pool.num_pages - dec.engine.pool.num_free_pages
        some = root.fork([3, 0])
        again = root.fork(2)
        assert dec.engine.pool.num_pages - dec.engine.pool.num_free_pages == used
        assert (some.tree.tolist(), again.tree.tolist()) == ([0, 0, 0], [0, 0, 1, 1])
        await asyncio.gather(some.extend(max_new_tokens=12), again.extend(max_new_tokens=12))
        texts = [tuple(ids) for ids in some.token_ids() + again.token_ids()]
        assert len(set(texts)) == 7
        assert root.token_ids() == [[], []]
        with pytest.raises(ValueError, match="width: expected numbers >= 0, not all of them 0"):
            root.fork(0)
        with pytest.raises(ValueError, match="width"):
            root.fork([2, -1])

    asyncio.run(run())


def test_fork_at_takes_another_way(make_decoder):
    dec = make_decoder(page_size=4)

    async def run():
        root = await dec.roots([[2, 3, 4, 5, 6]])
        long = await root.fork(1).extend(max_new_tokens=12, sampling=GREEDY)
        [ids] = long.token_ids()
        back = long.fork_at(9)
        assert back.token_ids() == [ids[:4]]
        assert back.cum_logprobs[0] == pytest.approx(sum(dec_logprobs(long)[:4]), abs=1e-4)
        await back.extend(max_new_tokens=8, sampling=GREEDY)
        assert back.token_ids() == long.token_ids() == [ids], "the same way, as it is greedy"
        other = long.fork(4).fork_at(9)
        await other.extend(max_new_tokens=8, sampling=td.Sampling(seed=1, temperature=5.0))
        assert all(found[:4] == ids[:4] and found != ids for found in other.token_ids())
        for wrong in (4, 18):
            with pytest.raises(ValueError, match="position"):
                long.fork_at(wrong)

    asyncio.run(run())


def dec_logprobs(frontier):
    table = frontier._engine.table
    [row] = frontier.branches
    return table.logprobs[row, table.prompt_len[row] : table.num_tokens[row]].tolist()


def test_appended_text_is_as_if_it_had_been_in_the_prompt(make_decoder):
    dec = make_decoder(prefill_tokens=6)

    async def run():
        frontier = (await dec.roots("the cat")).fork(2)
        frontier.append([" sat on the mat", "."])
        assert frontier.texts() == [" sat on the mat", "."]
        frontier.append(dec.encode(" a"))
        await frontier.extend(max_new_tokens=7, sampling=GREEDY)
        expected = await dec.generate_async(
            ["the cat sat on the mat a", "the cat. a"], max_new_tokens=7, sampling=GREEDY
        )
        assert frontier.step_texts() == [out.text for [out] in expected]
        with pytest.raises(ValueError, match="text: expected one for all or 2, one per branch, got 3"):
            frontier.append(["a", "b", "c"])
        with pytest.raises(ValueError, match=r"text\[1\]: expected token ids from 0 to \d+, got 99"):
            frontier.append([[2], [99]])

    asyncio.run(run())


def test_steps_go_on_after_their_stop(make_decoder):
    dec = make_decoder()

    async def run():
        steps = await dec.roots("the")
        whole = await dec.generate_async("the", max_new_tokens=40, sampling=GREEDY)
        texts = []
        while len(texts) < 3:
            await steps.extend(stop=["a", "e"], max_new_tokens=40, sampling=GREEDY)
            texts += steps.step_texts()
            assert not any(letter in texts[-1] for letter in "ae")
        assert whole[0][0].text.startswith(steps.texts()[0])
        [[out]] = await steps.finish()
        assert out.finish_reason == "stop"
        assert steps_text(texts) == out.text.replace("a", "|").replace("e", "|")

    def steps_text(texts):
        return "|".join(texts)

    asyncio.run(run())


def test_a_finished_branch_stays_finished(make_decoder):
    dec = make_decoder()

    async def run():
        frontier = (await dec.roots([[2, 3]])).fork(12)
        await frontier.extend(max_new_tokens=60, sampling=td.Sampling(seed=1, temperature=3.0))
        done = frontier.finished
        assert done.any()
        before = frontier.token_ids()
        assert [ids[-1] == EOS for ids in before] == done.tolist()
        await frontier.extend(max_new_tokens=2)
        assert [ids == old for ids, old in zip(frontier.token_ids(), before, strict=True)] == done.tolist()
        ended = frontier.select(done)
        forwards = len(dec.model.forwards)
        await ended.extend(max_new_tokens=5)
        assert len(dec.model.forwards) == forwards

    asyncio.run(run())


@pytest.mark.parametrize("per", ["tree", "all"])
def test_prune_keeps_the_best_of_each_tree(make_decoder, per):
    """Against a loop over trees, with ties and branches that have no score, in trees out of order."""
    rng = np.random.default_rng(0)

    async def run(dec):
        for _ in range(30):
            roots = await dec.roots(["the cat", "a dog", "the"], sampling=WARM)
            frontier = roots.fork(4).select(rng.permutation(12))
            frontier.scores = rng.choice([0.0, 0.5, 1.0, np.nan], 12)
            keep = int(rng.integers(1, 6))
            kept = []
            for group in range(3) if per == "tree" else [None]:
                members = [i for i in range(12) if group is None or frontier.tree[i] == group]
                badness = {i: np.inf if np.isnan(frontier.scores[i]) else -frontier.scores[i] for i in members}
                kept += sorted(members, key=lambda i: (badness[i], i))[:keep]
            want = frontier.branches[sorted(kept)]
            assert frontier.prune(keep, per).branches.tolist() == want.tolist()

    make_decoder().run(run(make_decoder()))


def test_select_prune_merge(make_decoder):
    dec = make_decoder()

    async def run():
        frontier = (await dec.roots([[2], [3], [2]])).fork([3, 2, 1])
        frontier.scores = np.array([1.0, 3.0, 3.0, np.nan, -5.0, 0.0])
        kept = frontier.select(frontier.scores > 0)
        assert kept.tree.tolist() == [0, 0, 0]
        with pytest.raises(ValueError, match="mask: expected 6 entries, got 2"):
            frontier.select([True, False])
        best = frontier.prune(1)
        assert (best.tree.tolist(), best.scores.tolist()) == ([0, 1, 2], [3.0, -5.0, 0.0])
        assert best.branches[0] == kept.branches[1], "the earlier of equals"
        with pytest.raises(RuntimeError, match="released, pruned or merged"):
            frontier.texts()
        kept.append(["a", "b", "a"])
        merged = kept.merge()
        assert (merged.texts(), merged.counts.tolist()) == (["a", "b"], [2, 1])
        top = best.prune(2, per="all")
        assert top.scores.tolist() == [3.0, 0.0]
        for wrong in ({"keep": 0}, {"keep": 1, "per": "branch"}):
            with pytest.raises(ValueError, match=r"^(keep|per): expected"):
                top.prune(**wrong)

    asyncio.run(run())
    assert dec.num_branches == 0


def test_finish_has_a_list_for_every_tree(make_decoder):
    dec = make_decoder()

    async def run(kept):
        with await dec.roots([[2], [3], [4]]) as frontier:
            return list(map(len, await frontier.select(kept).finish()))

    assert [asyncio.run(run(kept)) for kept in ([0], [1], [])] == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_scores_by_function_and_by_judge(make_decoder):
    dec = make_decoder()

    async def later(texts):
        await asyncio.sleep(0)
        return [-len(text) for text in texts]

    async def run():
        frontier = (await dec.roots("the", sampling=WARM)).fork(3)
        await frontier.extend(max_new_tokens=9)
        before, held = frontier.token_ids(), dec.num_branches
        assert (await frontier.score(later)).tolist() == [-len(text) for text in frontier.texts()]
        asked = []

        def read(texts):
            asked.extend(texts)
            return range(len(texts))

        computed = dec.stats.num_prefill_tokens + dec.stats.num_decode_tokens
        scores = await frontier.score(read, judge=" 09", num_samples=2, max_new_tokens=3, sampling=GREEDY)
        assert scores.tolist() == [0.5, 2.5, 4.5]
        judged = [dec.encode("the") + ids + dec.encode(" 09") for ids in before]
        expected = await dec.generate_async(judged, max_new_tokens=3, sampling=GREEDY)
        assert asked[::2] == asked[1::2] == [out.text for [out] in expected]
        assert (frontier.token_ids(), dec.num_branches) == (before, held)
        with pytest.raises(ValueError, match="fn: expected 3 numbers, one per text, got shape"):
            await frontier.score(lambda texts: [1.0])
        with pytest.raises(ZeroDivisionError):
            await frontier.score(lambda texts: 1 / 0, judge="a")
        assert dec.num_branches == held
        assert computed < dec.stats.num_prefill_tokens + dec.stats.num_decode_tokens

    asyncio.run(run())


def test_branches_come_back_whatever_happens(make_decoder):
    dec = make_decoder()

    async def forgotten():
        (await dec.roots(["the", "a"])).fork(3)
        gc.collect()
        assert dec.num_branches == 0

    async def cancelled():
        task = asyncio.create_task(search(dec, ["the", "a"], depth=50, sampling=td.Sampling(ignore_eos=True)))
        other = asyncio.create_task(search(dec, ["the cat"]))
        for _ in range(30):
            await asyncio.sleep(0)
        assert dec.num_branches > 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        del task
        gc.collect()
        dec.check_integrity()
        return await other

    async def with_block():
        with pytest.raises(KeyError), await dec.roots(["the", "a"]) as frontier:
            raise KeyError
        assert dec.num_branches == 0
        frontier.release()

    async def released_while_extending():
        frontier = await dec.roots("the")
        task = asyncio.create_task(frontier.extend())
        await asyncio.sleep(0)
        frontier.release()
        with pytest.raises(RuntimeError, match="released while it was being extended"):
            await task
        assert dec.num_branches == 0

    async def twice_at_once():
        frontier = await dec.roots("the")
        first = asyncio.create_task(frontier.extend(max_new_tokens=3))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="already being extended"):
            await frontier.extend()
        await first

    async def timeout():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(dec.generate_async("the", num_branches=4, max_new_tokens=480), 0.02)
        assert dec.num_branches == 0
        with await dec.roots("the") as frontier:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(frontier.extend(max_new_tokens=400, sampling=GREEDY), 0.02)
            so_far, forwards = frontier.token_ids()[0], len(dec.model.forwards)
            for _ in range(9):
                await asyncio.sleep(0)
            assert len(dec.model.forwards) == forwards, "nobody waits for it"
            await frontier.extend(max_new_tokens=3, sampling=GREEDY)
            assert len(frontier.token_ids()[0]) == len(so_far) + 3

    asyncio.run(forgotten())
    assert asyncio.run(cancelled()) == dec.run(search(make_decoder(), ["the cat"]))
    for case in (with_block, released_while_extending, twice_at_once, timeout):
        asyncio.run(case())
        gc.collect()
        dec.check_integrity()


def test_logits_and_reorder_are_beam_searchs_step(make_decoder):
    """Rows advance by given tokens, share the tick with what else runs, and become copies of each other."""
    from support.fakes import next_logits

    dec = make_decoder(page_size=4)
    engine = dec.engine
    prompt = np.arange(2, 12)

    async def beams():
        rows = engine.store.open([prompt] * 3, np.arange(3))
        try:
            first = await engine.logits(rows[:1])
            assert np.array_equal(first[0], next_logits(prompt))
            engine.store.reorder(rows[1:], rows[[0, 0]])
            tokens, history = np.array([4, 5, 6]), [[4], [5], [6]]
            for parents in ([1, 0, 1], [2, 2, 2], [0, 2, 1]):
                logits = await engine.logits(rows, tokens)
                for got, new in zip(logits, history, strict=True):
                    assert np.array_equal(got, next_logits([*prompt, *new]))
                engine.store.reorder(rows, rows[parents])
                tokens = tokens + 7
                history = [[*history[parent], int(token)] for parent, token in zip(parents, tokens, strict=True)]
        finally:
            engine.store.release(rows)

    async def both():
        before = len(dec.model.forwards)
        await asyncio.gather(beams(), dec.generate_async([[5, 6]], sampling=GREEDY, max_new_tokens=4))
        return dec.model.forwards[before:]

    assert max(map(len, asyncio.run(both()))) == 4


def test_a_child_alone_has_the_seed_it_has_among_others():
    """One seed is computed without arrays."""
    rng = np.random.default_rng(0)
    words = rng.integers(-(2**63), 2**63, (3, 50))
    alone = [child_seeds(*(word[i : i + 1] for word in words))[0] for i in range(50)]
    assert alone == child_seeds(*words).tolist()
    assert len(set(alone)) == 50
