"""Peers of beam_prune and sample. Where a peer does not do all of the work, its row says what it leaves out."""

import functools
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from bench.gpu.contestants import Builders, Contestant, NotApplicable, import_peer, require_gpu
from bench.gpu.logits_cases import PruneCase, SampleCase

Check = Callable[[Tensor], float]


def _flashinfer(device: torch.device) -> ModuleType:
    require_gpu(device)
    return import_peer("flashinfer")


def log_softmax_topk(logits: Tensor, cum: Tensor, num_groups: int, k: int) -> tuple[Tensor, Tensor]:
    score = torch.log_softmax(logits.float(), dim=-1) + cum[:, None]
    return score.view(num_groups, -1).topk(k)


def lse_topk(logits: Tensor, cum: Tensor, num_groups: int, k: int) -> tuple[Tensor, Tensor]:
    """Takes the top-k of the raw logits row by row, then the best of a group, and never writes the log-softmax."""
    value, token = logits.topk(min(k, logits.shape[1]), dim=-1)
    score = value.float() - logits.float().logsumexp(-1, keepdim=True) + cum[:, None]
    best, index = score.view(num_groups, -1).topk(k)
    return best, token.view(num_groups, -1).gather(1, index)


def prune_peers(logits: list[Tensor], cum: Tensor, case: PruneCase, check: Check, limit: float) -> Builders:
    device = cum.device

    def plain(function: Callable[..., tuple[Tensor, Tensor]]) -> Contestant:
        def call(i: int) -> tuple[Tensor, Tensor]:
            return function(logits[i], cum, case.num_groups, case.k)

        return Contestant(call, len(logits), lambda: check(call(0)[0]), limit)

    def compiled(function: Callable[..., tuple[Tensor, Tensor]]) -> Contestant:
        if device.type != "cuda":
            raise NotApplicable("compiled on a GPU only")
        torch._dynamo.reset()  # else shapes add up to the limit from which on nothing is compiled
        return plain(torch.compile(function, dynamic=False))

    def flashinfer() -> Contestant:
        top_k = _flashinfer(device).top_k

        def call(i: int) -> tuple[Tensor, Tensor]:
            return top_k(logits[i], case.k, sorted=True)

        return Contestant(call, len(logits), notes="top-k of each row alone: no log-softmax, no groups")

    return {
        "log_softmax + topk": functools.partial(plain, log_softmax_topk),
        "lse + topk": functools.partial(plain, lse_topk),
        "log_softmax + topk, compiled": functools.partial(compiled, log_softmax_topk),
        "lse + topk, compiled": functools.partial(compiled, lse_topk),
        "FlashInfer top_k": flashinfer,
    }


def filtered_multinomial(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Filters and draws as `generate` does."""
    x = logits.float()
    if temperature == 0:
        return x.argmax(-1)
    if temperature != 1:
        x = x / temperature
    if top_k:
        x = x.masked_fill(x < x.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        value, index = x.sort(descending=False)
        drop = value.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[:, -1] = False
        x = x.masked_fill(drop.scatter(1, index, drop), -torch.inf)
    return torch.multinomial(x.softmax(-1), 1)


def sample_peers(logits: list[Tensor], case: SampleCase) -> Builders:
    device = logits[0].device

    def plain(function: Callable[..., Tensor]) -> Contestant:
        def call(i: int) -> Tensor:
            return function(logits[i], case.temperature, case.top_k, case.top_p)

        return Contestant(call, len(logits), notes="no log-probability, no entropy")

    def compiled() -> Contestant:
        if device.type != "cuda":
            raise NotApplicable("compiled on a GPU only")
        torch._dynamo.reset()  # else shapes add up to the limit from which on nothing is compiled
        return plain(torch.compile(filtered_multinomial, dynamic=False))

    def flashinfer() -> Contestant:
        module = _flashinfer(device)
        if case.temperature == 0:
            raise NotApplicable("has no temperature 0")

        def call(i: int) -> Tensor:
            x = logits[i].float()
            if case.top_k:
                if case.temperature != 1:
                    x = x / case.temperature
                return module.sampling.top_k_top_p_sampling_from_logits(x, case.top_k, case.top_p, seed=1, offset=i)
            if case.top_p < 1:
                probs = module.sampling.softmax(x, temperature=case.temperature)
                return module.sampling.top_p_sampling_from_probs(probs, case.top_p, seed=1, offset=i)
            if case.temperature != 1:
                x = x / case.temperature
            return module.sampling.sampling_from_logits(x, seed=1, offset=i)

        return Contestant(call, len(logits), notes="no log-probability, no entropy; from fp32 logits or probabilities")

    return {
        "softmax + multinomial": functools.partial(plain, filtered_multinomial),
        "softmax + multinomial, compiled": compiled,
        "FlashInfer sampling": flashinfer,
    }
