"""The forward of a batch, and the choice of the next tokens."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from treedecode import ops
from treedecode.cache.page_pool import PagePool
from treedecode.common.arrays import IntArray
from treedecode.engine.branch_table import BranchTable
from treedecode.engine.scheduler import Batch, SampleBatch
from treedecode.engine.stops import StopMatcher
from treedecode.models.adapter import ModelAdapter
from treedecode.models.context import StepContext
from treedecode.models.prefill import Prefill


class BadLogits(ValueError):
    """The model's logits for `rows` are not numbers to sample from."""

    def __init__(self, rows: IntArray, positions: IntArray) -> None:
        where = ", ".join(f"branch {row} at position {position}" for row, position in zip(rows, positions, strict=True))
        super().__init__(f"the model gave logits that are NaN, infinite or all -inf for {where}")
        self.rows = rows


def forward(
    model: ModelAdapter, pool: PagePool, table: BranchTable, batch: Batch, slots: Tensor, *, wants_hidden: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Runs the batch's tokens through the model.

    Returns:
        logits `[len(batch.wanted), vocab_size]`, and with `wants_hidden` the hidden states they were computed from.
    """
    ids, positions = table.packed(batch.rows, batch.q_lens)
    last = np.cumsum(batch.q_lens, dtype=np.int64) - 1
    width = -(-int((table.num_cached[batch.rows] + batch.q_lens).max()) // pool.page_size)
    prefills, paged, q_lens = split_dense_prefills(model, table, batch, pool.device)
    context = plan_step(
        model,
        pool,
        pool.page_table[:, :width].index_select(0, batch.row_ids),
        pool.seq_lens.index_select(0, batch.row_ids),
        q_lens,
        slots,
        prefills=prefills,
        tree_tokens=paged,
        kv=pool.kv,
    )
    inputs = [torch.from_numpy(array).to(pool.device) for array in (ids, positions, last[batch.wanted])]
    if wants_hidden:
        return model.forward_hidden(inputs[0], inputs[1], context, inputs[2])
    return model.forward(inputs[0], inputs[1], context, inputs[2]), None


def plan_step(
    model: ModelAdapter,
    pool: PagePool,
    page_table: Tensor,
    seq_lens: Tensor,
    q_lens: Tensor | None,
    slots: Tensor,
    **options: Any,
) -> StepContext:
    """Plans a forward over branches, once for all layers; waits for nothing, so it can be captured.

    Args:
        page_table: `[num_branches, max_pages]` int32; seq_lens, q_lens: `[num_branches]` int32 (`q_lens` None: 1 each).
        slots: `[num_tokens]` int64, where K and V of each packed token go.
        options: further fields of `StepContext`.
    """
    plan = ops.plan_tree(
        page_table,
        seq_lens,
        q_lens,
        page_size=pool.page_size,
        num_qo_heads=model.num_qo_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
    )
    return StepContext(pool.layer, page_table, seq_lens, plan, slots, **options)


def split_dense_prefills(
    model: ModelAdapter, table: BranchTable, batch: Batch, device: torch.device
) -> tuple[tuple[Prefill, ...], Tensor | None, Tensor | None]:
    """Splits off branches with so many query tokens that the model wants them dense.

    Returns:
        the dense prefills; the packed tokens of the other branches, `[n]` int64 (None: all); the plan's `q_lens`.
    """
    threshold = model.min_prefill
    if batch.decode_only or threshold is None or batch.q_lens.max() < threshold:
        return (), None, batch.q_lens_tensor
    is_dense = batch.q_lens >= threshold
    ends = np.cumsum(batch.q_lens)
    seq_lens = table.num_cached[batch.rows] + batch.q_lens
    prefills = tuple(
        Prefill(int(i), int(ends[i] - batch.q_lens[i]), int(ends[i]), int(seq_lens[i]))
        for i in np.flatnonzero(is_dense)
    )
    paged = np.flatnonzero(~np.repeat(is_dense, batch.q_lens))
    q_lens = np.where(is_dense, 0, batch.q_lens).astype(np.int32)
    return prefills, torch.from_numpy(paged).to(device), torch.from_numpy(q_lens).to(device)


def sample_tokens(
    table: BranchTable, matcher: StopMatcher, eos_ids: Tensor, sample: SampleBatch, logits: Tensor
) -> tuple[IntArray, np.ndarray]:
    """Samples the next token of each row from its `[s, vocab_size]` logits.

    Repetition penalty and the minimum length change the logits first, of the rows that ask for them alone; the
    log-probabilities are of the distribution after that, before temperature and filters.

    Returns:
        token ids `[s]` int32, log-probabilities `[s]` float32.

    Raises:
        BadLogits: rows from whose logits no token can be drawn.
    """
    rows = sample.rows
    if len(rows) == 0:
        return np.zeros(0, np.int32), np.zeros(0, np.float32)
    for i in np.flatnonzero(table.penalty[rows] != 1) if sample.penalised else ():
        row = rows[i]
        seen = torch.from_numpy(table.tokens[row, : table.num_tokens[row]].astype(np.int64)).to(logits.device)
        x, penalty = logits[i, seen], float(table.penalty[row])
        logits[i, seen] = torch.where(x < 0, x * penalty, x / penalty)
    for i in np.flatnonzero(table.num_tokens[rows] < table.min_tokens[rows]):
        if not table.ignore_eos[rows[i]]:  # else they end nothing, and are tokens like others
            logits[i, eos_ids] = -torch.inf
        logits[i, list(matcher[int(table.stop[rows[i]])].token_ids)] = -torch.inf
    try:
        token, logprob, _ = ops.sample(
            logits,
            temperature=sample.temperature,
            top_k=sample.top_k,
            top_p=sample.top_p,
            min_p=sample.min_p,
            seed=sample.seed,
            position=torch.from_numpy(table.num_tokens[rows]).to(logits.device),
        )
    except ValueError:
        best = logits.amax(dim=-1)  # NaN where the row has one
        bad = rows[(~best.isfinite()).numpy(force=True)]
        if len(bad) == 0:
            raise
        raise BadLogits(bad, table.num_tokens[bad]) from None
    tokens = token.numpy(force=True)
    bad = rows[tokens < 0]  # on a GPU the op marks such rows
    if len(bad):
        raise BadLogits(bad, table.num_tokens[bad])
    return tokens, logprob.numpy(force=True)
