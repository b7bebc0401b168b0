"""beam_update: one step of beam search after pruning, from candidates to running and finished beams."""

import torch
from torch import Tensor

from treedecode import reference
from treedecode.ops._native import USE_REFERENCE, call, register_fake

_EARLY_STOPPING: dict[bool | str, int] = {False: 0, True: 1, "never": 2}


def beam_candidates(num_beams: int, num_eos: int) -> int:
    """Returns the candidates per group that a beam search needs to go on even if every beam's best tokens are EOS."""
    return max(2, 1 + num_eos) * num_beams


def beam_update(
    scores: Tensor,
    parent: Tensor,
    token: Tensor,
    row_indptr: Tensor,
    beam_indptr: Tensor,
    pool_scores: Tensor,
    pool_lens: Tensor,
    pool_parents: Tensor,
    pool_tokens: Tensor,
    done: Tensor,
    *,
    gen_lens: Tensor,
    max_new_tokens: Tensor,
    eos_ids: Tensor,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    stop: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses each group's next running beams and updates its pool of finished beams, in place.

    A group is one search: one prompt and its beams. A candidate is a *hit* when its token is in `eos_ids`, `stop` says
    so, or the group reaches `max_new_tokens`. With k beams, the first `max(2, 1 + num_eos) * k` candidates count.

    * The next running beams are the best k by score, where a hit has 1e9 subtracted: hits go on only when there are
      no other candidates, in their order.
    * A hit enters the pool only from rank < k, with score / length ** length_penalty. The length counts generated
      tokens, EOS included, not the prompt. The pool keeps the best k of old and new, old ones first among equals.
    * The group is done, and its pool final, when no candidate goes on; or the pool is full and
      `early_stopping` is True; or the best running beam, at its current length ("never" with a positive
      length_penalty: at `max_new_tokens`), scores no better than the worst finished one. Once done it stays done.

    Args:
        scores, parent, token: `[num_groups, num_candidates]` fp32, int32, int32, as `beam_prune` returns them:
            cumulative log-probs in nats, descending; `parent` is a row of the logits; absent candidates have parent -1.
        row_indptr: `[num_groups + 1]` int32, rows of the logits of each group (one per group in the first step).
        beam_indptr: `[num_groups + 1]` int32, beams of each group; groups may differ.
        pool_scores, pool_lens, pool_parents, pool_tokens: `[num_beams]` fp32, int32, int32, int32: the finished beams,
            best first. Length 0 = a free entry, its score is -1e9. The text of an entry is the history of beam
            `pool_parents` (counted within the group) as of length - 1 tokens, then `pool_tokens`.
        done: `[num_groups]` bool; a group that is done on entry stays as it is.
        gen_lens: `[num_groups]` int32, tokens generated before this step.
        max_new_tokens: `[num_groups]` int32.
        eos_ids: `[num_eos]` int32, may be empty.
        length_penalty: exponent of the length; positive favours long beams.
        early_stopping: False, True or "never".
        stop: `[num_groups, num_candidates]` bool, hits for any other reason, such as a stop string.

    Returns:
        running_scores fp32, running_parent int32 (row of the logits), running_token int32, each `[num_beams]` and best
        first within a group. Where a group has too few candidates, and where it was done on entry, the score is -inf
        and the parent some row of the group.

    Raises:
        ValueError: an argument's shape or value is wrong; nothing is written. On a GPU the host does not read values: a
            group with a bad value stays as it is, and its running scores are NaN.
        TypeError: an argument's dtype is wrong; nothing is written.

    Source: the semantics, rounding of the 1e9 included, are those of beam search in Hugging Face Transformers 5.
    """
    try:
        mode = _EARLY_STOPPING[early_stopping]
    except (KeyError, TypeError):
        raise ValueError(f"early_stopping: expected False, True or 'never', got {early_stopping!r}") from None
    columns = (scores, parent, token, row_indptr, beam_indptr, pool_scores, pool_lens, pool_parents, pool_tokens, done)
    if USE_REFERENCE:
        return reference.beam_update(
            *columns,
            gen_lens=gen_lens,
            max_new_tokens=max_new_tokens,
            eos_ids=eos_ids,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            stop=stop,
        )
    op = torch.ops.treedecode.beam_update.default
    running: tuple[Tensor, Tensor, Tensor] = call(
        op, *columns, gen_lens, max_new_tokens, eos_ids, float(length_penalty), mode, stop
    )
    return running


@register_fake("beam_update")
def _(
    scores: Tensor,
    parent: Tensor,
    token: Tensor,
    row_indptr: Tensor,
    beam_indptr: Tensor,
    pool_scores: Tensor,
    pool_lens: Tensor,
    pool_parents: Tensor,
    pool_tokens: Tensor,
    done: Tensor,
    gen_lens: Tensor,
    max_new_tokens: Tensor,
    eos_ids: Tensor,
    length_penalty: float,
    early_stopping: int,
    stop: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(pool_scores), torch.empty_like(pool_parents), torch.empty_like(pool_tokens)
