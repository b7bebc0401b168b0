"""Histories of pages, and rankings with ties: every backend must give the numbers in golden/.

Plans are in test_plan_tree.py, test_triton_attention.py and test_cuda_plan_tree.py.
"""

import json

import pytest
import torch
from support import logits_kernels, page_kernels, triton_cases
from support.paths import GOLDEN

from treedecode import ops, reference, triton_kernels
from treedecode.ops.pages import STATUS_ERROR, STATUS_NUM_FREE

PAGES = json.loads((GOLDEN / "pages.json").read_text())
RANKINGS = json.loads((GOLDEN / "rankings.json").read_text())
BACKENDS = ["reference", "cpu", "cuda", "triton"]
SETTINGS = {"temperature": torch.float32, "top_k": torch.int32, "top_p": torch.float32, "min_p": torch.float32,
            "seed": torch.int64, "position": torch.int64}  # fmt: skip


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def state_of(sizes):
    num_pages = sizes["num_pages"]
    table = torch.zeros(sizes["max_branches"], sizes["max_pages"], dtype=torch.int32)
    return ops.PageState(
        int32([0] * num_pages), int32(range(num_pages - 1, -1, -1)), table, int32([0] * len(table)),
        int32([0, num_pages, 0, 0]), sizes["page_size"],
    )  # fmt: skip


def shown(state):
    """Returns the defined numbers of the state."""
    pages = [-(-n // state.page_size) for n in state.seq_lens.tolist()]
    return {
        "refcount": state.refcount.tolist(),
        "free_pages": state.free_pages[: state.status[STATUS_NUM_FREE]].tolist(),
        "rows": [row[:n] for row, n in zip(state.page_table.tolist(), pages, strict=True)],
        "seq_lens": state.seq_lens.tolist(),
        "status": state.status.tolist(),
    }


def page_op(backend, op, *args):
    if backend == "cuda":
        page_kernels.on_host(op, *args)
    else:
        module = {"reference": reference, "cpu": ops, "triton": triton_cases.PageOps}[backend]
        getattr(module, op)(*args)


def play(sizes, calls, backend):
    """Returns the state and the copies after every call; at first the values of a page are its id."""
    state = state_of(sizes)
    kv = torch.arange(sizes["num_pages"], dtype=torch.float32).view(1, 1, -1, 1, 1, 1)
    kv = kv.expand(1, 2, -1, 1, sizes["page_size"], 8).contiguous()
    for op, *args in calls:
        tensors = [int32(arg) if isinstance(arg, list) else arg for arg in args]
        slots = None
        if op == "append_slots":
            rows, q_lens, num_slots = tensors
            slots = torch.full((num_slots,), -7)
            tensors = [kv, slots, rows, q_lens]
        page_op(backend, op, state, *tensors)
        after = shown(state)
        if op == "append_slots":
            after |= {"slots": slots.tolist(), "copied": kv[0, 0, :, 0, :, 0].flatten().int().tolist()}
        if after["status"][STATUS_ERROR]:
            state.status[STATUS_ERROR] = 0  # as the owner does when it has freed pages
        yield after


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages(backend):
    for number, (got, want) in enumerate(
        zip(play(PAGES["sizes"], PAGES["calls"], backend), PAGES["after"], strict=True)
    ):
        assert got == want, f"call {number}: {PAGES['calls'][number]}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", RANKINGS["beam_prune"], ids=lambda case: case["name"])
def test_ties_of_beam_prune(case, backend):
    logits, cum = torch.tensor(case["logits"]), torch.tensor(case["cum_logprobs"])
    groups, k = int32(case["group_indptr"]), case["num_candidates"]
    if backend == "cuda":
        _, parent, token, _ = logits_kernels.beam_prune(logits, cum, groups, k)
    elif backend == "triton":
        _, parent, token, _ = triton_kernels.launcher("beam_prune")(logits, cum, groups, k, None, False)
    else:
        _, parent, token, _ = (ops if backend == "cpu" else reference).beam_prune(logits, cum, groups, k)
    assert parent.tolist() == case["parent"]
    assert token.tolist() == case["token"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", RANKINGS["sample"], ids=lambda case: case["name"])
def test_draws(case, backend):
    logits = torch.tensor(case["logits"])
    settings = {name: torch.tensor(case[name], dtype=dtype) for name, dtype in SETTINGS.items()}
    if backend == "cuda":
        token, _, _ = logits_kernels.sample(logits, settings)
    elif backend == "triton":
        token, _, _ = triton_kernels.launcher("sample")(logits, *settings.values(), None)
    else:
        token, _, _ = (ops if backend == "cpu" else reference).sample(logits, **settings)
    assert token.tolist() == case["tokens"]
