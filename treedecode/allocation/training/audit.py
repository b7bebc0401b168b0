"""Fairness audit: compares the compute that groups of problems are given with the compute that they can use."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from treedecode.allocation.training.resampling import bootstrap

MIN_STRATUM = 10  # problems; smaller ones hold few of any group


@dataclass(frozen=True)
class Allocation:
    """The compute that `n` problems were given and needed.

    A problem may occur several times, with its chains in other orders.

    Attributes:
        groups: `[n]` str.
        problems: `[n]` int64 ids of the problems.
        difficulty: `[n]` shares of right chains among all of the problem.
        chains: `[n]` chains given.
        spend: `[n]` costs in units of the cost of a single chain.
        probe_spend: `[n]` the part of `spend` that the probes cost.
        oracle_spend: `[n]` cost of the problem when the oracle divides the same budget.
        needed: `[n]` chains with which the answer would have been right; more than `available` where no number is.
        probed: `[n]` bool: the answer after the probes is right.
        right: `[n]` bool: the final answer is right.
        available: chains of a problem in the data.
    """

    groups: np.ndarray
    problems: np.ndarray
    difficulty: np.ndarray
    chains: np.ndarray
    spend: np.ndarray
    probe_spend: np.ndarray
    oracle_spend: np.ndarray
    needed: np.ndarray
    probed: np.ndarray
    right: np.ndarray
    available: int


def strata_of(difficulty: np.ndarray, min_size: int = MIN_STRATUM) -> np.ndarray:
    """Groups problems into strata of equal difficulty; neighbours go together until they are `min_size` problems.

    Returns:
        `[n]` int64 stratum of each problem.
    """
    _, index, counts = np.unique(difficulty, return_inverse=True, return_counts=True)
    strata, size, remaining = np.zeros(len(counts), np.int64), 0, int(counts.sum())
    for i, count in enumerate(counts):
        if i:
            is_full = size >= min_size and remaining >= min_size  # and the remaining ones are enough for another
            strata[i] = strata[i - 1] + is_full
            size = 0 if is_full else size
        size, remaining = size + count, remaining - count
    return strata[index]


def spend_gap(spend: np.ndarray, member: np.ndarray, strata: np.ndarray) -> float:
    """Computes the mean spend on a group's problems, less that on others of the same difficulty.

    It is the mean over strata of the difference of means, weighted by the group's size there (direct standardisation).
    Strata without both are left out; nan where all are.

    Args:
        member: `[n]` bool: the problem is of the group.
    """
    group_sizes = np.bincount(strata, member)
    other_sizes = np.bincount(strata, ~member)
    both = (group_sizes > 0) & (other_sizes > 0)
    if not both.any():
        return float("nan")
    sums = np.bincount(strata, spend * member), np.bincount(strata, spend * ~member)
    gaps = sums[0][both] / group_sizes[both] - sums[1][both] / other_sizes[both]
    return float(np.average(gaps, weights=group_sizes[both]))


def permutation_test(
    spend: np.ndarray, member: np.ndarray, strata: np.ndarray, *, permutations: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Computes the spend gap, and its two-sided p-value: the chance of a gap as large without a difference.

    Under the null hypothesis membership is exchangeable among problems of a stratum, so it is shuffled within strata.
    The p-value counts the observed gap among the permutations (Phipson and Smyth, 2010), so it is valid and never 0.

    Args:
        spend, member, strata: `[n]`, one entry per problem, as repeats of a problem are not exchangeable.
    """
    observed = spend_gap(spend, member, strata)
    if np.isnan(observed):
        return observed, float("nan")
    rng = np.random.default_rng(seed)
    order = np.argsort(strata, kind="stable")
    spend, member, strata = spend[order], member[order], strata[order]
    as_extreme = 1
    for _ in range(permutations):
        # sorted by (stratum, random): each stratum's members in a random order
        shuffled = member[np.lexsort((rng.random(len(member)), strata))]
        as_extreme += abs(spend_gap(spend, shuffled, strata)) >= abs(observed) - 1e-12
    return observed, as_extreme / (permutations + 1)


def audit(
    allocation: Allocation, *, min_size: int = MIN_STRATUM, permutations: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Reports spend, accuracy, gain per unit of spend, false-low-budget rate and spend gaps by group.

    The gain is of accuracy over that after the probes, per chain beyond the group's mean spend on the probes. A problem
    has a false low budget if it was given fewer chains than would have made it right, some number of chains would have,
    and it came out wrong.

    A group's spend gap alone is no sign of unfairness. The oracle, which knows only whether the answer is right, the
    rate of right chains and their costs, has a gap too where groups differ in these. So `excess_gap` is the gap beyond
    the oracle's, with a 95% bootstrap interval over problems (strata stay), and the permutation test is of it. Its null
    hypothesis is that among problems with the same share of right chains the group says nothing about a policy's spend
    beyond the oracle's. A rejection asks a question and is no verdict: a policy that never sees the group may be
    rejected where prompts tell more of the rate than that share does, and where costs differ by group, as it need not
    weigh them like the oracle (of a simulated policy, with chains of one group costing twice as much, in 1 run of 3).

    Args:
        min_size: of a stratum (`strata_of`).

    Returns:
        figures by group, as JSON.
    """
    report: dict[str, Any] = {}
    is_solvable = allocation.needed <= allocation.available
    is_false_low = is_solvable & (allocation.chains < allocation.needed) & ~allocation.right
    _, first, index = np.unique(allocation.problems, return_index=True, return_inverse=True)
    # means over a problem's repeats
    spend, oracle = (np.bincount(index, x) / np.bincount(index) for x in (allocation.spend, allocation.oracle_spend))
    excess = spend - oracle
    strata = strata_of(allocation.difficulty[first], min_size)
    for group in np.unique(allocation.groups):
        rows, member = allocation.groups == group, allocation.groups[first] == group

        def gap_of(problems: np.ndarray, member: np.ndarray = member) -> float:
            return spend_gap(excess[problems], member[problems], strata[problems])

        gap, p_value = permutation_test(excess, member, strata, permutations=permutations, seed=seed)
        spend_beyond_probes = allocation.spend[rows].mean() - allocation.probe_spend[rows].mean()
        gain = allocation.right[rows].mean() - allocation.probed[rows].mean()
        num_solvable = int((is_solvable & rows).sum())
        report[str(group)] = {
            "problems": int(member.sum()),
            "spend": float(allocation.spend[rows].mean()),
            "accuracy": float(allocation.right[rows].mean()),
            "gain_per_unit": float(gain / spend_beyond_probes) if spend_beyond_probes > 0 else None,
            "false_low_budget_rate": float((is_false_low & rows).sum() / num_solvable) if num_solvable else None,
            "spend_gap": spend_gap(spend, member, strata),
            "oracle_spend_gap": spend_gap(oracle, member, strata),
            "excess_gap": gap,
            "excess_gap_interval": list(bootstrap(gap_of, len(first), resamples=permutations, seed=seed)),
            "p_value": p_value,
        }
    return report
