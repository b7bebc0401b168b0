"""One step of a batch: the forward, and the choice of the next tokens."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from treedecode import ops
from treedecode.cache.page_pool import PagePool
from treedecode.common.arrays import IntArray
from treedecode.engine.branch_table import BranchTable
from treedecode.engine.scheduler import Batch, Draw
from treedecode.engine.stops import StopMatcher
from treedecode.models.context import StepContext
from treedecode.models.prefill import Prefill


class BadLogits(ValueError):
    """The model's logits for `rows` are not numbers to sample from."""

    def __init__(self, rows: IntArray, positions: IntArray) -> None:
        where = ", ".join(f"branch {row} at position {at}" for row, at in zip(rows, positions, strict=True))
        super().__init__(f"the model gave logits that are NaN, infinite or all -inf for {where}")
        self.rows = rows


def forward(
    model: Any, pool: PagePool, table: BranchTable, batch: Batch, slots: Tensor, *, wants_hidden: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Runs the batch's tokens through the model.

    Returns:
        logits `[len(batch.wanted), vocab_size]`, and with `wants_hidden` the hidden states they were computed from.
    """
    ids, positions = table.packed(batch.rows, batch.q_lens)
    last = np.cumsum(batch.q_lens, dtype=np.int64) - 1
    width = -(-int((table.num_cached[batch.rows] + batch.q_lens).max()) // pool.page_size)
    page_table = pool.page_table[:, :width].index_select(0, batch.row_ids)
    seq_lens = pool.seq_lens.index_select(0, batch.row_ids)
    prefills, rest, q_lens = dense_prefills(model, table, batch, pool.device)
    plan = ops.plan_tree(
        page_table,
        seq_lens,
        q_lens,
        page_size=pool.page_size,
        num_qo_heads=model.num_qo_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
    )
    context = StepContext(pool.layer, page_table, seq_lens, plan, slots, prefills, rest, pool.kv)
    put = [torch.from_numpy(array).to(pool.device) for array in (ids, positions, last[batch.wanted])]
    if wants_hidden:
        return model.forward_hidden(put[0], put[1], context, put[2])
    return model.forward(put[0], put[1], context, put[2]), None


def dense_prefills(
    model: Any, table: BranchTable, batch: Batch, device: torch.device
) -> tuple[tuple[Prefill, ...], Tensor | None, Tensor | None]:
    """Branches with so many query tokens that the model wants them dense; the others' tokens and the plan's q_lens."""
    min_prefill = getattr(model, "min_prefill", None)
    if batch.decode_only or min_prefill is None or batch.q_lens.max() < min_prefill:
        return (), None, batch.q_lens_tensor
    is_long = batch.q_lens >= min_prefill
    ends = np.cumsum(batch.q_lens)
    seq_lens = table.num_cached[batch.rows] + batch.q_lens
    prefills = tuple(
        Prefill(int(i), int(ends[i] - batch.q_lens[i]), int(ends[i]), int(seq_lens[i])) for i in np.flatnonzero(is_long)
    )
    rest = np.flatnonzero(~np.repeat(is_long, batch.q_lens))
    q_lens = np.where(is_long, 0, batch.q_lens).astype(np.int32)
    return prefills, torch.from_numpy(rest).to(device), torch.from_numpy(q_lens).to(device)


def choose(
    table: BranchTable, matcher: StopMatcher, eos_ids: Tensor, draw: Draw, logits: Tensor
) -> tuple[IntArray, np.ndarray]:
    """Samples the next token of each row from its `[s, vocab_size]` logits: (token ids, log-probabilities), `[s]`.

    Repetition penalty and the minimum length change the logits first, of the rows that ask for them alone; the
    log-probabilities are of the distribution after that, before temperature and filters.

    Raises:
        BadLogits: rows from whose logits no token can be drawn.
    """
    chosen = draw.rows
    if len(chosen) == 0:
        return np.zeros(0, np.int32), np.zeros(0, np.float32)
    for i in np.flatnonzero(table.penalty[chosen] != 1) if draw.penalised else ():
        row = chosen[i]
        seen = torch.from_numpy(table.tokens[row, : table.num_tokens[row]].astype(np.int64)).to(logits.device)
        x, penalty = logits[i, seen], float(table.penalty[row])
        logits[i, seen] = torch.where(x < 0, x * penalty, x / penalty)
    for i in np.flatnonzero(table.num_tokens[chosen] < table.min_tokens[chosen]):
        if not table.ignore_eos[chosen[i]]:  # else they end nothing, and are tokens like others
            logits[i, eos_ids] = -torch.inf
        logits[i, list(matcher[int(table.stop[chosen[i]])].token_ids)] = -torch.inf
    try:
        token, logprob, _ = ops.sample(
            logits,
            temperature=draw.temperature,
            top_k=draw.top_k,
            top_p=draw.top_p,
            min_p=draw.min_p,
            seed=draw.seed,
            position=torch.from_numpy(table.num_tokens[chosen]).to(logits.device),
        )
    except ValueError:
        best = logits.amax(dim=-1)  # NaN where the row has one
        bad = chosen[(~best.isfinite()).numpy(force=True)]
        if len(bad) == 0:
            raise
        raise BadLogits(bad, table.num_tokens[bad]) from None
    tokens = token.numpy(force=True)
    bad = chosen[tokens < 0]  # on a GPU the op marks such rows
    if len(bad):
        raise BadLogits(bad, table.num_tokens[bad])
    return tokens, logprob.numpy(force=True)
