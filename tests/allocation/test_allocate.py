"""Division of a budget: closed forms, brute force over whole menus, the price of an online allocator."""

import asyncio
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treedecode.allocation.allocate import Bid, Grant, allocate, chain_gains, chain_needs, grant_at_price, steps_of
from treedecode.allocation.allocators import BidHistory, OnlineAllocator, Policy


def bid(alpha=1.0, beta=1.0, unsolved=1.0, cost=1.0, trees=(), tree_costs=(), num_chains=0, spent=0.0, single=1.0):
    return Bid(unsolved, alpha, beta, cost, trees, tree_costs, single, spent, num_chains)


def integral(f, alpha, beta):
    """E[f(p)] for p ~ Beta(alpha, beta) >= 1 each: the midpoint rule on 20,000 points."""
    p = (np.arange(20_000) + 0.5) / 20_000
    density = p ** (alpha - 1) * (1 - p) ** (beta - 1)
    return float((f(p) * density).sum() / density.sum())


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (2.5, 4.0), (1.0, 30.0), (8.0, 1.5)])
def test_gains_of_chains_are_the_expectations(alpha, beta):
    gains = chain_gains(alpha, beta, 0.7, 12)
    exact = [0.7 * integral(lambda p, n=n: p * (1 - p) ** n, alpha, beta) for n in range(12)]
    np.testing.assert_allclose(gains, exact, rtol=1e-5)
    coverage = [0.7 * integral(lambda p, n=n: 1 - (1 - p) ** (n + 1), alpha, beta) for n in range(12)]
    np.testing.assert_allclose(np.cumsum(gains), coverage, rtol=1e-5)


def test_a_known_rate_gives_the_geometric_series():
    np.testing.assert_allclose(chain_gains(0.3e12, 0.7e12, 1.0, 5), 0.3 * 0.7 ** np.arange(5), rtol=1e-9)
    assert chain_gains(1, 1, 1, 0).shape == (0,)
    np.testing.assert_allclose(chain_gains(2, 3, 0.5, 1), [0.2])


rates = st.floats(0.05, 5)
costs = st.floats(0.2, 3)


@st.composite
def bids(draw, max_trees=2):
    count = draw(st.integers(0, max_trees))
    return bid(
        draw(rates),
        draw(rates),
        draw(st.floats(0, 1)),
        draw(costs),
        tuple(draw(st.floats(0, 1)) for _ in range(count)),
        tuple(draw(st.floats(0.2, 8)) for _ in range(count)),
        draw(st.integers(0, 2)),
    )


def all_fail(alpha, beta, count):
    """E[(1 - p)^count] = B(alpha, beta + count) / B(alpha, beta)."""
    logs = [math.lgamma(beta + n) - math.lgamma(alpha + beta + n) for n in (count, 0)]
    return math.exp(logs[0] - logs[1])


def menu(one, max_chains):
    """Every item of a menu: (grant, gain, cost). The n-th chain is paid for only where none before it has mended the
    answer, which none does that is right."""
    gains = np.cumsum(chain_gains(one.alpha, one.beta, one.unsolved, max(0, max_chains - one.num_chains)))
    yield Grant(), 0.0, 0.0
    cost = 0.0
    for n, gain in enumerate(gains, 1):
        cost += one.chain_cost * (1 - one.unsolved + one.unsolved * all_fail(one.alpha, one.beta, n - 1))
        yield Grant(n), gain, cost
    for i, (p, cost) in enumerate(zip(one.trees, one.tree_costs, strict=True)):
        yield Grant(tree=i), one.unsolved * p, cost


@settings(deadline=None, max_examples=60)
@given(st.lists(bids(), min_size=1, max_size=3), st.floats(0, 12))
def test_no_allocation_is_better_by_more_than_one_step(problems, budget):
    max_chains = 4
    menus = [{grant: (gain, cost) for grant, gain, cost in menu(one, max_chains)} for one in problems]
    best = max(
        sum(gain for gain, _ in items)
        for items in itertools.product(*(menu.values() for menu in menus))
        if sum(cost for _, cost in items) <= budget
    )
    grants, price = allocate(problems, budget, max_chains=max_chains)
    granted = [menu[grant] for menu, grant in zip(menus, grants, strict=True)]
    gain, cost = sum(g for g, _ in granted), sum(c for _, c in granted)
    assert cost <= budget + 1e-9
    steps = [steps_of(one, max_chains).gains for one in problems]
    assert gain >= best - max(step.max(initial=0) for step in steps) - 1e-9
    if price == 0:  # enough for all
        assert gain == pytest.approx(sum(max(g for g, _ in menu.values()) for menu in menus))


