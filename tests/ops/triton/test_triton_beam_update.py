"""The Triton kernel of beam_update, in the interpreter: it writes the bits that the CPU op writes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.beam_update_cases import POOL, i32, make_args
from support.triton_cases import assert_same_error

from treedecode import ops, triton_kernels

NAMES = ("scores", "parent", "token", "row_indptr", "beam_indptr", *POOL, "done", "gen_lens", "max_new_tokens")
WRITTEN = (*POOL, "done")
MODES = {False: 0, True: 1, "never": 2}


def clone(args):
    return {name: value.clone() if torch.is_tensor(value) else value for name, value in args.items()}


def update(args):
    """Runs the launcher, as `ops.beam_update` does on a GPU."""
    columns = (args[name] for name in (*NAMES, "eos_ids"))
    penalty, mode = args.get("length_penalty", 1.0), MODES[args.get("early_stopping", False)]
    return triton_kernels.launcher("beam_update")(*columns, penalty, mode, args.get("stop"))


def assert_as_on_the_cpu(args):
    """Runs both on copies; returns the pool and `done` after the step."""
    got, want = clone(args), clone(args)
    got_running, want_running = update(got), ops.beam_update(**want)
    for name, a, b in zip(("scores", "parent", "token"), got_running, want_running, strict=True):
        assert torch.equal(a, b), f"running {name}"
    for name in WRITTEN:
        assert torch.equal(got[name], want[name]), name
    return {name: got[name] for name in WRITTEN}


@st.composite
def searches(draw):
    num_groups = draw(st.integers(1, 3))
    return {
        "num_beams": [draw(st.sampled_from([1, 2, 3, 8, 70])) for _ in range(num_groups)],
        "num_eos": draw(st.integers(0, 3)),
        "length_penalty": draw(st.sampled_from([0.0, 0.7, 1.0, 2.0, -1.3])),
        "early_stopping": draw(st.sampled_from([False, True, "never"])),
        "num_steps": draw(st.integers(1, 5)),
        "max_new_tokens": draw(st.integers(1, 6)),
        "use_stop": draw(st.booleans()),
        "vocab": draw(st.sampled_from([3, 6, 40])),
        "scale": draw(st.sampled_from([1 / 16, 8.0])),  # -1e9 hides small scores
        "seed": draw(st.integers(0, 2**31)),
    }


@settings(max_examples=25, deadline=None)
@given(searches())
def test_random_searches(search):
    generator = torch.Generator().manual_seed(search["seed"])
    num_beams, num_eos = search["num_beams"], search["num_eos"]
    num_groups, total = len(num_beams), sum(num_beams)
    width = ops.beam_candidates(max(num_beams), num_eos) + 3
    beam_indptr = torch.tensor([0, *num_beams]).cumsum(0).int()
    state = {
        "pool_scores": torch.full((total,), -1e9),
        **{name: torch.zeros(total, dtype=torch.int32) for name in POOL[1:]},
        "done": torch.zeros(num_groups, dtype=torch.bool),
    }
    for step in range(min(search["num_steps"], search["max_new_tokens"])):
        row_indptr = torch.arange(num_groups + 1).int() if step == 0 else beam_indptr
        draws = torch.randint(0, 300, (num_groups, width), generator=generator)
        scores = -draws.mul(search["scale"]).sort(dim=1)[0] - step
        rows = [torch.randint(int(a), int(b), (width,), generator=generator) for a, b in row_indptr.unfold(0, 2, 1)]
        parent, token = torch.stack(rows).int(), torch.randint(0, search["vocab"], scores.shape, generator=generator)
        token = token.int()
        absent = int(torch.randint(0, width, (1,), generator=generator)) if search["vocab"] == 3 else width
        scores[0, absent:], parent[0, absent:], token[0, absent:] = -math.inf, -1, -1
        args = {
            "scores": scores,
            "parent": parent,
            "token": token,
            "row_indptr": row_indptr,
            "beam_indptr": beam_indptr,
            "gen_lens": torch.full((num_groups,), step, dtype=torch.int32),
            "max_new_tokens": torch.full((num_groups,), search["max_new_tokens"], dtype=torch.int32),
            "eos_ids": torch.arange(num_eos).int(),
            "length_penalty": search["length_penalty"],
            "early_stopping": search["early_stopping"],
            "stop": torch.rand(scores.shape, generator=generator) < 0.3 if search["use_stop"] else None,
        }
        state = assert_as_on_the_cpu(args | state)


@pytest.mark.parametrize("every", [2, 100])
def test_more_beams_than_a_block(every):
    """Hits of 700 beams interleave with a pool of 700; a few hits move it by less than a block."""
    k = 700
    candidates = [(-float(i), i % k, 7 if i % every else 5) for i in range(2 * k)]
    pool = [(-2.0 * i, 1, i, 9) for i in range(k)]
    args = make_args(k, candidates, eos=[5], pool=pool, length_penalty=0.0)
    assert_as_on_the_cpu(args)
    assert_as_on_the_cpu(make_args(k, candidates, eos=[5], pool=pool[: k // 2], length_penalty=0.0))


def test_equal_scores_keep_their_order():
    assert_as_on_the_cpu(make_args(1, [(-2.0, 0, 5), (-3.0, 0, 7)], eos=[5], pool=[(-2.0, 1, 0, 9)], length_penalty=0))
    pool = [(-2.0, 1, 0, 8), (-2.0, 1, 0, 9)]
    candidates = [(-2.0, 0, 5), (-2.0, 1, 5), (-2.0, 2, 7), *[(-3.0, 0, 7)] * 3]
    assert_as_on_the_cpu(make_args(3, candidates, eos=[5], pool=pool, length_penalty=0.0))
    assert_as_on_the_cpu(make_args(2, [(-1.0, 0, 5), (-1e9, 1, 7), (-1e9, 0, 8), (-1e9, 0, 9)], eos=[5]))
    assert_as_on_the_cpu(make_args(2, [(-1.0, 0, 5), (-1.0, 1, 5), (-1.0, 0, 5), (-1.0, 1, 8)], eos=[5]))
    assert_as_on_the_cpu(make_args(1, [(-10.0, 0, 7), (-1e9, 0, 3)], eos=[7]))


def together(groups, **settings):
    """Makes one call of groups of one beam each."""
    args = {name: torch.cat([group[name] for group in groups]) for name in NAMES}
    args["parent"] += torch.arange(len(groups), dtype=torch.int32)[:, None]
    args["row_indptr"] = args["beam_indptr"] = torch.arange(len(groups) + 1, dtype=torch.int32)
    return args | {"eos_ids": i32([5])} | settings


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0, 0.5, 0.7, -1.0, -0.6])
def test_the_length_penalty_is_rounded_as_on_the_cpu(penalty):
    """Some squares above 2^24 are half-way between two fp32 numbers: 4097^2 = 2^24 + 2^13 + 1."""
    lengths = [1, 2, 3, 5, 7, 10, 33, 100, 4097, 5001, 8193, 100003]
    candidates = [(-7.3, 0, 5), (-8.0, 0, 7)]
    groups = [make_args(1, candidates, gen_len=length - 1, max_new_tokens=2**20) for length in lengths]
    assert_as_on_the_cpu(together(groups, length_penalty=penalty))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0])
def test_a_full_pool_ends_the_search(penalty, mode):
    """The worst finished score is above and below the best running beam's score now, and the one it may still reach."""
    groups = [
        make_args(1, [(-3.0, 0, 7), (-4.0, 0, 8)], pool=[(-worst, 3, 0, 5)], gen_len=3, max_new_tokens=10)
        for worst in (0.2, 0.3, 0.5, 0.75, 0.9, 2.0, 3.0, 9.0, 11.0, 12.0, 20.0, 40.0)
    ]
    done = assert_as_on_the_cpu(together(groups, length_penalty=penalty, early_stopping=mode))["done"]
    assert mode is True or 0 < done.sum() < len(groups)


