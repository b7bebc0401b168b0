"""Peers of tree_attention, over shared pages or copied caches. Each is checked as ours is, or listed with a reason.

FlashInfer's wrappers take the page table as CSR arrays. They are planned once, on the host, and that plan is timed by
the clock; only `run` is captured.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from bench.gpu.contestants import Builders, Contestant, NotApplicable, import_peer, require_gpu
from bench.gpu.forests import Heads, Inputs

MAX_COPY_BYTES = 20 << 30  # copied caches beyond this are not built
SELF_EVICTING_BYTES = 1 << 30  # far more than any L2 cache: nothing of a call is there for the next one
MAX_MASK_ENTRIES = 1 << 28  # FlexAttention's block mask is made from a mask of branches x tokens
WORKSPACE_BYTES = 256 << 20
Check = Callable[..., float]


def attention_peers(inputs: Inputs, check: Check, limit: float) -> Builders:
    peers = {
        "FlashInfer decode (tensor cores)": flashinfer_decode,
        "FlashInfer BatchAttention": flashinfer_batch_attention,
        "FlashInfer cascade": flashinfer_cascade,
        "FlexAttention on the flattened forest": flex_attention,
        "SDPA on copied caches": functools.partial(sdpa, pack=False),
        "SDPA on copied caches, GQA packed": functools.partial(sdpa, pack=True),
        "flash-attn on copied caches": flash_attn,
    }
    return {name: functools.partial(build, inputs, check, limit) for name, build in peers.items()}


def _csr(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Returns indptr, indices and last_page_len of all branches, int32 on the device."""
    rows, page_size = inputs.forest.rows, inputs.forest.page_size
    indptr = torch.tensor([0, *map(len, rows)]).cumsum(0).int()
    indices = torch.tensor([page for row in rows for page in row], dtype=torch.int32)
    last = torch.tensor([(n - 1) % page_size + 1 for n in inputs.forest.seq_lens], dtype=torch.int32)
    return indptr.to(inputs.device), indices.to(inputs.device), last.to(inputs.device)


def _heads(inputs: Inputs) -> tuple[int, int, int]:
    return inputs.heads.num_qo_heads, inputs.heads.num_kv_heads, inputs.heads.head_dim


def _workspace(inputs: Inputs) -> Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=inputs.device)


def _pages(inputs: Inputs, i: int) -> tuple[Tensor, Tensor]:
    """Returns K and V in the order of the memory, `[num_pages, num_kv_heads, page_size, head_dim]` (HND)."""
    k, v = inputs.kv[i]
    return k, v


def flashinfer_decode(inputs: Inputs, check: Check, limit: float) -> Contestant:
    require_gpu(inputs.device)
    flashinfer = import_peer("flashinfer")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace(inputs), "HND", use_tensor_cores=True)
    csr, sizes = _csr(inputs), (*_heads(inputs), inputs.forest.page_size)

    def plan() -> None:
        wrapper.plan(*csr, *sizes, q_data_type=inputs.dtype, kv_data_type=inputs.dtype)

    plan()

    def call(i: int) -> Tensor:
        return wrapper.run(inputs.q[i], _pages(inputs, i))

    return Contestant(call, len(inputs.q), lambda: check(call(0)), limit, plan, "clock")


def flashinfer_batch_attention(inputs: Inputs, check: Check, limit: float) -> Contestant:
    require_gpu(inputs.device)
    wrapper = import_peer("flashinfer").BatchAttention("HND", device=str(inputs.device))
    indptr, indices, _ = _csr(inputs)
    num_qo_heads, num_kv_heads, head_dim = _heads(inputs)
    qo_indptr = torch.arange(len(inputs.forest.rows) + 1, dtype=torch.int32, device=inputs.device)

    def plan() -> None:
        wrapper.plan(
            qo_indptr, indptr, indices, inputs.seq_lens, num_qo_heads, num_kv_heads, head_dim, head_dim,
            inputs.forest.page_size, causal=False, q_data_type=inputs.dtype, kv_data_type=inputs.dtype,
        )  # fmt: skip

    plan()

    def call(i: int) -> Tensor:
        return wrapper.run(inputs.q[i], _pages(inputs, i))[0]

    return Contestant(call, len(inputs.q), lambda: check(call(0)), limit, plan, "clock")


def flashinfer_cascade(inputs: Inputs, check: Check, limit: float) -> Contestant:
    require_gpu(inputs.device)
    levels = inputs.forest.levels
    if levels is None:
        raise NotApplicable("a cascade needs levels of equal depth")
    if len(levels) == 1:
        raise NotApplicable("one level only: nothing to cascade")
    flashinfer = import_peer("flashinfer")
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(len(levels), _workspace(inputs), "HND")
    qo_indptr, kv_indptr, kv_indices, last_page_len = [], [], [], []
    for level in levels:
        num_nodes, per_node = level.pages.shape
        steps = torch.arange(num_nodes + 1, dtype=torch.int32, device=inputs.device)
        qo_indptr.append(steps * level.num_queries)
        kv_indptr.append(steps * per_node)
        kv_indices.append(level.pages.flatten().to(inputs.device))
        last_page_len.append(torch.full_like(steps[1:], level.last_page_len))
    sizes = (*_heads(inputs), inputs.forest.page_size)

    def plan() -> None:
        wrapper.plan(
            qo_indptr, kv_indptr, kv_indices, last_page_len, *sizes, q_data_type=inputs.dtype,
            kv_data_type=inputs.dtype,
        )  # fmt: skip

    plan()

    def call(i: int) -> Tensor:
        return wrapper.run(inputs.q[i], _pages(inputs, i))

    return Contestant(call, len(inputs.q), lambda: check(call(0)), limit, plan, "clock", f"{len(levels)} levels")