@settings(deadline=None, max_examples=60)
@given(st.lists(bids(), min_size=1, max_size=3), st.floats(0.01, 0.6))
def test_what_a_price_buys_no_allocation_of_its_cost_betters(problems, price):
    menus = [{grant: (gain, cost) for grant, gain, cost in menu(bid, 4)} for bid in problems]
    bought = [items[grant_at_price(bid, price, 4)] for bid, items in zip(problems, menus, strict=True)]
    gain, cost = sum(g for g, _ in bought), sum(c for _, c in bought)
    best = max(
        sum(g for g, _ in items)
        for items in itertools.product(*(menu.values() for menu in menus))
        if sum(c for _, c in items) <= cost
    )
    assert gain == pytest.approx(best, abs=1e-9)
    grants, _ = allocate(problems, cost * (1 + 1e-9), max_chains=4)
    assert sum(items[grant][0] for items, grant in zip(menus, grants, strict=True)) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("wave", [1, 3])
def test_chains_are_needed_where_the_waves_before_have_failed(wave):
    for unsolved in (1.0, 0.3, 0.0):
        needs = chain_needs(2.0, 3.0, unsolved, 7, wave)
        failed = [integral(lambda p, n=n: (1 - p) ** (n // wave * wave), 2.0, 3.0) for n in range(7)]
        np.testing.assert_allclose(needs, 1 - unsolved + unsolved * np.array(failed), rtol=1e-5)
    assert chain_needs(2.0, 3.0, 0.5, 0, wave).shape == (0,)


def test_a_plan_pays_for_a_chain_what_a_look_after_those_before_it_does():
    """Gain over need is P(wrong | so many chains mended nothing) E[p | so many failed], by Bayes' rule."""
    alpha, beta, unsolved = 1.2, 3.0, 0.4
    gains, needs = chain_gains(alpha, beta, unsolved, 6), chain_needs(alpha, beta, unsolved, 6)
    for n in range(6):
        failed = integral(lambda p, n=n: (1 - p) ** n, alpha, beta)
        still_wrong = unsolved * failed / (1 - unsolved + unsolved * failed)
        assert gains[n] / needs[n] == pytest.approx(still_wrong * alpha / (alpha + beta + n), rel=1e-5)


@settings(deadline=None, max_examples=40)
@given(bids(), st.floats(0, 0.6))
def test_a_price_takes_what_is_worth_most_at_it(one, price):
    grant = grant_at_price(one, price, 6)
    worth = {other: gain - price * cost for other, gain, cost in menu(one, 6)}
    assert worth[grant] == pytest.approx(max(worth.values()), abs=1e-12)


def test_the_floor_comes_first_and_is_part_of_the_budget():
    hopeless, easy = bid(0.01, 100.0), bid(5.0, 1.0)
    grants, _ = allocate([hopeless, easy], 4, max_chains=8, floor=2)
    assert grants == [Grant(2), Grant(2)]
    # two chains solve the easy one with probability 0.95: the others that it may have are hardly ever needed
    grants, _ = allocate([hopeless, easy], 5, max_chains=8, floor=2)
    assert grants == [Grant(2), Grant(8)]
    [grant], _ = allocate([bid(num_chains=3)], 0, max_chains=8, floor=2)
    assert grant.ends


def test_solved_problems_get_nothing_whatever_is_left():
    grants, price = allocate([bid(unsolved=0.0), bid()], 100, max_chains=5)
    assert grants == [Grant(), Grant(5)]
    assert price == 0


def test_a_step_that_does_not_fit_leaves_the_budget_to_cheaper_ones():
    dear, cheap = bid(9.0, 1.0, cost=10.0), bid(0.1, 5.0, cost=1.0)
    grants, price = allocate([dear, cheap], 5, max_chains=4)
    assert grants == [Grant(), Grant(4)]
    assert price == pytest.approx(0.09)


@pytest.mark.parametrize(("budget", "start"), [(2.5, 0.05), (4.0, 0.5), (7.0, 0.05)])
def test_online_spending_converges_to_the_budget(budget, start):
    """The mean over a stream of 1,000 problems, whose chains succeed at rates that the bids know."""
    rng = np.random.default_rng(0)
    policy = Policy(budget, max_chains=24, wave=4, floor=0)
    names = [str(i) for i in range(1000)]
    allocator = OnlineAllocator(policy, names, {}, price=start, step=0.05, lag=16)
    spent, lengths = np.zeros(len(names)), rng.uniform(5, 50, len(names))
    ended = 0
    for i, name in enumerate(names):
        while ended <= i - 16:  # in whatever order: only what came `lag` before counts
            allocator.leave(names[ended], spent[ended])
            ended += 1
        rate, length = rng.beta(0.4, 1.2), lengths[i]
        chains, solved = 2, rng.random() < 1 - (1 - rate) ** 2
        while True:
            beliefs = rate * 1e6, (1 - rate) * 1e6, float(not solved)
            one = bid(*beliefs, length, single=length, num_chains=chains, spent=chains * length)
            grant = drive(allocator, name, one)
            if grant.ends:
                break
            solved = solved or rng.random() < 1 - (1 - rate) ** grant.num_chains
            chains += grant.num_chains
        spent[i] = chains * length
    # the way from the first price to where it settles counts, and no more than that
    settled = abs(np.log(allocator.price / start)) / (0.05 * len(names))
    assert spent.sum() / lengths.sum() == pytest.approx(budget, rel=settled + 0.03)
    assert spent[500:].sum() / lengths[500:].sum() == pytest.approx(budget, rel=0.05)


def drive(allocator, name, one):
    """A decision that needs not wait."""
    coroutine = allocator.decide(FakeSearch(name), one)
    with pytest.raises(StopIteration) as end:
        coroutine.send(None)
    return end.value.value


class FakeSearch:
    """As much of a Search as an online allocator sees."""

    def __init__(self, name):
        self.problem = self
        self.id = name


def test_an_online_price_depends_on_earlier_problems_only_and_is_restored_from_histories():
    policy, lag = Policy(3.0, max_chains=16, wave=4, floor=0), 3
    names = [str(i) for i in range(12)]
    spends = np.random.default_rng(3).uniform(2, 9, 12)
    firsts = [bid(0.3 + i / 4, 1.5, unsolved=0.9 - i / 20, num_chains=2, spent=2.0) for i in range(12)]

    def prices(order, known=()):
        histories = {names[i]: BidHistory([firsts[i]], spends[i]) for i in known}
        allocator = OnlineAllocator(policy, names, histories, price=0.1, step=0.05, lag=lag)
        for i in order:
            allocator._states[i].take(firsts[i])
            allocator.leave(names[i], spends[i])
        return allocator._opening.known, allocator._prices.known

    straight = prices(range(12))
    assert prices([3, 1, 0, 2, *range(11, 3, -1)]) == straight
    assert prices(range(5, 12), known=(4, 2, 0, 1, 3)) == straight
    opening, later = straight
    assert len(opening) == len({one.value for one in opening}) == lag
    assert len(later) == 13
    assert later[0].value == 0.1
    assert len({one.value for one in later}) > 10


def test_the_first_problems_of_a_stream_spend_the_budget_by_their_bids():
    """There is no other spending that the first `lag` could go by; the mean of many streams' first problems."""
    rng = np.random.default_rng(0)
    for budget in (2.0, 4.0):
        means = []
        for _ in range(30):
            policy, names = Policy(budget, max_chains=24, wave=1, floor=0), [str(i) for i in range(16)]
            allocator = OnlineAllocator(policy, names, {}, price=0.05, step=0.05, lag=16)
            lengths, spent = rng.uniform(5, 50, 16), 0.0
            for i, length in enumerate(lengths):
                alpha, beta = rng.uniform(0.3, 2), rng.uniform(0.5, 6)
                rate, chains = rng.beta(alpha, beta), 1
                solved = rng.random() < rate
                while True:  # a gate that is right: what it believes after so many failures
                    belief = alpha, beta + chains, float(not solved)
                    one = bid(*belief, length, single=length, num_chains=chains, spent=chains * length)
                    if drive(allocator, str(i), one).ends:
                        break
                    solved = solved or rng.random() < rate
                    chains += 1
                spent += chains * length
            means.append(spent / lengths.sum())
        assert abs(np.mean(means) - budget) < 3 * np.std(means) / 30**0.5 + 0.05 * budget


def test_a_problem_waits_for_the_first_bids_before_it():
    async def run():
        allocator = OnlineAllocator(Policy(3.0, 8, 1, 0), ["a", "b", "c", "d"], {}, price=0.1, step=0.05, lag=2)
        second = asyncio.ensure_future(allocator.decide(FakeSearch("b"), bid(num_chains=1, spent=1.0)))
        third = asyncio.ensure_future(allocator.decide(FakeSearch("c"), bid(num_chains=1, spent=1.0)))
        await asyncio.sleep(0)
        assert not second.done()
        await allocator.decide(FakeSearch("a"), bid(num_chains=1, spent=1.0))
        await asyncio.wait_for(second, 1)
        fourth = asyncio.ensure_future(allocator.decide(FakeSearch("d"), bid(num_chains=1, spent=1.0)))
        await asyncio.sleep(0)
        assert not third.done()
        assert allocator.price == 0.1
        allocator.leave("a", 7.0)
        await asyncio.wait_for(third, 1)  # the one before it is under way still
        assert allocator.price > 0.1
        await asyncio.sleep(0)
        assert not fourth.done()
        allocator.leave("b", 7.0)
        await asyncio.wait_for(fourth, 1)

    asyncio.run(run())
    # one that ended without a bid keeps nobody waiting
    allocator = OnlineAllocator(Policy(3.0, 8, 1, 0), ["a", "b"], {}, price=0.1, step=0.05, lag=2)
    allocator.leave("a", 0.0)
    drive(allocator, "b", bid(num_chains=1, spent=1.0))