def two_groups(**changes):
    """Makes a group of two beams, and one of a single beam in row 2."""
    return {
        "scores": torch.tensor([[-1.0, -2.0, -3.0, -4.0], [-1.0, -2.0, -3.0, -4.0]]),
        "parent": i32([[0, 1, 0, 1], [2, 2, 2, 2]]),
        "token": i32([[5, 7, 8, 6], [5, 7, 8, 6]]),
        "row_indptr": i32([0, 2, 3]),
        "beam_indptr": i32([0, 2, 3]),
        "pool_scores": torch.full((3,), -1e9),
        **{name: i32([0, 0, 0]) for name in POOL[1:]},
        "done": torch.tensor([False, False]),
        "gen_lens": i32([3, 3]),
        "max_new_tokens": i32([9, 9]),
        "eos_ids": i32([5]),
    } | changes


@pytest.mark.parametrize(
    "change",
    [
        {"scores": torch.tensor([[-1.0, -2.0, -1.5, -4.0], [-1.0, -2.0, -3.0, -4.0]])},
        {"scores": torch.tensor([[math.nan, -2.0, -3.0, -4.0], [-1.0, -2.0, -3.0, -4.0]])},
        {"scores": torch.tensor([[-1.0, -2.0, -3.0, math.nan], [-1.0, -2.0, -3.0, -4.0]])},
        {"parent": i32([[0, 2, 0, 1], [2, 2, 2, 2]])},
        {"parent": i32([[0, -2, 0, 1], [2, 2, 2, 2]])},
        {"parent": i32([[0, -1, 0, 1], [2, 2, 2, 2]])},
        {"eos_ids": i32([5, 6])},
        {"gen_lens": i32([9, 3])},
        {"gen_lens": i32([-1, 3])},
        {"gen_lens": i32([2**31 - 1, 3])},
        {"max_new_tokens": i32([0, 9])},
    ],
)
def test_a_group_with_a_refused_value_is_left_alone(change):
    """The other group goes on."""
    args = two_groups(**change)
    with pytest.raises(ValueError, match="expected"):
        ops.beam_update(**clone(args))
    got, want = clone(args), clone(args)
    want["done"][0] = True  # a group that is done is not checked
    scores, parent, token = update(got)
    want_scores, want_parent, want_token = ops.beam_update(**want)
    want_scores[:2], want["done"][0] = math.nan, False
    assert torch.equal(parent, want_parent)
    assert torch.equal(token, want_token)
    torch.testing.assert_close(scores, want_scores, rtol=0, atol=0, equal_nan=True)
    for name in WRITTEN:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize(
    "change",
    [
        {"row_indptr": i32([0, 0, 3])}, {"row_indptr": i32([1, 2, 3])}, {"row_indptr": i32([0, 4, 3])},
        {"beam_indptr": i32([0, 2, 4])}, {"beam_indptr": i32([0, 2, 2])}, {"beam_indptr": i32([-1, 2, 3])},
        {"beam_indptr": i32([0, 2**31 - 1, 3])}, {"beam_indptr": i32([0, -(2**31), 3])},
    ],
)  # fmt: skip
def test_offsets_that_are_no_partition_stop_every_group(change):
    args = two_groups(**change)
    before = clone(args)
    with pytest.raises(ValueError, match="indptr: expected"):
        ops.beam_update(**clone(args))
    scores, parent, token = update(args)
    assert scores.isnan().all()
    assert parent.tolist() == token.tolist() == [0, 0, 0]
    for name in WRITTEN:
        assert torch.equal(args[name], before[name]), name


