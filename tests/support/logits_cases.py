"""Logits that are hard on top-k, sums and thresholds, for the tests of beam_prune and sample."""

import math

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_logits(kind, rows, vocab):
    generator = torch.Generator().manual_seed(rows * 1000003 + vocab)
    x = torch.randn(rows, vocab, generator=generator)
    if kind == "peaked":
        return 4 * x
    if kind == "flat":
        return 0.01 * x
    if kind == "equal":
        return torch.full_like(x, -3.25)
    if kind == "ascending":
        return (3 * x).sort(dim=1).values
    if kind == "descending":
        return (3 * x).sort(dim=1, descending=True).values
    if kind == "one":
        x[:, vocab // 3] = 300.0
        return x
    if kind == "impossible":
        return x.masked_fill(torch.rand(x.shape, generator=generator) < 0.9, -math.inf)
    if kind == "few":
        y = torch.full_like(x, -math.inf)
        y[:, :: max(1, vocab // 5)] = x[:, :: max(1, vocab // 5)]
        return y
    return x


KINDS = ["normal", "peaked", "flat", "equal", "ascending", "descending", "one", "impossible", "few"]


def pack(allowed):
    rows, vocab = allowed.shape
    bits = torch.zeros(rows, (vocab + 31) // 32 * 32, dtype=torch.int64)
    bits[:, :vocab] = allowed
    words = (bits.view(rows, -1, 32) << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
