"""The host shim that runs CUDA kernels: it reports misuse, and computes the results of the device."""

import pytest
import torch
from support import simt_kernels as simt

THREADS = 96


def run_toy(name, *, num_threads=THREADS, num_blocks=1, size=THREADS, fill=-7, **options):
    values = torch.arange(1, num_threads + 1, dtype=torch.int32)
    out = torch.full((size,), fill, dtype=torch.int32)
    simt.run(name, num_threads=num_threads, num_blocks=num_blocks, **{"in": values}, out=out, **options)
    return values, out


@pytest.mark.parametrize("seed", range(8))
def test_barrier(seed):
    values, out = run_toy("toy_reverse", seed=seed)
    assert torch.equal(out, values.flip(0))


def test_a_missing_barrier_gives_wrong_results():
    simt.barriers_seen()
    run_toy("toy_reverse")
    (barrier,) = simt.barriers_seen()
    for seed in range(8):
        values, out = run_toy("toy_reverse", seed=seed, drop=barrier)
        assert not torch.equal(out, values.flip(0))


@pytest.mark.parametrize(("name", "factor"), [("toy_scan", 3), ("toy_scans", 33)])
def test_every_barrier_of_a_block_scan_is_needed(name, factor):
    simt.barriers_seen()
    values, want = run_toy(name, num_threads=64, size=64)
    barriers = simt.barriers_seen()
    assert torch.equal(want, factor * (values.cumsum(0, dtype=torch.int32) - values + values.sum()))
    assert len(barriers) == 2
    for drop in [None, *barriers]:
        right = [torch.equal(run_toy(name, num_threads=64, size=64, seed=s, drop=drop)[1], want) for s in range(40)]
        assert all(right) == (drop is None), drop


@pytest.mark.parametrize("seed", simt.SEEDS)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("toy_divergence", r"self_test.cu:\d+: thread \d+ of block 0: divergence: (shfl|ballot), while lanes .* wait"),
        ("toy_two_barriers", "sync_threads, while others wait at that of self_test.cu"),
        ("toy_deadlock", r"deadlock: 32 threads wait at named_barrier_sync \(self_test.cu:\d+\)"),
        ("toy_early_exit", r"with lanes that have ended|has ended, and lanes of its warp wait for it at any"),
    ],
)
def test_misuse_is_reported(name, message, seed):
    with pytest.raises(simt.KernelError, match=message):
        run_toy(name, seed=seed)
    run_toy("toy_reverse", seed=seed)  # after a run that ended early


def test_a_wrong_launch_is_refused():
    with pytest.raises(simt.KernelError, match="invalid launch configuration"):
        run_toy("toy_reverse", num_threads=1025)


def test_shared_memory_is_poisoned():
    assert (run_toy("toy_unwritten")[1] == -2).all()


@pytest.mark.parametrize("seed", range(12))
def test_cp_async_comes_at_the_wait_or_before(seed):
    values, out = run_toy("toy_cp_async", seed=seed)
    want = torch.where(torch.arange(THREADS) % 4 != 1, values, 0)
    half = THREADS // 2
    assert torch.equal(out[half:], want[half:])
    early = out[:half] == want[:half]
    assert (early | (out[:half] == -1)).all()
    assert not early.all(), "a kernel that does not wait would pass"
    assert early.any() == (seed >= 2)


@pytest.mark.parametrize("seed", simt.SEEDS)
def test_named_barriers(seed):
    values, out = run_toy("toy_hand_over", seed=seed)
    assert torch.equal(out, values + 1)


@pytest.mark.parametrize("resident_blocks", [1, 3, 7])
@pytest.mark.parametrize("seed", simt.SEEDS)
def test_last_block(seed, resident_blocks):
    sizes = {"num_threads": 32, "num_blocks": 7, "fill": 0}
    _, out = run_toy("toy_last_block", **sizes, seed=seed, resident_blocks=resident_blocks)
    assert out[:9].tolist() == [7, *range(1, 8), 28]


@pytest.mark.parametrize("seed", simt.SEEDS)
def test_polling(seed):
    _, out = run_toy("toy_poll", num_threads=160, size=6, seed=seed)
    assert out.tolist() == [*range(5), -7]
    with pytest.raises(simt.KernelError, match="livelock"):
        run_toy("toy_poll", num_threads=160, num_blocks=2, size=6, seed=seed)


@pytest.mark.parametrize("seed", simt.SEEDS)
def test_atomics(seed):
    _, out = run_toy("toy_atomics", size=7, fill=0, seed=seed)
    bits = 2 * 2 + 2 + (64 - 39) + 31 + 3  # of 96 << 32 | 96, of 3; leading zeros; index
    assert out.tolist() == [THREADS, 1, THREADS, -THREADS, THREADS, THREADS * (THREADS + 1) // 2, bits]


@pytest.mark.parametrize("seed", simt.SEEDS)
def test_wide_accesses_and_arithmetic(seed):
    values, out = run_toy("toy_wide", seed=seed)
    assert torch.equal(out, 2 * values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrix_fragments(dtype):
    torch.manual_seed(0)
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    out, elements = torch.full((16, 8), torch.nan), torch.zeros(32, 4, dtype=torch.int32)
    simt.run("toy_fragments", a=a, b=b, out=out, elements=elements, is_bf16=dtype == torch.bfloat16)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-6, atol=1e-5)
    # PTX ISA, mma.m16n8k16, fragment of A: registers are the quarters (rows 0-7 or 8-15, columns 0-7 or 8-15)
    # top left, bottom left, top right, bottom right; lane i holds row i / 4, columns 2 * (i % 4) and the next.
    quarters = a.view(torch.int16).view(2, 8, 2, 4, 2)  # row half, row, column half, pair, element
    want = quarters.permute(1, 3, 2, 0, 4).reshape(32, 4, 2)
    assert torch.equal(elements.view(torch.int16).view(32, 4, 2), want)
