import pytest
import torch

from treedecode import ops


def make_logits(kind, rows, vocab, dtype):
    x = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))
    by_kind = {"normal": x, "peaked": 3 * x, "flat": 0.01 * x, "ascending": x.sort(dim=1).values}
    return by_kind[kind].to(dtype)


SHAPES = [(64, 151936), (64, 49152), (16, 49152), (1, 151936)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("shape", "kind", "k"),
    [((64, 151936), kind, 16) for kind in ("normal", "peaked", "flat", "ascending")]
    + [((64, 151936), "normal", k) for k in (64, 1024)]
    + [(shape, "normal", 16) for shape in SHAPES[1:]],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def bench_beam_prune(compare, dtype, shape, kind, k):
    rows, vocab = shape
    logits = make_logits(kind, rows, vocab, dtype)
    cum = -torch.rand(rows)
    groups = torch.arange(0, rows + 1, min(rows, 8), dtype=torch.int32)  # beams of 8
    size = rows // (len(groups) - 1)

    def topk():
        score = torch.log_softmax(logits.float(), dim=-1) + cum[:, None]
        return score.view(-1, size * vocab).topk(k)

    compare(
        lambda: ops.beam_prune(logits, cum, groups, k),
        {"log_softmax + topk": topk},
        num_bytes=logits.nbytes,
        dtype=dtype,
        peer_seconds=1.5,
    )
