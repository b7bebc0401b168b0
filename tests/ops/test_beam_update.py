import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.beam_update_cases import POOL, i32, make_args

from treedecode import ops, reference


def running(result):
    return list(zip(*(column.tolist() for column in result), strict=True))


def finished(args):
    return [entry for entry in zip(*(args[name].tolist() for name in POOL), strict=True) if entry[1] > 0]


@st.composite
def searches(draw):
    """Draws several groups of different size, some already done, and the candidates of a few steps."""
    num_groups = draw(st.integers(1, 4))
    return {
        "num_beams": [draw(st.sampled_from([1, 2, 3, 8])) for _ in range(num_groups)],
        "num_eos": draw(st.integers(0, 3)),
        "length_penalty": draw(st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0])),
        "early_stopping": draw(st.sampled_from([False, True, "never"])),
        "num_steps": draw(st.integers(1, 5)),
        "max_new_tokens": draw(st.integers(1, 6)),
        "use_stop": draw(st.booleans()),
        "vocab": draw(st.sampled_from([3, 6, 40])),
        "scale": draw(st.sampled_from([1 / 16, 8.0])),  # rounding of -1e9 + score hides small scores only
        "seed": draw(st.integers(0, 2**31)),
    }


@settings(max_examples=150, deadline=None)
@given(searches())
def test_matches_reference(search):
    generator = torch.Generator().manual_seed(search["seed"])
    num_beams, eos = search["num_beams"], list(range(search["num_eos"]))
    num_groups = len(num_beams)
    width = ops.beam_candidates(max(num_beams), len(eos)) + 3
    beam_indptr = torch.tensor([0, *num_beams]).cumsum(0).to(torch.int32)
    got = {
        "pool_scores": torch.full((sum(num_beams),), -1e9),
        **{name: torch.zeros(sum(num_beams), dtype=torch.int32) for name in POOL[1:]},
        "done": torch.zeros(num_groups, dtype=torch.bool),
    }
    want = {name: tensor.clone() for name, tensor in got.items()}
    want["pool_scores"] = want["pool_scores"].double()
    for step in range(min(search["num_steps"], search["max_new_tokens"])):
        row_indptr = torch.arange(num_groups + 1, dtype=torch.int32) if step == 0 else beam_indptr
        # Exact in fp32, and full of ties.
        draws = torch.randint(0, 300, (num_groups, width), generator=generator)
        scores = -draws.mul(search["scale"]).sort(dim=1)[0] - step
        parent = torch.stack(
            [torch.randint(int(a), int(b), (width,), generator=generator) for a, b in row_indptr.unfold(0, 2, 1)]
        ).int()
        token = torch.randint(0, search["vocab"], (num_groups, width), generator=generator).int()
        absent = int(torch.randint(0, width, (1,), generator=generator)) if search["vocab"] == 3 else width
        scores[0, absent:], parent[0, absent:], token[0, absent:] = -math.inf, -1, -1
        stop = torch.rand(num_groups, width, generator=generator) < 0.3 if search["use_stop"] else None
        args = {
            "scores": scores,
            "parent": parent,
            "token": token,
            "row_indptr": row_indptr,
            "beam_indptr": beam_indptr,
            "gen_lens": torch.full((num_groups,), step, dtype=torch.int32),
            "max_new_tokens": torch.full((num_groups,), search["max_new_tokens"], dtype=torch.int32),
            "eos_ids": i32(eos),
            "length_penalty": search["length_penalty"],
            "early_stopping": search["early_stopping"],
            "stop": stop,
        }
        got_running = ops.beam_update(**args, **got)
        want_running = reference.beam_update(**args, **want)
        for name in ("pool_lens", "pool_parents", "pool_tokens", "done"):
            assert torch.equal(got[name], want[name]), name
        assert torch.equal(got_running[1], want_running[1])
        assert torch.equal(got_running[2], want_running[2])
        # A running score is one fp32 addition, so it is the exact sum rounded.
        assert torch.equal(got_running[0], want_running[0].float())
        # A finished score is a quotient by a rounded divisor: twice half an ulp.
        budget = torch.finfo(torch.float32).eps * want["pool_scores"].abs()
        assert ((got["pool_scores"].double() - want["pool_scores"]).abs() <= budget).all()
        if bool(got["done"].all()):
            break


