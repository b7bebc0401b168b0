"""Scorers: functions of texts, the model's own likelihood, judges on side branches, votes."""

import asyncio
import threading
import time

import numpy as np
import pytest
from support import scripted

import treedecode as td
from treedecode.tasks import Problem
from treedecode.verify import Judge, Likelihood, TextScorer, Vote, as_scorer, value_judge
from treedecode.verify.judges import parse_value, parse_vote

PROBLEM = Problem("p", "the", data={"bonus": 100})
WARM = td.Sampling(seed=4, temperature=1.0, ignore_eos=True)
GREEDY = td.Sampling(temperature=0, ignore_eos=True)


def length(problem, text):
    return len(text) + problem.data["bonus"]


async def length_later(problem, text):
    await asyncio.sleep(0)
    return length(problem, text)


async def grown(dec, width=5, prompts=("the", "a")):
    frontier = (await dec.roots(list(prompts), sampling=WARM)).fork(width)
    await frontier.extend(max_new_tokens=7)
    return frontier


@pytest.mark.parametrize("fn", [length, length_later])
@pytest.mark.parametrize("workers", [0, 3])
def test_texts_are_scored_in_their_order(make_decoder, fn, workers):
    dec = make_decoder()

    async def run():
        frontier = await grown(dec)
        frontier.append(["", "a", "ab", "", "abc"] * 2)
        scores = await TextScorer(fn, workers=workers)(frontier, PROBLEM)
        assert scores.tolist() == [len(text) + 100 for text in frontier.texts()]
        assert frontier.scores.tolist() == scores.tolist()
        assert scores.dtype == np.float64

    dec.run(run())


def test_workers_leave_the_event_loop_to_others(make_decoder):
    dec = make_decoder()
    barrier = threading.Barrier(3)
    names = set()

    def meet(problem, text):
        names.add(threading.current_thread().name)
        barrier.wait(timeout=60)  # only three threads at once get past it
        return 0.0

    async def run():
        frontier = await grown(dec, width=3, prompts=["the"])
        scoring = asyncio.create_task(TextScorer(meet, workers=3)(frontier, PROBLEM))
        await dec.generate_async("a", max_new_tokens=3)
        await scoring

    dec.run(run())
    assert all(name.startswith("treedecode-score") for name in names)


def test_coroutines_of_one_call_run_side_by_side(make_decoder):
    dec = make_decoder()
    waiting = []

    async def meet(problem, text):
        waiting.append(asyncio.get_running_loop().create_future())
        if len(waiting) == 10:
            for other in waiting:
                other.set_result(None)
        await waiting[-1] if len(waiting) < 10 else None
        return 1.0

    async def run():
        await asyncio.wait_for(TextScorer(meet)(await grown(dec), PROBLEM), 60)

    dec.run(run())


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_error_ends_the_others(make_decoder, workers):
    dec = make_decoder()
    ended = []

    async def fail(problem, text):
        if not ended:
            ended.append("failed")
            raise ZeroDivisionError(text)
        try:
            await asyncio.sleep(600)
        finally:
            ended.append("cancelled")

    async def run():
        frontier = await grown(dec)
        with pytest.raises(ZeroDivisionError):
            await TextScorer(fail, workers=workers)(frontier, PROBLEM)
        assert np.isnan(frontier.scores).all(), "scores are set when all are known"

    started = time.monotonic()
    dec.run(run())
    assert time.monotonic() - started < 300


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fn": lambda p, t: None}, TypeError, "fn: expected a number for each text, got None"),
        ({"fn": lambda p, t: float("nan")}, ValueError, "fn: expected a number for each text, got nan"),
        ({"fn": lambda p, t: 1.5, "probability": True}, ValueError, "fn: expected a probability .*, got 1.5"),
    ],
)
def test_what_is_no_score(make_decoder, options, error, message):
    dec = make_decoder()

    async def run():
        frontier = await grown(dec, width=1)
        with pytest.raises(error, match=message):
            await TextScorer(**options)(frontier, PROBLEM)

    dec.run(run())