def test_a_done_group_is_left_alone():
    assert_as_on_the_cpu(two_groups(done=torch.tensor([True, False]), row_indptr=i32([0, 1, 3])) | {
        "gen_lens": i32([9, 3]), "parent": i32([[7, 7, 7, 7], [2, 2, 1, 2]]),
    })  # fmt: skip


NO_GROUPS = {
    "scores": torch.zeros(0, 4), "parent": i32([]).view(0, 4), "token": i32([]).view(0, 4), "row_indptr": i32([0]),
    "beam_indptr": i32([0]), "done": torch.tensor([], dtype=torch.bool), "gen_lens": i32([]), "max_new_tokens": i32([]),
}  # fmt: skip


def test_no_groups():
    assert_as_on_the_cpu(
        two_groups() | {"pool_scores": torch.zeros(0), **{name: i32([]) for name in POOL[1:]}} | NO_GROUPS
    )


BAD = [
    {"scores": torch.zeros(2, 4).double()}, {"scores": torch.zeros(2, 3)}, {"scores": torch.zeros(4, 2).T},
    {"parent": torch.zeros(2, 4)}, {"token": i32([5, 7, 8, 6])}, {"row_indptr": i32([0, 2])},
    {"beam_indptr": torch.tensor([0, 2, 3])}, {"pool_scores": torch.zeros(3).double()}, {"pool_lens": i32([0, 0])},
    {"pool_parents": torch.zeros(3)}, {"pool_tokens": i32([0, 0, 0, 0, 0, 0])[::2]}, {"done": i32([0, 0])},
    {"gen_lens": i32([3])}, {"max_new_tokens": i32([[9, 9]])}, {"eos_ids": torch.tensor([5])},
    {"length_penalty": math.inf}, {"length_penalty": math.nan}, {"early_stopping": 3}, {"early_stopping": -1},
    {"stop": torch.zeros(2, 4)}, {"stop": torch.zeros(2, 3, dtype=torch.bool)}, NO_GROUPS,  # and a pool all the same
]  # fmt: skip


@pytest.mark.parametrize("change", BAD)
def test_same_errors_as_the_native_op(change):
    args = two_groups()
    good = {name: args[name] for name in (*NAMES, "eos_ids")}
    good |= {"length_penalty": 1.0, "early_stopping": 0, "stop": None}
    assert_same_error("beam_update", good, change)