def test_result_does_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    num_groups, k = 600, 4

    def run(threads):
        generator = torch.Generator().manual_seed(1)
        parent = torch.randint(0, k, (num_groups, 2 * k), generator=generator) + torch.arange(num_groups)[:, None] * k
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        args = {
            "scores": -torch.rand(num_groups, 2 * k, generator=generator).cumsum(1),
            "parent": parent.int(),
            "token": torch.randint(0, 3, (num_groups, 2 * k), generator=generator).int(),
            "row_indptr": torch.arange(0, num_groups * k + 1, k).int(),
            "beam_indptr": torch.arange(0, num_groups * k + 1, k).int(),
            "pool_scores": torch.full((num_groups * k,), -1e9),
            **{name: torch.zeros(num_groups * k, dtype=torch.int32) for name in POOL[1:]},
            "done": torch.zeros(num_groups, dtype=torch.bool),
            "gen_lens": torch.zeros(num_groups, dtype=torch.int32),
            "max_new_tokens": torch.full((num_groups,), 9, dtype=torch.int32),
            "eos_ids": i32([0]),
        }  # fmt: skip
        out = ops.beam_update(**args)
        torch.set_num_threads(before)
        return [*out, *(args[name] for name in POOL), args["done"]]

    for one, two in zip(run(1), run(2), strict=True):
        assert torch.equal(one, two)


def test_token_id_equal_to_a_slot_is_not_a_hit():
    """The rank, row and beam of candidate 1 are equal to the EOS id, but its token is not."""
    args = make_args(2, [(-1.0, 0, 7), (-2.0, 1, 8), (-3.0, 1, 9), (-4.0, 0, 6)], eos=[1])
    assert running(ops.beam_update(**args)) == [(-1.0, 0, 7), (-2.0, 1, 8)]
    assert finished(args) == []


def test_parent_is_the_row_not_the_rank():
    args = make_args(2, [(-1.0, 1, 7), (-2.0, 1, 0), (-3.0, 1, 8), (-4.0, 0, 6)], eos=[0])
    assert running(ops.beam_update(**args)) == [(-1.0, 1, 7), (-3.0, 1, 8)]
    assert finished(args) == [(-2.0, 1, 1, 0)]


def test_length_limit_is_also_hit_when_it_is_passed():
    """A length beyond the limit is refused; a check by `==` would ignore it, and the search would never end."""
    at_limit = make_args(1, [(-1.0, 0, 7), (-2.0, 0, 8)], gen_len=3, max_new_tokens=4)
    ops.beam_update(**at_limit)
    assert finished(at_limit) == [(-0.25, 4, 0, 7)]
    assert at_limit["done"].item()
    with pytest.raises(ValueError, match="gen_lens: expected 0 <= gen_lens < max_new_tokens = 4, got 4"):
        ops.beam_update(**make_args(1, [(-1.0, 0, 7), (-2.0, 0, 8)], gen_len=4, max_new_tokens=4))


def test_all_candidates_eos_finishes_the_group_and_reads_nothing_else():
    candidates = [(-1.0, 0, 5), (-2.0, 1, 6), (-3.0, 0, 6), (-4.0, 1, 5), (-5.0, 0, 5), (-6.0, 1, 6)]
    args = make_args(2, candidates, eos=[5, 6], early_stopping="never")
    result = running(ops.beam_update(**args))
    assert [beam[1:] for beam in result] == [(0, 5), (1, 6)]
    assert all(beam[0] == -1e9 for beam in result)
    assert finished(args) == [(-1.0, 1, 0, 5), (-2.0, 1, 1, 6)]
    assert args["done"].item()


