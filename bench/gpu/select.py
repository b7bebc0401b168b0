"""beam_prune and sample against the field: `python -m bench.gpu.select [--only NAME] [--smoke]`."""

import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.gpu import harness, select_peers, timing
from bench.gpu.backends import kernels
from bench.gpu.harness import Builders, Contestant
from treedecode.reference.sample import kept_tokens, uniform

VOCABS = (32000, 128256, 151936, 256000)
BEAMS = (4, 8, 16, 32, 64)
GROUPS = (1, 4, 16, 64, 256)
KINDS = ("normal", "peaked", "flat", "equal", "ascending")
DTYPES = (torch.bfloat16, torch.float32)
MAX_BYTES = 2 << 30
NUM_CHECKED = 8  # rows or groups compared with float64


@dataclass(frozen=True)
class Prune:
    """Groups of beams that each want their best `num_candidates`."""

    vocab: int
    num_beams: int
    num_groups: int
    dtype: torch.dtype
    kind: str = "normal"
    num_candidates: int | None = None  # twice the beams, as beam search asks for

    @property
    def rows(self) -> int:
        return self.num_beams * self.num_groups

    @property
    def k(self) -> int:
        return self.num_candidates or 2 * self.num_beams


@dataclass(frozen=True)
class Draw:
    """Rows that each want a token."""

    vocab: int
    rows: int
    dtype: torch.dtype
    kind: str = "normal"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def make_logits(kind: str, rows: int, vocab: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(rows, vocab, generator=generator, device=device)
    if kind == "equal":
        return torch.full_like(x, -3.25, dtype=dtype)
    if kind == "ascending":
        return (3 * x).sort(dim=1).values.to(dtype)
    return (x * {"normal": 1.0, "peaked": 4.0, "flat": 0.01}[kind]).to(dtype)


def all_cases(smoke: bool) -> dict[str, Prune | Draw]:
    cases: list[Prune | Draw] = []
    if smoke:
        cases += [Prune(300, 4, 2, torch.float32), Prune(300, 2, 1, torch.bfloat16, "equal", 5)]
        cases += [Draw(300, 4, torch.float32), Draw(300, 4, torch.bfloat16, "peaked", 0.8, 20, 0.9)]
        return {_title(case): case for case in cases}
    main = (64, 151936)
    for dtype in DTYPES:
        cases += [Prune(128256, 32, 1, dtype), Prune(131072, 64, 1, dtype, num_candidates=256)]
        cases += [Prune(main[1], 8, 8, dtype, kind, 16) for kind in KINDS]
        cases += [Draw(main[1], main[0], dtype, kind) for kind in ("normal", "peaked")]
        cases += [Draw(main[1], main[0], dtype, kind, top_p=0.95) for kind in KINDS]
        cases += [
            Draw(main[1], main[0], dtype, "normal", 0.8, 50, 0.95),
            Draw(main[1], main[0], dtype, temperature=0.0),
        ]
        cases += [Draw(vocab, rows, dtype) for vocab in VOCABS for rows in (1, 16, 64, 256)]
    for dtype in DTYPES:
        cases += [Prune(vocab, 16, 4, dtype) for vocab in VOCABS]
        cases += [Prune(128256, beams, groups, dtype) for beams in BEAMS for groups in GROUPS]
    cases = [case for case in cases if case.rows * case.vocab * case.dtype.itemsize <= MAX_BYTES]
    return {_title(case): case for case in cases}


def _title(case: Prune | Draw) -> str:
    dtype = harness.dtype_name(case.dtype)
    if isinstance(case, Prune):
        return f"beam_prune {case.num_groups}x{case.num_beams}x{case.vocab} {dtype} {case.kind} k={case.k}"
    filters = f"t={case.temperature:g}" + (f" top_k={case.top_k}" if case.top_k else "")
    filters += f" top_p={case.top_p:g}" if case.top_p < 1 else ""
    return f"sample {case.rows}x{case.vocab} {dtype} {case.kind} {filters}"


def run_prune(session: harness.Session, name: str, case: Prune) -> None:
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


def draw_error(x: Tensor, row: int, case: Draw, token: int, logprob: float, entropy: float) -> float:
    """The largest error of a row's token, log-probability and entropy, each in parts of what fp32 sums may be off by.

    A token is right whose share of the cumulative distribution the row's random number falls into. The entropy is the
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
        at = (kept == token).nonzero().flatten()
        if len(at):
            borders = torch.cat([weights.new_zeros(1), weights.cumsum(0)]) / weights.sum()
            low, high = borders[at[0] : at[0] + 2].tolist()
            misses.append(max(0.0, low - u, u - high) / slack)
    errors.append(min(misses, default=math.inf))
    return harness.worst(errors)


def run_draw(session: harness.Session, name: str, case: Draw) -> None:
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
        found = zip(exact, token.tolist(), logprob.tolist(), entropy.tolist(), strict=False)
        return harness.worst(draw_error(x, row, case, *drawn) for row, (x, *drawn) in enumerate(found))

    def build(sample: Callable[..., tuple[Tensor, ...]]) -> Contestant:
        def call(i: int) -> tuple[Tensor, ...]:
            return sample(logits[i], *settings, None)

        return Contestant(call, len(logits), lambda: check(*call(0)), 1.0)

    ours: Builders = {
        f"treedecode {backend}": functools.partial(build, sample)
        for backend, sample in kernels("sample", device).items()
    }
    session.measure(
        name, ours, select_peers.draw_peers(logits, case), num_bytes=num_bytes, num_flops=0, dtype=case.dtype
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = harness.parser(__doc__).parse_args(argv)
    session = harness.Session("select", args)
    for name, case in session.cases(all_cases(args.smoke)):
        (run_prune if isinstance(case, Prune) else run_draw)(session, name, case)
    return int(session.failed)


if __name__ == "__main__":
    sys.exit(main())