def flex_attention(inputs: Inputs, check: Check, limit: float) -> Contestant:
    """Attends over all pages as one sequence, with a mask of the pages that each branch sees."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as attend

    forest, device = inputs.forest, inputs.device
    num_branches, num_tokens = len(forest.rows), forest.num_pages * forest.page_size
    if num_branches * num_tokens > MAX_MASK_ENTRIES:
        raise NotApplicable(f"a mask of {num_branches} x {num_tokens} is more than is built")
    on_gpu = device.type == "cuda"
    if on_gpu and (forest.page_size != 16 or forest.levels is None or inputs.heads != Heads()):
        raise NotApplicable("measured on the main table alone: every shape is compiled anew, which takes long")
    torch._dynamo.reset()  # a compiled function that meets too many shapes goes back to the unfused one, silently
    compiled = torch.compile(attend, dynamic=False) if on_gpu else attend
    visible = torch.zeros(num_branches, forest.num_pages, dtype=torch.bool)
    for branch, row in enumerate(forest.rows):
        visible[branch, torch.tensor(row)] = True
    visible, page_lens, page_size = visible.to(device), forest.page_lens.to(device), forest.page_size
    seq_lens, position = inputs.seq_lens, torch.zeros(forest.num_pages, dtype=torch.int64)
    for row in forest.rows:
        position[torch.tensor(row)] = page_size * torch.arange(len(row))
    position = position.to(device)

    def sees(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        page, offset = kv // page_size, kv % page_size
        return visible[q, page] & (offset < page_lens[page]) & (position[page] + offset < seq_lens[q])

    def plan() -> object:
        return create_block_mask(sees, None, None, num_branches, num_tokens, device=str(device))

    mask = plan()
    # [2, num_kv_heads, num_tokens, head_dim]: of pages in HND order that is a copy, made here and not timed
    flat = [kv.transpose(1, 2).flatten(2, 3) for kv in inputs.kv]

    def call(i: int) -> Tensor:
        k, v = flat[i][:, None]
        return compiled(inputs.q[i].transpose(0, 1)[None], k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return Contestant(call, len(flat), lambda: check(call(0)), limit, plan, "clock", "compiled for this shape")


def _copied(inputs: Inputs) -> list[Tensor]:
    """Copies K and V for every branch: `[2, num_branches, num_kv_heads, seq_len, head_dim]`."""
    forest = inputs.forest
    if len(set(forest.seq_lens)) > 1:
        raise NotApplicable("branches differ in length")
    num_bytes = forest.path_tokens * inputs.token_bytes
    if num_bytes > MAX_COPY_BYTES:
        raise NotApplicable(f"copied caches of {num_bytes / 2**30:.0f} GiB are not built")
    sets = 1 if num_bytes > SELF_EVICTING_BYTES else len(inputs.kv)
    pages = torch.tensor(forest.rows, device=inputs.device)
    seq_len = forest.seq_lens[0]
    return [kv[:, pages].transpose(2, 3).flatten(3, 4)[..., :seq_len, :].contiguous() for kv in inputs.kv[:sets]]


def sdpa(inputs: Inputs, check: Check, limit: float, *, pack: bool) -> Contestant:
    """Runs `scaled_dot_product_attention`, which picks its own backend; packed, heads of a group are query rows."""
    caches = _copied(inputs)
    group = inputs.heads.num_qo_heads // inputs.heads.num_kv_heads
    if pack and group == 1:
        raise NotApplicable("no groups to pack")

    def call(i: int) -> Tensor:
        q, (k, v) = inputs.q[i], caches[i]
        if pack:
            return functional.scaled_dot_product_attention(q.unflatten(1, (-1, group)), k, v).flatten(1, 2)
        return functional.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=group > 1)[:, :, 0]

    return Contestant(call, len(caches), lambda: check(call(0)), limit, self_evicting=len(caches) == 1)


def flash_attn(inputs: Inputs, check: Check, limit: float) -> Contestant:
    require_gpu(inputs.device)
    module = import_peer("flash_attn")
    caches = [kv.transpose(2, 3).contiguous() for kv in _copied(inputs)]  # [2, num_branches, seq_len, heads, head_dim]

    def call(i: int) -> Tensor:
        q, (k, v) = inputs.q[i], caches[i]
        return module.flash_attn_with_kvcache(q[:, None], k, v, cache_seqlens=inputs.seq_lens)[:, 0]

    return Contestant(call, len(caches), lambda: check(call(0)), limit, self_evicting=len(caches) == 1)
