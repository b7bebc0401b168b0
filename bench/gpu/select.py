"""Times beam_prune and sample beside other libraries: `python -m bench.gpu.select [--only NAME] [--smoke]`."""

import functools
import math
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.gpu import harness, logits_cases, select_peers, timing
from bench.gpu.backends import kernels
from bench.gpu.contestants import Builders, Contestant
from bench.gpu.logits_cases import PruneCase, SampleCase, make_logits
from treedecode.reference.sample import kept_tokens, uniform

NUM_CHECKED = 8  # rows or groups compared with float64


def run_prune(session: harness.Session, name: str, case: PruneCase) -> None:
    device = session.device
    num_bytes = case.rows * case.vocab * case.dtype.itemsize
    logits = [
        make_logits(case.kind, case.rows, case.vocab, case.dtype, device, seed)
        for seed in range(timing.num_sets(num_bytes, device))
    ]
    cum = -torch.rand(case.rows, device=device)
    indptr = torch.arange(0, case.rows + 1, case.num_beams, dtype=torch.int32, device=device)

    groups = range(0, case.num_groups, max(1, case.num_groups // NUM_CHECKED))
    exact = []
    for group in groups:
        rows = slice(group * case.num_beams, (group + 1) * case.num_beams)
        scores = logits[0][rows].double().log_softmax(1) + cum[rows].double()[:, None]
        exact.append(scores.flatten().topk(case.k).values)
    want = torch.stack(exact)

    def check(scores: Tensor) -> float:
        return harness.relative_error(scores[list(groups)], want)

    # a score is a few fp32 operations on numbers of its own size
    limit = 16 * torch.finfo(torch.float32).eps

    def build(prune: Callable[..., tuple[Tensor, ...]]) -> Contestant:
        def call(i: int) -> tuple[Tensor, ...]:
            return prune(logits[i], cum, indptr, case.k, None, False)

        return Contestant(call, len(logits), lambda: check(call(0)[0]), limit)

    ours = {
        f"treedecode {backend}": functools.partial(build, prune)
        for backend, prune in kernels("beam_prune", device).items()
    }
    session.measure(
        name, ours, select_peers.prune_peers(logits, cum, case, check, limit), num_bytes=num_bytes, num_flops=0,
        dtype=case.dtype,
    )  # fmt: skip


def sample_error(x: Tensor, row: int, case: SampleCase, token: int, logprob: float, entropy: float) -> float:
    """Returns the largest error of a row's token, log-probability and entropy, each in units of what fp32 sums allow.

    A token is right if the row's random number falls into its share of the cumulative distribution. The entropy is the
    difference of a log-sum-exp and a mean logit, and as exact as those are.
    """
    eps = torch.finfo(torch.float32).eps
    logprobs = x.log_softmax(0)
    size = abs(x.max().item()) + math.log(case.vocab)
    errors = [
        abs(logprob - logprobs[token].item()) / (2 * eps * (size + abs(logprobs[token].item()))),
        abs(entropy + (logprobs.exp() * logprobs).sum().item()) / (4 * eps * (1 + size)),
    ]
    slack = 32 * eps
    u, misses = uniform(row, row), []
    for shift in (-slack, 0.0, slack) if case.top_p < 1 else (0.0,):  # the filter's border may move by a token
        kept, weights = kept_tokens(x, case.temperature, case.top_k, case.top_p + shift, 0.0)
        index = (kept == token).nonzero().flatten()
        if len(index):
            borders = torch.cat([weights.new_zeros(1), weights.cumsum(0)]) / weights.sum()
            low, high = borders[index[0] : index[0] + 2].tolist()
            misses.append(max(0.0, low - u, u - high) / slack)
    errors.append(min(misses, default=math.inf))
    return harness.worst(errors)


def run_sample(session: harness.Session, name: str, case: SampleCase) -> None:
    device = session.device
    num_bytes = case.rows * case.vocab * case.dtype.itemsize
    logits = [
        make_logits(case.kind, case.rows, case.vocab, case.dtype, device, seed)
        for seed in range(timing.num_sets(num_bytes, device))
    ]
    seed, position = torch.arange(case.rows, device=device), torch.arange(case.rows, device=device)
    settings = (
        torch.full((case.rows,), case.temperature, device=device),
        torch.full((case.rows,), case.top_k, dtype=torch.int32, device=device),
        torch.full((case.rows,), case.top_p, device=device),
        torch.zeros(case.rows, device=device),
        seed,
        position,
    )
    exact = [x.double().cpu() for x in logits[0][:NUM_CHECKED]]

    def check(token: Tensor, logprob: Tensor, entropy: Tensor) -> float:
        results = zip(exact, token.tolist(), logprob.tolist(), entropy.tolist(), strict=False)
        return harness.worst(sample_error(x, row, case, *drawn) for row, (x, *drawn) in enumerate(results))

    def build(sample: Callable[..., tuple[Tensor, ...]]) -> Contestant:
        def call(i: int) -> tuple[Tensor, ...]:
            return sample(logits[i], *settings, None)

        return Contestant(call, len(logits), lambda: check(*call(0)), 1.0)

    ours: Builders = {
        f"treedecode {backend}": functools.partial(build, sample)
        for backend, sample in kernels("sample", device).items()
    }
    session.measure(
        name, ours, select_peers.sample_peers(logits, case), num_bytes=num_bytes, num_flops=0, dtype=case.dtype
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = harness.parser(__doc__).parse_args(argv)
    session = harness.Session("select", args)
    for name, case in session.cases(logits_cases.all_cases(args.smoke)):
        (run_prune if isinstance(case, PruneCase) else run_sample)(session, name, case)
    return int(session.failed)


if __name__ == "__main__":
    sys.exit(main())
