"""Settings for the tests of sample, and the check of its draws against the reference."""

import math

import torch

from treedecode.reference import sample as reference_sample
from treedecode.reference.sample import kept_tokens, uniform

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1, "position": 0}


def per_row(rows, **settings):
    """Makes settings of `ops.sample`, as tensors of one value per row; `OFF` where none is given."""
    dtypes = {"top_k": torch.int32, "seed": torch.int64, "position": torch.int64}
    return {
        name: torch.as_tensor(value, dtype=dtypes.get(name, torch.float32)).expand(rows)
        for name, value in (OFF | settings).items()
    }


def assert_drawn_right(logits, got, settings, token_mask=None):
    """Asserts the reference's token, or its neighbour where the uniform number is within rounding of their border."""
    token, logprob, entropy = got
    want_token, want_logprob, want_entropy = reference_sample(logits, **settings, token_mask=token_mask)
    x = logits.double()
    if token_mask is not None:
        words = token_mask.long() % 2**32
        allowed = (words[:, :, None] >> torch.arange(32) & 1).bool().flatten(1)[:, : x.shape[1]]
        x = x.masked_fill(~allowed, -math.inf)
    for row in (token != want_token).nonzero().flatten().tolist():
        one = {name: settings[name][row].item() for name in settings}
        # Rounding may move a border of the filters by one token or the draw by its own error, nothing else.
        slack = 4e-6
        chances = []
        for top_p in (one["top_p"] - slack, one["top_p"], one["top_p"] + slack):
            p = min(max(top_p, 0.0), 1.0) if one["top_p"] < 1 else 1.0
            kept, weights = kept_tokens(x[row], one["temperature"], one["top_k"], p, one["min_p"])
            cdf = weights.cumsum(0) / weights.sum()
            positions = (kept == token[row]).nonzero().flatten()
            if len(positions):
                low = cdf[positions[0] - 1].item() if positions[0] > 0 else 0.0
                u = uniform(one["seed"], one["position"])
                chances.append(low - slack <= u <= cdf[positions[0]].item() + slack)
        assert any(chances), (row, token[row], want_token[row])
    want_logprob = (x - x.logsumexp(1, keepdim=True)).gather(1, token.long()[:, None])[:, 0]
    eps = 2.0**-23
    top = x.amax(1)
    scale = top.abs() + want_logprob.abs() + math.log(x.shape[1])
    assert ((logprob.double() - want_logprob).abs() <= 2 * eps * scale).all()
    assert ((entropy.double() - want_entropy).abs() <= 4 * eps * (1 + math.log(x.shape[1]))).all()


FILTERS = [
    {},
    {"temperature": 0.7},
    {"temperature": 0.0, "top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 0.5, "temperature": 1.3},
    {"top_k": 50},
    {"top_k": 1},
    {"top_k": 10**6, "top_p": 0.9},
    {"top_k": 1500, "top_p": 0.8},
    {"min_p": 0.05},
    {"top_k": 200, "top_p": 0.9, "min_p": 0.02, "temperature": 0.8},
]
LARGE = 131072  # tokens of today's vocabularies; sums over them, flat and peaked, keep to the same budgets
