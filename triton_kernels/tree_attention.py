"""Triton kernels of tree_attention: one computes the work tiles of a flat plan, one merges partial results.

Names as in FlashAttention, in units of log2: qk are scaled scores, m_i a row's running maximum, p = 2^(qk - m_i), l_i
the running sum of p, acc that of p @ v, and alpha brings l_i and acc from an old maximum to a new one.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from treedecode.triton_kernels import check, plan_rows
from treedecode.triton_kernels.attention_config import Config, arch_of, config

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tanh(x):
    """Returns tanh(x) to a few ulps, also near 0, where 1 - 2 / (exp(2 x) + 1) would cancel."""
    z = x * x
    p = -5.704986925e-3 * z + 2.063908716e-2
    p = p * z - 5.373971505e-2
    p = p * z + 1.333144220e-1
    p = p * z - 3.333328194e-1
    return tl.where(tl.abs(x) < 0.625, p * z * x + x, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def _attend(
    out_ptr, lse_ptr,  # [num_q, Hq, D], [num_q, Hq] or null
    part_out_ptr, part_lse_ptr,  # [max_parts, Hq, D], [max_parts, Hq]
    q_ptr,  # [num_q, Hq, D], strides (token, head)
    k_pages_ptr, v_pages_ptr,  # [num_pages, PAGE_SIZE, Hkv, D], strides (page, token, head), here of one kv head
    table_ptr,  # [max_pages], of a row of the chunk
    seq_lens_ptr, q_indptr_ptr, part_indptr_ptr, order_ptr, row_indptr_ptr,  # [B], [B + 1], [B + 1], [B], [B + 1]
    sinks_ptr,  # [Hq] or null
    q_stride_t, q_stride_h, k_stride_p, k_stride_t, v_stride_p, v_stride_t,
    num_q, max_parts, sm_scale, window_left, logits_soft_cap,
    row_begin, row_end, token_begin, token_end, part, first_query, num_rows, first_row, kv_head,
    HAS_WINDOW: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, GROUP: tl.constexpr, NUM_HEADS: tl.constexpr,
    D: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Computes packed rows of a chunk, from first_row on at most BLOCK_M of its num_rows, for one kv head."""
    row = first_row + tl.arange(0, BLOCK_M)
    kept = row < num_rows
    row = tl.minimum(row, num_rows - 1)  # rows beyond the last one repeat it, so they widen no range of keys
    planned = first_query + row // GROUP  # query token in the plan's order
    head = kv_head * GROUP + row % GROUP
    typical_len = tl.maximum(1, num_rows // GROUP // (row_end - row_begin))
    planned_row = plan_rows.row_of(row_indptr_ptr, planned, row_begin, row_end, typical_len)
    query = planned - tl.load(row_indptr_ptr + planned_row)  # of the branch's q_len
    branch = tl.load(order_ptr + planned_row)
    q_begin = tl.load(q_indptr_ptr + branch)
    q_len = tl.load(q_indptr_ptr + branch + 1) - q_begin
    token = tl.maximum(tl.minimum(q_begin + query, num_q - 1), 0)
    slot = tl.load(part_indptr_ptr + branch)
    num_parts = (tl.load(part_indptr_ptr + branch + 1) - slot) // q_len
    slot += query * num_parts + part
    is_final = kept & (num_parts == 1)
    is_part = kept & (num_parts > 1) & (slot < max_parts)
    # One number per row gives the place of its result, so that the loop over keys needs few registers for it.
    target = tl.where(is_final, token, slot).to(tl.int64) * NUM_HEADS + head
    position = tl.load(seq_lens_ptr + branch) - q_len + query
    visible_end = tl.minimum(position + 1, token_end)
    begin, end = token_begin, tl.max(visible_end)  # of the keys that any row sees
    all_visible_begin, all_visible_end = token_begin, tl.min(visible_end)  # of the keys that every row sees
    if HAS_WINDOW:
        visible_begin = tl.maximum(position - window_left, token_begin)
        first_visible = tl.min(visible_begin)
        begin += (first_visible - token_begin) // BLOCK_N * BLOCK_N
        all_visible_begin = tl.max(visible_begin)

    d = tl.arange(0, BLOCK_D)
    in_head = (d < D if D < BLOCK_D else tl.full([BLOCK_D], True, tl.int1))[None, :]
    q_ptrs = q_ptr + token.to(tl.int64) * q_stride_t + head.to(tl.int64) * q_stride_h
    q = tl.load(q_ptrs[:, None] + d, mask=in_head, other=0.0)
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # The loop counts from 0, because Triton pipelines no loads in a loop whose begin is computed in this way.
    for offset in tl.range(0, end - begin, BLOCK_N, num_stages=NUM_STAGES):
        start = begin + offset
        key = start + tl.arange(0, BLOCK_N)
        # Slots that no row sees may hold NaN, and NaN times a probability of 0 is NaN; table entries any page.
        exists = key < end
        if HAS_WINDOW:
            exists &= key >= first_visible
        if PAGE_SIZE % BLOCK_N == 0:
            page = tl.load(table_ptr + start // PAGE_SIZE).to(tl.int64)
        else:
            page = tl.load(table_ptr + key // PAGE_SIZE, mask=exists, other=0).to(tl.int64)
        in_page = (key % PAGE_SIZE).to(tl.int64)
        loaded = exists[:, None] & in_head
        k = tl.load(k_pages_ptr + (page * k_stride_p + in_page * k_stride_t)[:, None] + d, mask=loaded, other=0.0)
        v = tl.load(v_pages_ptr + (page * v_stride_p + in_page * v_stride_t)[:, None] + d, mask=loaded, other=0.0)
        qk = tl.dot(q, k.T, input_precision="ieee")  # scaled below
        if HAS_SOFT_CAP:
            qk = _tanh(qk * (sm_scale / logits_soft_cap)) * logits_soft_cap
            scale = _LOG2E
        else:
            scale = sm_scale * _LOG2E
        if (start < all_visible_begin) | (start + BLOCK_N > all_visible_end):
            is_visible = key < visible_end[:, None]
            if HAS_WINDOW:
                is_visible &= key >= visible_begin[:, None]
            qk = tl.where(is_visible, qk, -float("inf"))
        m_new = tl.maximum(m_i, tl.max(qk, 1) * scale)
        base = tl.where(m_new == -float("inf"), 0.0, m_new)  # (-inf) - (-inf) would be NaN
        p = tl.exp2(qk * scale - base[:, None])
        alpha = tl.exp2(m_i - base)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m_i = m_new

    if sinks_ptr is not None:
        # a sink joins where the denominator is complete: here, or when parts are merged
        sink = tl.load(sinks_ptr + head, mask=is_final, other=-float("inf")) * _LOG2E
        m_new = tl.maximum(m_i, sink)
        base = tl.where(m_new == -float("inf"), 0.0, m_new)
        alpha = tl.exp2(m_i - base)
        l_i = l_i * alpha + tl.exp2(sink - base)
        acc *= alpha[:, None]
        m_i = m_new
    empty = l_i == 0.0
    acc /= tl.where(empty, 1.0, l_i)[:, None]
    lse = tl.where(empty, -float("inf"), m_i + tl.log2(tl.where(empty, 1.0, l_i)))
    # In most tiles all results are final, or none is.
    if tl.max(is_final.to(tl.int32)) > 0:
        if lse_ptr is not None:
            tl.store(lse_ptr + target, lse * _LN2, mask=is_final)
        stored = is_final[:, None] & in_head
        tl.store(out_ptr + target[:, None] * D + d, acc.to(out_ptr.dtype.element_ty), mask=stored)
    if tl.max(is_part.to(tl.int32)) > 0:
        tl.store(part_lse_ptr + target, lse, mask=is_part)
        stored = (is_part & (l_i != 0.0))[:, None] & in_head  # the out of an empty part is never read
        tl.store(part_out_ptr + target[:, None] * D + d, acc, mask=stored)


_attend_apart = triton.jit(noinline=True)(_attend.fn)


@triton.jit
def _tree_attention_kernel(
    out_ptr, lse_ptr,  # [num_q, Hq, D], [num_q, Hq] or null
    part_out_ptr, part_lse_ptr,  # [max_parts, Hq, D], [max_parts, Hq] in log2
    q_ptr,  # [num_q, Hq, D], strides (token, head)
    k_pages_ptr, v_pages_ptr,  # [num_pages, PAGE_SIZE, Hkv, D], strides (page, token, head)
    page_table_ptr,  # [B, max_pages], stride (branch)
    seq_lens_ptr, q_indptr_ptr, part_indptr_ptr, order_ptr, row_indptr_ptr,  # [B], [B + 1], [B + 1], [B], [B + 1]
    chunks_ptr, counts_ptr,  # [max_chunks, 6], [6], as in TreePlan
    sinks_ptr,  # [Hq] or null
    q_stride_t, q_stride_h, k_stride_p, k_stride_t, k_stride_h, v_stride_p, v_stride_t, v_stride_h, table_stride,
    num_q, num_kv_heads, max_parts, sm_scale, window_left, logits_soft_cap,
    HAS_WINDOW: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, GROUP: tl.constexpr, NUM_HEADS: tl.constexpr,
    D: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, HEIGHTS: tl.constexpr, BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr, ATTEND: tl.constexpr,
):  # fmt: skip
    num_chunks = tl.load(counts_ptr + plan_rows.NUM_CHUNKS)
    num_items = tl.load(counts_ptr + plan_rows.NUM_TILES) * num_kv_heads
    num_items = tl.where(tl.load(counts_ptr + plan_rows.PAGE_SIZE) == PAGE_SIZE, num_items, 0)
    # Items of one tile are neighbours, and so are those of one chunk, so that they find shared pages in the cache.
    for item in tl.range(tl.program_id(0), num_items, tl.num_programs(0), num_stages=1):
        tile, kv_head = item // num_kv_heads, item % num_kv_heads
        chunk_ptr = chunks_ptr + plan_rows.COLUMNS * plan_rows.chunk_of(chunks_ptr, num_chunks, tile, 64)
        row_begin, row_end = tl.load(chunk_ptr + plan_rows.ROW_BEGIN), tl.load(chunk_ptr + plan_rows.ROW_END)
        token_begin, token_end = tl.load(chunk_ptr + plan_rows.TOKEN_BEGIN), tl.load(chunk_ptr + plan_rows.TOKEN_END)
        part = tl.load(chunk_ptr + plan_rows.PART)
        first_query = tl.load(row_indptr_ptr + row_begin)
        num_rows = (tl.minimum(tl.load(row_indptr_ptr + row_end), num_q) - first_query) * GROUP
        first_row = (tile - tl.load(chunk_ptr + plan_rows.TILE_BEGIN)) * plan_rows.TILE_ROWS
        last_row = tl.minimum(first_row + plan_rows.TILE_ROWS, num_rows)
        table_ptr = page_table_ptr + tl.load(order_ptr + row_begin).to(tl.int64) * table_stride
        k_ptr = k_pages_ptr + kv_head.to(tl.int64) * k_stride_h
        v_ptr = v_pages_ptr + kv_head.to(tl.int64) * v_stride_h
        while first_row < last_row:
            height = tl.minimum(last_row - first_row, HEIGHTS[-1])
            for i in tl.static_range(len(HEIGHTS)):
                if (height <= HEIGHTS[i]) & (height > (HEIGHTS[i - 1] if i > 0 else 0)):
                    ATTEND(
                        out_ptr, lse_ptr, part_out_ptr, part_lse_ptr, q_ptr, k_ptr, v_ptr, table_ptr, seq_lens_ptr,
                        q_indptr_ptr, part_indptr_ptr, order_ptr, row_indptr_ptr, sinks_ptr, q_stride_t, q_stride_h,
                        k_stride_p, k_stride_t, v_stride_p, v_stride_t, num_q, max_parts, sm_scale, window_left,
                        logits_soft_cap, row_begin, row_end, token_begin, token_end, part, first_query, num_rows,
                        first_row, kv_head, HAS_WINDOW, HAS_SOFT_CAP, GROUP, NUM_HEADS, D, PAGE_SIZE, BLOCK_D,
                        HEIGHTS[i], BLOCK_N, NUM_STAGES,
                    )  # fmt: skip
            first_row += HEIGHTS[-1]


@triton.jit
def _merge_parts_kernel(
    out_ptr, lse_ptr,  # [num_q, Hq, D], [num_q, Hq] or null
    part_out_ptr, part_lse_ptr,  # [max_parts, Hq, D], [max_parts, Hq] in log2
    q_indptr_ptr, part_indptr_ptr, counts_ptr,  # [B + 1], [B + 1], [6]
    sinks_ptr,  # [Hq] or null
    num_q, num_branches, max_parts,
    NUM_HEADS: tl.constexpr, D: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    target = token.to(tl.int64) * NUM_HEADS + head
    # The host has not checked the plan. A plan that does not fit this call makes all results NaN.
    is_flat = (tl.load(counts_ptr + plan_rows.NUM_TILES) > 0) | (tl.load(counts_ptr + plan_rows.NUM_CHUNKS) == 0)
    num_owned = tl.load(q_indptr_ptr + num_branches)  # tokens beyond belong to no branch
    fits = is_flat & (tl.load(counts_ptr + plan_rows.PAGE_SIZE) == PAGE_SIZE) & (num_owned <= num_q)
    if fits:
        typical_len = tl.maximum(1, num_q // num_branches)
        branch = tl.max(plan_rows.row_of(q_indptr_ptr, token + tl.arange(0, 1), 0, num_branches, typical_len))
        begin, q_begin = tl.load(part_indptr_ptr + branch), tl.load(q_indptr_ptr + branch)
        q_len = tl.maximum(1, tl.load(q_indptr_ptr + branch + 1) - q_begin)
        num_parts = tl.where(token < num_owned, (tl.load(part_indptr_ptr + branch + 1) - begin) // q_len, 0)
        if num_parts != 1:
            begin += (token - q_begin) * num_parts
            end = tl.minimum(begin + num_parts, max_parts)
            m_i = -float("inf")
            l_i = 0.0
            acc = tl.zeros([BLOCK_D], tl.float32)
            for first in range(begin, end, BLOCK_P):
                part = first + tl.arange(0, BLOCK_P)
                source = part.to(tl.int64) * NUM_HEADS + head
                lse = tl.load(part_lse_ptr + source, mask=part < end, other=-float("inf"))
                loaded = (lse != -float("inf"))[:, None] & (d < D)[None, :]
                part_out = tl.load(part_out_ptr + source[:, None] * D + d, mask=loaded, other=0.0)
                m_new = tl.maximum(m_i, tl.max(lse))
                base = tl.where(m_new == -float("inf"), 0.0, m_new)  # (-inf) - (-inf) would be NaN
                p = tl.exp2(lse - base)
                alpha = tl.exp2(m_i - base)
                l_i = l_i * alpha + tl.sum(p)
                acc = acc * alpha + tl.sum(p[:, None] * part_out, 0)
                m_i = m_new
            if sinks_ptr is not None:
                sink = tl.load(sinks_ptr + head, mask=token < num_owned, other=-float("inf")) * _LOG2E
                m_new = tl.maximum(m_i, sink)
                base = tl.where(m_new == -float("inf"), 0.0, m_new)
                alpha = tl.exp2(m_i - base)
                l_i = l_i * alpha + tl.exp2(sink - base)
                acc *= alpha
                m_i = m_new
            empty = l_i == 0.0
            acc /= tl.where(empty, 1.0, l_i)
            tl.store(out_ptr + target * D + d, acc.to(out_ptr.dtype.element_ty), mask=d < D)
            if lse_ptr is not None:
                lse = tl.where(empty, -float("inf"), m_i + tl.log2(tl.where(empty, 1.0, l_i)))
                tl.store(lse_ptr + target, lse * _LN2)
    else:
        tl.store(out_ptr + target * D + d, tl.full([BLOCK_D], float("nan"), out_ptr.dtype.element_ty), mask=d < D)
        if lse_ptr is not None:
            tl.store(lse_ptr + target, float("nan"))


def tree_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    q_indptr: Tensor,
    part_indptr: Tensor,
    chunks: Tensor,
    counts: Tensor,
    order: Tensor,
    row_indptr: Tensor,
    out: Tensor,
    lse: Tensor | None,
    sm_scale: float,
    window_left: int,
    logits_soft_cap: float,
    sinks: Tensor | None,
    checks_plan: bool,
) -> None:
    """Launches `treedecode.ops.tree_attention`, for flat plans only.

    The host reads no values. A plan that is chained, for another page size or for more query tokens makes all results
    NaN; no plan makes the kernels write out of bounds.
    """
    check.tensor(q, "q", "[num_q, num_qo_heads, head_dim]", (-1, -1, -1), *check.FLOATS)
    num_q, num_qo_heads, head_dim = q.shape
    check.value(check.is_head_dim(head_dim), "q", "head_dim a multiple of 8 up to 256", head_dim)
    text = "[num_pages, page_size, num_kv_heads, head_dim]"
    check.tensor(k_pages, "k_pages", text, (-1, -1, -1, head_dim), q.dtype)
    check.tensor(v_pages, "v_pages", text, (-1, -1, -1, head_dim), q.dtype)
    check.tensor(v_pages, "v_pages", "the shape of k_pages", tuple(k_pages.shape), q.dtype)
    page_size, num_kv_heads = k_pages.shape[1:3]
    fits = num_kv_heads > 0 and num_qo_heads > 0 and num_qo_heads % num_kv_heads == 0
    check.value(fits, "q", f"num_qo_heads a positive multiple of num_kv_heads = {num_kv_heads}", num_qo_heads)
    check.value(page_size > 0, "k_pages", "page_size above 0", page_size)
    check.tensor(page_table, "page_table", "[num_branches, max_pages]", (-1, -1), torch.int32)
    num_branches = page_table.shape[0]
    check.tensor(seq_lens, "seq_lens", "[num_branches]", (num_branches,), torch.int32, contiguous=True)
    check.tensor(order, "plan.order", "[num_branches]", (num_branches,), torch.int32, contiguous=True)
    names = ("plan.q_indptr", "plan.part_indptr", "plan.row_indptr")
    for offsets, name in zip((q_indptr, part_indptr, row_indptr), names, strict=True):
        check.tensor(offsets, name, "[num_branches + 1]", (num_branches + 1,), torch.int32, contiguous=True)
    check.tensor(chunks, "plan.chunks", "[max_chunks, 6]", (-1, plan_rows.COLUMNS.value), torch.int32, contiguous=True)
    check.tensor(counts, "plan.counts", "[6]", (plan_rows.NUM_COUNTS,), torch.int32, contiguous=True)
    check.tensor(out, "out", "the shape of q", tuple(q.shape), q.dtype, contiguous=True)
    if lse is not None:
        check.tensor(lse, "lse", "[num_q, num_qo_heads]", (num_q, num_qo_heads), torch.float32, contiguous=True)
    is_positive = _is_positive_float(sm_scale)
    check.value(is_positive, "sm_scale", "a positive number of the range of fp32", sm_scale)
    is_off_or_positive = logits_soft_cap == 0 or _is_positive_float(logits_soft_cap)
    text = "0 (off) or a positive number of the range of fp32"
    check.value(is_off_or_positive, "logits_soft_cap", text, logits_soft_cap)
    check.value(window_left >= -1, "window_left", "-1 (no limit) or more", window_left)
    if sinks is not None:
        check.tensor(sinks, "sinks", "[num_qo_heads]", (num_qo_heads,), torch.float32, contiguous=True)

    if num_q == 0:
        return
    if num_branches == 0:
        out.zero_()
        if lse is not None:
            lse.fill_(-torch.inf)
        return
    group = num_qo_heads // num_kv_heads
    workers, max_parts = bounds(num_q, num_branches, chunks.shape[0], group)
    part_out = q.new_empty(max_parts, num_qo_heads, head_dim, dtype=torch.float32)
    part_lse = q.new_empty(max_parts, num_qo_heads, dtype=torch.float32)
    is_plain = window_left < 0 and logits_soft_cap == 0
    c = config(head_dim, q.dtype, arch_of(q.device), num_q * group, is_plain)
    shape = {"NUM_HEADS": num_qo_heads, "D": head_dim, "PAGE_SIZE": page_size, "BLOCK_D": block_d(head_dim)}
    _tree_attention_kernel[(workers * num_kv_heads,)](
        out, lse, part_out, part_lse, q, k_pages, v_pages, page_table, seq_lens, q_indptr, part_indptr, order,
        row_indptr, chunks, counts, sinks, *q.stride()[:2], *k_pages.stride()[:3], *v_pages.stride()[:3],
        page_table.stride(0), num_q, num_kv_heads, max_parts, sm_scale, window_left, logits_soft_cap,
        HAS_WINDOW=window_left >= 0, HAS_SOFT_CAP=logits_soft_cap > 0, GROUP=group, num_warps=c.num_warps, **shape,
        **constants(c),
    )  # fmt: skip
    _merge_parts_kernel[(num_q, num_qo_heads)](
        out, lse, part_out, part_lse, q_indptr, part_indptr, counts, sinks, num_q, num_branches, max_parts, BLOCK_P=8,
        num_warps=1, **shape,
    )  # fmt: skip


def block_d(head_dim: int) -> int:
    """Returns the width of a block of whole heads."""
    return max(16, triton.next_power_of_2(head_dim))


def constants(c: Config) -> dict[str, Any]:
    """Returns the constants of the kernel for a configuration."""
    attend = _attend_apart if c.calls else _attend
    return {"HEIGHTS": c.heights, "BLOCK_N": c.block_n, "NUM_STAGES": c.num_stages, "ATTEND": attend}


def bounds(num_q: int, num_branches: int, max_chunks: int, group: int) -> tuple[int, int]:
    """Returns (workers per kv head, max_parts): the workers and the most partial results of a plan of these shapes.

    A path has at most 8 shared nodes and a leaf, and at most one shared node for each other branch. A cut adds a part
    to the rows of one work tile. There are about 4 cuts for each worker, and a work tile has up to 128 packed rows.
    """
    workers = max(1, (max_chunks - max(0, 2 * num_branches - 1)) // 4)
    cuts = min(4 * workers * num_q, 512 * workers // group)
    return workers, (1 + min(8, num_branches - 1)) * num_q + cuts


def _is_positive_float(x: float) -> bool:
    return torch.finfo(torch.float32).tiny <= x <= torch.finfo(torch.float32).max