def test_settings_are_checked():
    with pytest.raises(TypeError, match="fn: expected a callable"):
        TextScorer("length")
    with pytest.raises(ValueError, match="workers: expected at least 0, got -1"):
        TextScorer(length, workers=-1)
    with pytest.raises(TypeError, match="workers: expected an int, got True"):
        TextScorer(length, workers=True)
    with pytest.raises(ValueError, match=r"prompt: expected a text with \{choices\} in it"):
        Vote("which?")
    with pytest.raises(TypeError, match="prompt: expected a text or a function of the problem, got 3"):
        Judge(3, len)
    with pytest.raises(TypeError, match="parse: expected a function of an answer, got None"):
        Judge("good?", None)
    with pytest.raises(ValueError, match="num_samples: expected an int >= 1, got 0"):
        Vote(num_samples=0)


def test_likelihood_is_the_completions(make_decoder):
    dec = make_decoder()

    async def run():
        frontier = await grown(dec)
        await frontier.select([1, 3]).extend(max_new_tokens=5)
        summed = await Likelihood(normalize=False)(frontier, PROBLEM)
        mean = await Likelihood()(frontier, PROBLEM)
        assert frontier.scores.tolist() == mean.tolist()
        roots = await dec.roots(["the"])
        assert (await Likelihood()(roots, PROBLEM)).tolist() == [0]
        return summed, mean, [out for tree in await frontier.finish() for out in tree]

    summed, mean, outs = dec.run(run())
    assert [len(out.token_ids) for out in outs] == [7, 12, 7, 12, 7, 7, 7, 7, 7, 7]
    assert summed.tolist() == [sum(out.logprobs) for out in outs]
    assert mean.tolist() == [total / len(out.token_ids) for total, out in zip(summed, outs, strict=True)]


def test_a_judge_takes_the_mean_of_its_answers(make_decoder):
    dec = make_decoder()

    async def run():
        frontier = await grown(dec, width=2)
        before, held = frontier.token_ids(), dec.num_branches
        judge = Judge(
            lambda problem: f" {problem.prompt} 09", len, num_samples=2, max_new_tokens=6, stop=None, sampling=GREEDY
        )
        scores = await judge(frontier, PROBLEM)
        starts = [dec.encode(prompt) for prompt in ("the", "the", "a", "a")]
        asked = [start + ids + dec.encode(" the 09") for start, ids in zip(starts, before, strict=True)]
        answers = await dec.generate_async(asked, max_new_tokens=6, sampling=GREEDY)
        assert scores.tolist() == [len(out.text) for [out] in answers]
        assert frontier.scores.tolist() == scores.tolist()
        assert (frontier.token_ids(), dec.num_branches) == (before, held)

    dec.run(run())


def test_value_of_tree_of_thoughts(make_decoder, monkeypatch):
    says = {"good": " sure\n", "fair": " likely\n", "bad": " impossible\n", "odd": " unlikely\n"}
    scripted.follow(monkeypatch, "Evaluation:", lambda before: says[before.split("\n")[1]])
    dec = make_decoder(scripted.ScriptedModel(), tokenizer=scripted.ByteTokenizer())

    async def run():
        frontier = (await dec.roots("24 from 4 6\n")).fork(4)
        frontier.append(["bad\n", "fair\n", "odd\n", "good\n"])
        scores = await value_judge()(frontier, PROBLEM)
        assert scores.tolist() == [0.001, 1, 0, 20]
        assert frontier.prune(1).texts() == ["good\n"]

    dec.run(run())


def test_the_last_word_of_a_judgement_counts():
    assert parse_value("Impossible? No: it is SURE.") == 20
    assert parse_value("unlikely") == parse_value("") == 0


@pytest.mark.parametrize(
    ("answer", "vote"),
    [
        (" 2.", 2),
        ("Of 3, the best choice is choice 12", 12),
        ("the best choice is 1? The best choice is 2", 2),
        ("", None),
    ],
)
def test_votes_are_numbers(answer, vote):
    assert parse_vote(answer) == vote


