"""Runs the CUDA kernels of the page ops, called like `treedecode.ops` with tensors of the CPU."""

import torch
from support import simt_kernels as simt

from treedecode import ops

POISON = -1234567  # in scratch, which a kernel must initialise before it reads it


def on_host(op, *args, **options):
    """Runs the kernel of a page op in the shim."""
    globals()[op](*args, **options)


def on_device(op, state, *args, seed=0):
    """Runs a page op with copies of its arguments on the device, and copies back the tensors that it may write."""
    assert ops.explain(op, "cuda").backend == "cuda"
    moved = [value.cuda() if isinstance(value, torch.Tensor) else value for value in (*state, *args)]
    getattr(ops, op)(ops.PageState(*moved[: len(state)]), *moved[len(state) :])
    for old, new in zip((*state, *args), moved, strict=True):
        if isinstance(old, torch.Tensor):
            old.copy_(new)


def scratch(*shape, dtype=torch.int32):
    return torch.full(shape, POISON, dtype=dtype)


def fields(state):
    return {
        "refcount": state.refcount, "free_pages": state.free_pages, "page_table": state.page_table,
        "seq_lens": state.seq_lens, "status": state.status, "num_pages": len(state.refcount),
        "max_branches": len(state.seq_lens), "max_pages": state.page_table.shape[1], "page_size": state.page_size,
    }  # fmt: skip


def fork_branches(state, src, dst, lens=None, **options):
    num_pages, (max_branches, max_pages) = len(state.refcount), state.page_table.shape
    simt.run(
        "fork_branches",
        state=fields(state), src=src, dst=dst, lens=lens, n=len(src),
        last_drops=scratch(num_pages, dtype=torch.int64), row_marks=scratch(max_branches),
        new_rows=scratch(len(src), max_pages), new_lens=scratch(len(src)), num_freed=scratch(len(src)),
        **options,
    )  # fmt: skip


def append_slots(state, kv, slots, rows, q_lens=None, **options):
    num_pages, n = len(state.refcount), len(rows)
    copies = {name: scratch(n) for name in ("copy_src", "copy_dst", "copy_tokens")} | {"num_copies": scratch(1)}
    simt.run(
        "append_slots",
        state=fields(state), rows=rows, q_lens=q_lens, slots=slots, **copies, n=n, num_slots=len(slots),
        first_slots=scratch(n, dtype=torch.int64), first_pages=scratch(n), copies=scratch(n),
        row_marks=scratch(len(state.seq_lens)), num_sharers=scratch(num_pages), last_sharers=scratch(num_pages),
        **options,
    )  # fmt: skip
    copy_pages(kv, *(copies[name] for name in ("copy_src", "copy_dst", "copy_tokens", "num_copies")))


def hold_pages(state, pages, hold=True, **options):
    simt.run(
        "hold_pages",
        state=fields(state), pages=pages, n=len(pages), hold=hold, num_drops=scratch(len(state.refcount)),
        last_drops=scratch(len(state.refcount)), **options,
    )  # fmt: skip


def adopt_pages(state, pages, row, num_tokens, **options):
    simt.run("adopt_pages", state=fields(state), pages=pages, n=len(pages), row=row, num_tokens=num_tokens, **options)


def copy_pages(kv, src, dst, num_tokens=None, num_copies=None, **options):
    num_layers, _, num_pages, num_kv_heads, page_size, head_dim = kv.shape
    size = kv.element_size()
    simt.run(
        "copy_pages",
        kv=kv, src=src, dst=dst, num_tokens=num_tokens, num_copies=num_copies, n=len(src), num_pages=num_pages,
        page_size=page_size, num_planes=2 * num_layers, num_kv_heads=num_kv_heads,
        head_bytes=page_size * head_dim * size, token_bytes=head_dim * size,
        stride_bytes=tuple(stride * size for stride in kv.stride()[:3]), **options,
    )  # fmt: skip
