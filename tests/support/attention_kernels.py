"""Runs the CUDA kernels of tree_attention on the host, with a case of `attention_cases`."""

import math

import torch
from support import simt_kernels as simt

from treedecode import ops

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def flat_plan(case, num_workers):
    """Makes the flat plan of a case for `num_workers` thread blocks."""
    page_size, num_kv_heads, head_dim = case.k_pages.shape[1:]
    return ops.plan_tree(
        case.page_table, case.seq_lens, case.plan.q_indptr.diff().int(), page_size=page_size,
        num_qo_heads=case.q.shape[1], num_kv_heads=num_kv_heads, head_dim=head_dim, num_workers=num_workers,
    )  # fmt: skip


def reserved_parts(plan, num_q, group):
    """Returns max_parts of csrc/cuda/attention/tree_attention.h."""
    cuts = max(0, len(plan.chunks) - max(0, 2 * len(plan.q_indptr) - 3))
    return 9 * num_q + min(num_q * cuts, 128 * cuts // group)


def arguments(case, plan, **changes):
    """Returns the fields of TreeAttentionParams, with outputs and scratch full of NaN."""
    q, k_pages, v_pages, page_table, seq_lens, _ = case.args
    options = {"sm_scale": None, "window_left": -1, "logits_soft_cap": 0.0, "sinks": None} | case.options
    sm_scale = options["sm_scale"] or q.shape[-1] ** -0.5
    cap = options["logits_soft_cap"]
    num_q, num_qo_heads, head_dim = q.shape
    num_pages, page_size, num_kv_heads, _ = k_pages.shape
    group = num_qo_heads // num_kv_heads
    max_parts = reserved_parts(plan, num_q, group)
    return {
        "q": q, "k_pages": k_pages, "v_pages": v_pages, "page_table": page_table, "seq_lens": seq_lens,
        "q_indptr": plan.q_indptr, "part_indptr": plan.part_indptr, "order": plan.order,
        "row_indptr": plan.row_indptr, "chunks": plan.chunks, "counts": plan.counts,
        "sinks": options["sinks"], "out": torch.full(q.shape, torch.nan, dtype=q.dtype),
        "lse": torch.full(q.shape[:2], torch.nan),
        "part_out": torch.full((max_parts, num_qo_heads, head_dim), torch.nan),
        "part_lse": torch.full((max_parts, num_qo_heads), torch.nan),
        "num_q": num_q, "num_rows": len(seq_lens), "num_qo_heads": num_qo_heads, "num_kv_heads": num_kv_heads,
        "head_dim": head_dim, "num_pages": num_pages, "page_size": page_size, "max_pages": page_table.shape[1],
        "max_chunks": len(plan.chunks), "max_parts": max_parts, "page_table_stride": page_table.stride(0),
        "q_stride": q.stride()[:2], "k_stride": k_pages.stride()[:3], "v_stride": v_pages.stride()[:3],
        "window_left": options["window_left"], "group_size": group, "soft_cap": cap,
        "scale": (1.0 if cap else sm_scale) / math.log(2), "cap_scale": sm_scale / cap if cap else 0.0,
        "dtype": DTYPES[q.dtype],
    } | changes  # fmt: skip


def attend(case, num_workers=4, *, plan=None, seed=0, drop=None, **changes):
    """Computes (out, lse) of the case; `changes` are fields of TreeAttentionParams."""
    fields = arguments(case, flat_plan(case, num_workers) if plan is None else plan, **changes)
    simt.run("tree_attention", seed=seed, drop=drop, **fields)
    return fields["out"], fields["lse"]