def test_hit_at_rank_k_does_not_finish():
    args = make_args(2, [(-1.0, 0, 7), (-2.0, 1, 8), (-3.0, 0, 5), (-4.0, 1, 9)], eos=[5])
    ops.beam_update(**args)
    assert finished(args) == []


def test_equal_scores_keep_their_order():
    """At equal scores an old finished beam comes before a new one, and candidates keep their order, ended or not."""
    args = make_args(1, [(-2.0, 0, 5), (-3.0, 0, 7)], eos=[5], pool=[(-2.0, 1, 0, 9)], length_penalty=0.0)
    ops.beam_update(**args)
    assert finished(args) == [(-2.0, 1, 0, 9)]
    args = make_args(2, [(-1.0, 0, 5), (-1e9, 1, 7), (-1e9, 0, 8), (-1e9, 0, 9)], eos=[5])
    assert running(ops.beam_update(**args)) == [(-1e9, 0, 5), (-1e9, 1, 7)]


def test_the_1e9_is_subtracted_in_fp32():
    """In fp32 the hit and the candidate of score -1e9 are equal, so the hit stays first; in float64 it would not."""
    args = make_args(1, [(-10.0, 0, 7), (-1e9, 0, 3)], eos=[7])
    for update in (ops.beam_update, reference.beam_update):
        assert running(update(**{name: torch.clone(v) if torch.is_tensor(v) else v for name, v in args.items()})) == [
            (-1e9, 0, 7)
        ]


def test_reordering_keeps_finished_beams_finished():
    args = make_args(
        2,
        [(-3.0, 1, 5), (-4.0, 1, 7), (-5.0, 0, 8), (-6.0, 0, 9)],
        eos=[5],
        pool=[(-0.5, 2, 1, 5)],
        gen_len=5,
        length_penalty=0.0,
    )
    assert running(ops.beam_update(**args)) == [(-4.0, 1, 7), (-5.0, 0, 8)]
    assert finished(args) == [(-0.5, 2, 1, 5), (-3.0, 6, 1, 5)]


