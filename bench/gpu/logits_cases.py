"""Cases of the benchmarks that read logits: beams to prune, and rows to sample from."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.harness import dtype_name

VOCABS = (32000, 128256, 151936, 256000)
BEAMS = (4, 8, 16, 32, 64)
GROUPS = (1, 4, 16, 64, 256)
KINDS = ("normal", "peaked", "flat", "equal", "ascending")
DTYPES = (torch.bfloat16, torch.float32)
MAX_BYTES = 2 << 30


@dataclass(frozen=True)
class PruneCase:
    """Groups of beams, of which each needs its best `num_candidates`."""

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
class SampleCase:
    """Rows of which each needs a token."""

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


def all_cases(smoke: bool) -> dict[str, PruneCase | SampleCase]:
    """Returns the cases by title; those that tell most first, in case time runs out."""
    cases: list[PruneCase | SampleCase] = []
    if smoke:
        cases += [PruneCase(300, 4, 2, torch.float32), PruneCase(300, 2, 1, torch.bfloat16, "equal", 5)]
        cases += [SampleCase(300, 4, torch.float32), SampleCase(300, 4, torch.bfloat16, "peaked", 0.8, 20, 0.9)]
        return {_title(case): case for case in cases}
    main = (64, 151936)
    for dtype in DTYPES:
        cases += [PruneCase(128256, 32, 1, dtype), PruneCase(131072, 64, 1, dtype, num_candidates=256)]
        cases += [PruneCase(main[1], 8, 8, dtype, kind, 16) for kind in KINDS]
        cases += [SampleCase(main[1], main[0], dtype, kind) for kind in ("normal", "peaked")]
        cases += [SampleCase(main[1], main[0], dtype, kind, top_p=0.95) for kind in KINDS]
        cases += [
            SampleCase(main[1], main[0], dtype, "normal", 0.8, 50, 0.95),
            SampleCase(main[1], main[0], dtype, temperature=0.0),
        ]
        cases += [SampleCase(vocab, rows, dtype) for vocab in VOCABS for rows in (1, 16, 64, 256)]
    for dtype in DTYPES:
        cases += [PruneCase(vocab, 16, 4, dtype) for vocab in VOCABS]
        cases += [PruneCase(128256, beams, groups, dtype) for beams in BEAMS for groups in GROUPS]
    cases = [case for case in cases if case.rows * case.vocab * case.dtype.itemsize <= MAX_BYTES]
    return {_title(case): case for case in cases}


def _title(case: PruneCase | SampleCase) -> str:
    dtype = dtype_name(case.dtype)
    if isinstance(case, PruneCase):
        return f"beam_prune {case.num_groups}x{case.num_beams}x{case.vocab} {dtype} {case.kind} k={case.k}"
    filters = f"t={case.temperature:g}" + (f" top_k={case.top_k}" if case.top_k else "")
    filters += f" top_p={case.top_p:g}" if case.top_p < 1 else ""
    return f"sample {case.rows}x{case.vocab} {dtype} {case.kind} {filters}"
