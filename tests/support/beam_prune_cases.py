"""Offsets of groups for the tests of beam_prune, and the check of its results against the reference."""

import math

import torch

from treedecode.reference import beam_prune as reference_beam_prune

EPS = 2.0**-23


def indptr(*sizes):
    """Returns the offsets of groups of these sizes."""
    return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)


def assert_pruned_right(logits, cum, groups, k, got, **options):
    """Asserts the reference's candidates up to scores that fp32 cannot tell apart, in exactly the order we define."""
    scores, parent, token, lse = got
    want_scores, _, _, want_lse = reference_beam_prune(logits, cum, groups, k, **options)
    scale = logits.double().masked_fill(logits == -math.inf, 0).abs().amax(1) + math.log(logits.shape[1])
    impossible = want_lse == -math.inf
    assert (lse[impossible] == -math.inf).all()
    assert ((lse - want_lse).abs() <= 2 * EPS * scale)[~impossible].all()
    missing = want_scores == -math.inf
    assert torch.equal(scores == -math.inf, missing)
    assert (parent[missing] == -1).all()
    assert (token[missing] == -1).all()
    slack = 3 * EPS * (scale.max() + cum[cum > -math.inf].abs().amax().double())
    assert ((scores - want_scores).abs() <= slack)[~missing].all()
    # Safe with ties: the logits that the candidates point at have their scores.
    x = logits.double()
    exact = cum.double()[:, None] + (x - (0.0 if options.get("is_logprobs") else want_lse[:, None]))
    pointed = exact[parent.long().clamp(min=0), token.long().clamp(min=0)]
    assert ((scores - pointed).abs() <= slack)[~missing].all()
    for group in range(len(groups) - 1):
        found = [
            (
                -scores[group, j].item(),
                parent[group, j].item(),
                -x[parent[group, j], token[group, j]].item(),
                token[group, j].item(),
            )
            for j in range(k)
            if not missing[group, j]
        ]
        assert found == sorted(found)
        assert len({(row, t) for _, row, _, t in found}) == len(found)
        assert all(groups[group] <= row < groups[group + 1] for _, row, _, _ in found)
        # No candidate equal to the last one of a row, and before it in the order, is missing.
        for row in {row for _, row, _, _ in found}:
            mine = [(value, t) for _, r, value, t in found if r == row]
            value, last = mine[-1]
            ties = (x[row] == -value).nonzero().flatten()
            if options.get("token_mask") is None:
                assert {t for v, t in mine if v == value} == {t for t in ties.tolist() if t <= last}
