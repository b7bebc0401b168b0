"""The kernels of beam_prune, sample and beam_update need each of their barriers: without it they fail on the host."""

import functools
import math
import re

import pytest
import torch
from support import simt_kernels as simt
from support.beam_prune_cases import indptr
from support.beam_update_cases import POOL, make_args
from support.logits_cases import make_logits
from support.logits_kernels import beam_prune, beam_update, cloned, sample
from support.paths import ROOT
from support.sample_cases import per_row

SOURCES = ROOT / "csrc" / "cuda"


def with_included(names):
    """Returns the headers `names` and all headers that they include."""
    found, left = set(), [SOURCES / name for name in names]
    while left:
        path = left.pop()
        if path not in found:
            found.add(path)
            left += [
                (path.parent / name).resolve() for name in re.findall(r'#include "([\w./]+\.cuh)"', path.read_text())
            ]
    return sorted(found)


BARRIERS = [
    f"{path.name}:{number}"
    for path in with_included(["logits/beam_prune.cuh", "logits/sample.cuh", "logits/beam_update.cuh"])
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if "ptx::sync_threads" in line
]


def pruned(logits, groups, k, **options):
    return functools.partial(beam_prune, logits, torch.zeros(len(logits)), indptr(*groups), k, **options)


def updated(num_beams, num_old, bad_rank=None):
    """Returns a call of beam_update: every other candidate ends, and the pool has room for some of them."""
    candidates = [(-float(i), -2 if i == bad_rank else i % num_beams, 5 + i % 2) for i in range(2 * num_beams)]
    pool = [(-2.0 * i, 1, i, 9) for i in range(num_old)]
    args = make_args(num_beams, candidates, eos=[5], pool=pool, length_penalty=0.0, early_stopping=True)

    def call(**options):
        after = cloned(args)
        return *beam_update(after, **options), *(after[name] for name in (*POOL, "done"))

    return call


def sampled(logits, chunk_len=None, **filters):
    settings = per_row(len(logits), **filters, seed=torch.arange(len(logits)))
    return functools.partial(sample, logits, settings, chunk_len=chunk_len)


def with_nan():
    logits = make_logits("normal", 2, 64)
    logits[1, 40] = math.nan
    return logits


CASES = {
    "a bad candidate": updated(40, 0, bad_rank=70),
    "a pool that is full then": updated(140, 70),
    "a pool with room left": updated(60, 10),
    "drawn from all tokens": sampled(make_logits("flat", 1, 1024), temperature=0.7),
    "drawn from few": sampled(make_logits("normal", 1, 400), 256, top_k=20, top_p=0.9),
    "drawn from many": sampled(make_logits("normal", 1, 700), 256, top_k=300, top_p=0.9),
    "drawn from more than the best": sampled(make_logits("normal", 1, 400), 256, top_k=300, top_p=0.9),
    "NaN": pruned(with_nan(), [2], 3, is_logprobs=True),
    "few candidates": pruned(make_logits("normal", 3, 100), [1, 2], 5, chunk_len=64, resident_blocks=3),
    "candidates of four blocks": pruned(torch.full((4, 256), -math.inf), [4], 256, resident_blocks=4),
}
# A warp of one block must write late, while another block merges; that needs two priorities drawn at the right moment.
SEEDS = dict.fromkeys(CASES, range(12)) | {"candidates of four blocks": range(60)}


@functools.cache
def intact(case):
    """Returns the results of a case with all barriers, and the barriers that it reaches."""
    simt.barriers_seen()
    return CASES[case](seed=0), set(simt.barriers_seen())


def goes_wrong(case, barrier):
    want, _ = intact(case)
    for seed in SEEDS[case]:
        got = CASES[case](seed=seed, drop=barrier)
        if not all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, want, strict=True)):
            return True
    return False


@pytest.mark.parametrize("barrier", BARRIERS)
def test_every_barrier_is_needed(barrier):
    """Without the barrier a result is wrong, or depends on the order of threads."""
    cases = [case for case in CASES if barrier in intact(case)[1]]
    assert cases, "no case comes by"
    assert any(simt.is_noticed(functools.partial(goes_wrong, case, barrier)) for case in cases)


@pytest.mark.parametrize("case", CASES)
def test_with_all_barriers_nothing_is_noticed(case):
    """With all barriers, the check finds neither a wrong result nor a run that takes too long."""
    assert not simt.is_noticed(functools.partial(goes_wrong, case, None))
