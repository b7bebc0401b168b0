"""The CUDA kernel of beam_update, run on the host, against the CPU kernel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import cuda_library
from support.beam_update_cases import POOL, i32, make_args
from support.logits_kernels import beam_update, cloned
from support.simt_kernels import SEEDS

from treedecode import ops


def assert_equals_the_cpu(args, **options):
    want, got = cloned(args), cloned(args)
    running = ops.beam_update(**want)
    for a, b in zip(beam_update(got, **options), running, strict=True):
        assert torch.equal(a, b)
    for name in (*POOL, "done"):
        assert torch.equal(got[name], want[name]), name
    return want


@st.composite
def searches(draw):
    num_groups = draw(st.integers(1, 3))
    return {
        "num_beams": [draw(st.sampled_from([1, 2, 3, 8, 70])) for _ in range(num_groups)],
        "num_eos": draw(st.integers(0, 3)),
        "length_penalty": draw(st.sampled_from([0.0, 0.5, 1.0, -1.0])),
        "early_stopping": draw(st.sampled_from([False, True, "never"])),
        "use_stop": draw(st.booleans()),
        "vocab": draw(st.sampled_from([3, 6, 40])),
        "scale": draw(st.sampled_from([1 / 16, 8.0, 1e8])),  # rounding of -1e9 + score hides small scores only
        "seed": draw(st.integers(0, 2**31)),
        "schedule": draw(st.sampled_from(SEEDS)),
    }


@settings(max_examples=40, deadline=None)
@given(searches())
def test_equals_the_cpu_kernel(search):
    generator = torch.Generator().manual_seed(search["seed"])
    num_beams, eos = search["num_beams"], list(range(search["num_eos"]))
    num_groups, limit = len(num_beams), 4
    width = ops.beam_candidates(max(num_beams), len(eos)) + 3
    beam_indptr = torch.tensor([0, *num_beams]).cumsum(0).to(torch.int32)
    state = {
        "pool_scores": torch.full((sum(num_beams),), -1e9),
        **{name: torch.zeros(sum(num_beams), dtype=torch.int32) for name in POOL[1:]},
        "done": torch.zeros(num_groups, dtype=torch.bool),
    }
    for step in range(limit):
        row_indptr = torch.arange(num_groups + 1, dtype=torch.int32) if step == 0 else beam_indptr
        draws = torch.randint(0, 300, (num_groups, width), generator=generator)  # exact in fp32, and full of ties
        scores = -draws.mul(search["scale"]).sort(dim=1)[0] - step
        parent = torch.stack(
            [torch.randint(int(a), int(b), (width,), generator=generator) for a, b in row_indptr.unfold(0, 2, 1)]
        ).int()
        token = torch.randint(0, search["vocab"], (num_groups, width), generator=generator).int()
        absent = int(torch.randint(0, width, (1,), generator=generator)) if search["vocab"] == 3 else width
        scores[0, absent:], parent[0, absent:], token[0, absent:] = -torch.inf, -1, -1
        args = {
            "scores": scores,
            "parent": parent,
            "token": token,
            "row_indptr": row_indptr,
            "beam_indptr": beam_indptr,
            "gen_lens": torch.full((num_groups,), step, dtype=torch.int32),
            "max_new_tokens": torch.full((num_groups,), limit, dtype=torch.int32),
            "eos_ids": i32(eos),
            "length_penalty": search["length_penalty"],
            "early_stopping": search["early_stopping"],
            "stop": torch.rand(num_groups, width, generator=generator) < 0.3 if search["use_stop"] else None,
        }
        after = assert_equals_the_cpu(args | state, seed=search["schedule"], resident_blocks=2)
        state = {name: after[name] for name in (*POOL, "done")}


def test_wide_beam():
    """There are more hits and old entries than threads in a block, and they interleave."""
    k = 300
    args = make_args(
        k,
        [(-float(i), i % k, 5 if i % 2 else 7) for i in range(2 * k)],
        eos=[5],
        pool=[(-2.0 * i, 1, i, 9) for i in range(k)],
        length_penalty=0.0,
    )
    for seed in SEEDS:
        assert_equals_the_cpu(args, seed=seed)


GOOD = [(-1.0, 0, 5), (-2.0, 1, 7), (-3.0, 0, 8), (-4.0, 1, 6)]
REFUSED = [
    ("scores: expected descending", {"scores": torch.tensor([[-1.0, -2.0, -1.5, -4.0]])}),
    ("scores: expected descending", {"scores": torch.tensor([[torch.nan, -2.0, -3.0, -4.0]])}),
    ("scores: expected at least", {"eos_ids": i32([5, 6])}),
    ("parent: expected -1 or a row", {"parent": i32([[0, 1, 2, 0]])}),
    ("parent: expected -1 or a row", {"parent": i32([[0, 1, -7, -1]])}),
    ("parent: expected absent", {"parent": i32([[0, -1, 1, 0]])}),
    ("row_indptr: expected at least one row", {"row_indptr": i32([0, 0])}),
    ("row_indptr: expected to start at 0", {"row_indptr": i32([1, 2])}),
    ("gen_lens: expected 0", {"gen_lens": i32([-1])}),
    ("gen_lens: expected 0", {"gen_lens": i32([100])}),
]


@pytest.mark.parametrize(("message", "change"), REFUSED, ids=str)
def test_what_the_cpu_refuses_is_marked(message, change):
    args = make_args(2, GOOD, eos=[5]) | change
    with pytest.raises(ValueError, match=message):
        ops.beam_update(**cloned(args))
    before = cloned(args)
    scores, parent, token = beam_update(args)
    assert scores.isnan().all()
    assert parent.tolist() == token.tolist() == [-1, -1]
    for name in (*POOL, "done"):
        assert torch.equal(args[name], before[name]), name


@pytest.mark.parametrize("beam_indptr", [[0, 1], [1, 2], [0, 3], [0, -1], [2, 0], [0, 2**30]])
def test_beams_of_no_group_are_not_touched(beam_indptr):
    args = make_args(2, GOOD, eos=[5]) | {"beam_indptr": i32(beam_indptr)}
    before = cloned(args)
    beam_update(args)
    for name in (*POOL, "done"):
        assert torch.equal(args[name], before[name]), name


def test_a_refused_group_does_not_disturb_its_neighbours():
    one = make_args(2, GOOD, eos=[5])
    both = {name: torch.cat([value, value]) if torch.is_tensor(value) else value for name, value in one.items()}
    both |= {"eos_ids": i32([5]), "row_indptr": i32([0, 2, 4]), "beam_indptr": i32([0, 2, 4])}  # parents 0 and 1 again
    running = beam_update(both)
    want = ops.beam_update(**one)
    for got, column in zip(running, want, strict=True):
        assert torch.equal(got[:2], column)
    assert running[0][2:].isnan().all()
    assert both["done"].tolist() == [bool(one["done"]), False]


@cuda_library.needs_library
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({}, ValueError, "scores: expected a CUDA tensor, got cpu"),
        ({"scores": torch.zeros(1, 4, dtype=torch.float64)}, TypeError, "scores: expected dtype float32, got float64"),
        ({"scores": torch.zeros(1, 3)}, ValueError, r"parent: expected shape the shape of scores = \[1, 3\]"),
        ({"token": torch.zeros(1, 4, dtype=torch.int64)}, TypeError, "token: expected dtype int32, got int64"),
        ({"pool_lens": i32([0])}, ValueError, r"pool_lens: expected shape the shape of pool_scores = \[2\], got \[1\]"),
        ({"done": i32([0])}, TypeError, "done: expected dtype bool, got int32"),
        ({"length_penalty": torch.inf}, ValueError, "length_penalty: expected a finite number, got inf"),
        ({"early_stopping": 3}, ValueError, "early_stopping: expected 0, 1 or 2, got 3"),
        ({"stop": torch.zeros(1, 3, dtype=torch.bool)}, ValueError, "stop: expected shape the shape of scores"),
    ],
)
def test_bad_arguments(change, error, message):
    args = {"length_penalty": 1.0, "early_stopping": 0, "stop": None} | make_args(2, GOOD, eos=[5]) | change
    names = ("scores", "parent", "token", "row_indptr", "beam_indptr", *POOL, "done")
    names += ("gen_lens", "max_new_tokens", "eos_ids", "length_penalty", "early_stopping", "stop")
    with pytest.raises(error, match=message):
        cuda_library.call("beam_update", *(args[name] for name in names))