def test_length_counts_generated_tokens_and_eos_only():
    args = make_args(1, [(-6.0, 0, 5), (-7.0, 0, 7)], eos=[5], gen_len=2, length_penalty=1.0)
    ops.beam_update(**args)
    assert finished(args) == [(-2.0, 3, 0, 5)]


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "pool_score", "best", "done"),
    [
        (True, 1.0, -9.0, -1.0, True),  # full is final, though the running beam is better
        (False, 1.0, -0.9, -3.0, False),  # -3 / 4 beats -0.9
        (False, 1.0, -0.5, -3.0, True),
        ("never", 1.0, -0.5, -3.0, False),  # -3 / 10 could still beat it
        ("never", 1.0, -0.2, -3.0, True),
        ("never", -1.0, -11.0, -3.0, True),  # a longer text only scores worse: judged at the current length
        ("never", -1.0, -20.0, -3.0, False),  # -3 * 4 beats -20, which -3 * 10 would not
        (False, 0.0, -3.0, -3.0, True),  # equal is not better
    ],
)
def test_a_full_pool_ends_the_search(early_stopping, length_penalty, pool_score, best, done):
    args = make_args(
        1,
        [(best, 0, 7), (best - 1, 0, 8)],
        eos=[5],
        pool=[(pool_score, 3, 0, 5)],
        gen_len=3,
        max_new_tokens=10,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    ops.beam_update(**args)
    assert args["done"].item() is done


def test_a_done_group_is_left_alone():
    args = make_args(2, [(-1.0, 0, 5), (-2.0, 1, 5), (-3.0, 0, 7), (-4.0, 1, 8)], eos=[5], pool=[(-9.0, 1, 0, 5)])
    args["done"].fill_(True)
    assert running(ops.beam_update(**args)) == [(-math.inf, 0, 0), (-math.inf, 1, 0)]
    assert finished(args) == [(-9.0, 1, 0, 5)]


def test_wide_beam():
    """Hits of 1000 beams interleave with a pool of 1000."""
    k = 1000
    args = make_args(
        k,
        [(-float(i), i % k, 5 if i % 2 else 7) for i in range(2 * k)],
        eos=[5],
        pool=[(-2.0 * i, 1, i, 9) for i in range(k)],
        length_penalty=0.0,
    )
    ops.beam_update(**args)
    new = [(-float(i), 1, i, 5) for i in range(1, k, 2)]
    old = [(-2.0 * i, 1, i, 9) for i in range(k)]
    assert finished(args) == sorted(old + new, key=lambda entry: -entry[0])[:k]


def test_opcheck():
    args = make_args(2, [(-1.0, 1, 5), (-2.0, 1, 7), (-3.0, 1, 8), (-4.0, 0, 6)], eos=[5])
    names = ("scores", "parent", "token", "row_indptr", "beam_indptr", *POOL)
    names += ("done", "gen_lens", "max_new_tokens", "eos_ids")
    torch.library.opcheck(torch.ops.treedecode.beam_update, (*(args[name] for name in names), 1.0, 0, None))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": torch.zeros(1, 4, dtype=torch.float64)}, TypeError, "scores: expected dtype float32, got float64"),
        ({"scores": torch.tensor([[-1.0, -2.0, -1.5, -4.0]])}, ValueError, "scores: expected descending"),
        ({"scores": torch.tensor([[-1.0, math.nan, -3.0, -4.0]])}, ValueError, "scores: expected descending"),
        ({"scores": torch.zeros(1, 3)}, ValueError, r"parent: expected shape the shape of scores = \[1, 3\]"),
        ({"eos_ids": i32([5, 6])}, ValueError, r"scores: expected at least .* = 6 candidates for group 0, got 4"),
        ({"parent": i32([[0, 1, 2, 0]])}, ValueError, "parent: expected -1 or a row of group 0, 0 to 1, got 2"),
        ({"parent": i32([[0, -1, 1, 0]])}, ValueError, r"parent: expected absent candidates \(-1\) last"),
        ({"token": torch.zeros(1, 4, dtype=torch.int64)}, TypeError, "token: expected dtype int32, got int64"),
        ({"row_indptr": i32([0, 0])}, ValueError, "row_indptr: expected at least one row in every group"),
        ({"beam_indptr": i32([0, 1])}, ValueError, "beam_indptr: expected to end at 2, the size of the pool, got 1"),
        ({"pool_lens": i32([0])}, ValueError, r"pool_lens: expected shape the shape of pool_scores = \[2\], got \[1\]"),
        ({"done": i32([0])}, TypeError, "done: expected dtype bool, got int32"),
        ({"early_stopping": "always"}, ValueError, "early_stopping: expected False, True or 'never', got 'always'"),
        ({"length_penalty": math.inf}, ValueError, "length_penalty: expected a finite number, got inf"),
        ({"stop": torch.zeros(1, 3, dtype=torch.bool)}, ValueError, "stop: expected shape the shape of scores"),
    ],
)  # fmt: skip
def test_bad_arguments_write_nothing(change, error, message):
    args = make_args(2, [(-1.0, 0, 5), (-2.0, 1, 7), (-3.0, 0, 8), (-4.0, 1, 6)], eos=[5]) | change
    before = {name: args[name].clone() for name in (*POOL, "done")}
    with pytest.raises(error, match=message):
        ops.beam_update(**args)
    for name, tensor in before.items():
        assert torch.equal(args[name], tensor), name


def test_the_cpu_kernel_runs():
    assert ops.explain("beam_update", "cpu").backend == "cpu"