def good_choice(before):
    """Votes for the good candidate of the latest list."""
    listed = before.rpartition("several ways")[2].split("Choice ")[1:]
    assert [choice[0] for choice in listed] == [str(k) for k in range(1, len(listed) + 1)]
    return f" {next(choice[0] for choice in listed if 'good' in choice)}.\n"


def test_votes_name_a_candidate_of_each_tree(make_decoder, monkeypatch):
    scripted.follow(monkeypatch, "The best choice is", good_choice)
    dec = make_decoder(scripted.ScriptedModel(), tokenizer=scripted.ByteTokenizer(), num_pages=1000)

    async def run():
        frontier = (await dec.roots(["plan a\n", "plan b\n"])).fork([3, 2])
        frontier.append(["one", "two", "a good one", "good", "three"])
        before, held = frontier.token_ids(), dec.num_branches
        scores = await Vote(num_samples=2)(frontier, PROBLEM)
        assert scores.tolist() == [0, 0, 1, 1, 0]
        assert frontier.scores.tolist() == scores.tolist()
        assert (frontier.token_ids(), dec.num_branches) == (before, held)

    dec.run(run())


def test_a_score_is_a_share_of_the_votes(make_decoder, monkeypatch):
    scripted.follow(monkeypatch, "The best choice is", lambda before: [" ", "139", "\n"])  # there is no ninth
    dec = make_decoder(scripted.ScriptedModel(), tokenizer=scripted.ByteTokenizer(), num_pages=1000)

    async def run():
        frontier = (await dec.roots(["plan\n"], sampling=td.Sampling(seed=1))).fork(3)
        frontier.append(["a", "b", "c"])
        return await Vote(num_samples=30)(frontier, PROBLEM)

    scores = dec.run(run())
    counts = np.round(scores * 30)
    assert (scores == counts / 30).all()
    assert counts[1] == 0
    assert counts[0] > 0
    assert counts[2] > 0
    assert counts.sum() < 30


def test_votes_reuse_the_prompts_pages(make_decoder, monkeypatch):
    scripted.follow(monkeypatch, "The best choice is", lambda before: " 1\n")
    dec = make_decoder(scripted.ScriptedModel(), tokenizer=scripted.ByteTokenizer(), num_pages=1000)

    async def run():
        frontier = (await dec.roots(["a long prompt " * 20])).fork(2)
        frontier.append(["a", "b"])
        before = dec.stats.num_prefill_tokens + dec.stats.num_decode_tokens
        await Vote(num_samples=4)(frontier, PROBLEM)
        return dec.stats.num_prefill_tokens + dec.stats.num_decode_tokens - before

    asked = len(Vote().prompt) + 2 * len("Choice 1:\na\n\n")
    assert dec.run(run()) <= 4 * (asked + dec.engine.pool.page_size + len(" 1\n"))


def test_as_scorer():
    assert as_scorer(None) == Likelihood()
    assert as_scorer(length) == TextScorer(length)
    for scorer in (TextScorer(length), Likelihood(), Vote(), value_judge()):
        assert as_scorer(scorer) is scorer
    for wrong in (3, "sure", TextScorer, lambda text: 0.0):
        with pytest.raises(TypeError, match=r"scorer: expected None, a function \(problem, text\) or a Scorer, got"):
            as_scorer(wrong)


def test_a_scorer_of_ones_own():
    class Flat:
        probability = True

        async def __call__(self, frontier, problem):
            return np.ones(len(frontier))

    mine = Flat()
    assert as_scorer(mine) is mine


def test_choice_0_is_nobodys(make_decoder, monkeypatch):
    scripted.follow(monkeypatch, "The best choice is", lambda before: " 0.\n")
    dec = make_decoder(scripted.ScriptedModel(), tokenizer=scripted.ByteTokenizer(), num_pages=1000)

    async def run():
        frontier = (await dec.roots(["plan\n"])).fork(3)
        frontier.append(["a", "b", "c"])
        return await Vote(num_samples=4)(frontier, PROBLEM)

    assert dec.run(run()).tolist() == [0, 0, 0]
