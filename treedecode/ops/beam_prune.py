"""beam_prune: log-softmax and the best candidates of every group of beams, in one read of the logits."""

import torch
from torch import Tensor

from treedecode import reference
from treedecode.ops._native import USE_REFERENCE, call, register_fake


def beam_prune(
    logits: Tensor,
    cum_logprobs: Tensor,
    group_indptr: Tensor,
    num_candidates: int,
    *,
    token_mask: Tensor | None = None,
    is_logprobs: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Finds the `num_candidates` best continuations of each group of rows, over flattened rows x vocabulary.

    A candidate's score is `cum_logprobs[row] + (logits[row, token] - lse[row])`, rounded once to fp32. Candidates are
    sorted by (score descending, row ascending, logit descending, token ascending): equal logits of a row are in token
    order, and logits whose scores are equal only after rounding keep their order.

    Args:
        logits: `[rows, vocab]` fp32, bf16 or fp16, unit stride along vocab. -inf = impossible, never a candidate.
        cum_logprobs: `[rows]` fp32, a row's score so far; -inf = the row gives no candidates.
        group_indptr: `[num_groups + 1]` int32, group g owns rows `group_indptr[g]` to `group_indptr[g + 1] - 1`.
        num_candidates: per group, 1 to 65536.
        token_mask: `[rows, ceil(vocab / 32)]` int32, bit `v % 32` of word `v // 32` set = token v may be a candidate.
            `lse` is over all tokens nevertheless, as in `transformers`, which masks after the log-softmax.
        is_logprobs: `logits` are log probabilities already: they are used as they are and lse is 0.

    Returns:
        scores `[num_groups, num_candidates]` fp32; parent, token: the same shape, int32, `parent` a row of logits; lse
        `[rows]` fp32, natural log. A group with fewer candidates ends in score -inf, parent -1, token -1.

    Raises:
        ValueError: an argument's shape or value is wrong; a row of logits or its `cum_logprobs` is NaN or +inf (the
            message names the row). On a GPU the host does not read values: `lse` of a row with a NaN or +inf logit is
            NaN, and a group with such a row, or such a `cum_logprobs`, gets scores NaN, parent -1 and token -1; with
            invalid offsets, the candidates are those of arbitrary rows.
        TypeError: an argument's dtype is wrong.
    """
    if USE_REFERENCE:
        scores, parent, token, lse = reference.beam_prune(
            logits, cum_logprobs, group_indptr, num_candidates, token_mask=token_mask, is_logprobs=is_logprobs
        )
        return scores.float(), parent, token, lse.float()
    op = torch.ops.treedecode.beam_prune.default
    return call(op, logits, cum_logprobs, group_indptr, num_candidates, token_mask, is_logprobs)


@register_fake("beam_prune")
def _(
    logits: Tensor,
    cum_logprobs: Tensor,
    group_indptr: Tensor,
    num_candidates: int,
    token_mask: Tensor | None,
    is_logprobs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (group_indptr.shape[0] - 1, num_candidates)
    return (
        logits.new_empty(shape, dtype=torch.float32),
        logits.new_empty(shape, dtype=torch.int32),
        logits.new_empty(shape, dtype=torch.int32),
        logits.new_empty(logits.shape[0], dtype=torch.float32),
    )
