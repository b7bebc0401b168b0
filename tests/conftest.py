"""Shared fixtures: every CPU instruction set this machine runs, and NaN in uninitialised memory."""

import gc
import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported: its kernels then run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from support import triton_interpreter  # noqa: F401 - replaces parts of it

from treedecode import ops
from treedecode.common import env

AVAILABLE_ISAS = env.CPU_ISAS[: env.CPU_ISAS.index(ops.cpu_isa()[1]) + 1]


def pytest_collection_finish():
    """Freezes imported objects, which need not be looked at whenever garbage is collected after a test."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture(params=AVAILABLE_ISAS)
def isa(request):
    """Runs the test once per instruction set this machine can execute."""
    before = ops.cpu_isa()[0]
    ops.set_cpu_isa(request.param)
    yield request.param
    ops.set_cpu_isa(before)


@pytest.fixture
def one_thread():
    """Runs the test on one thread, because on small tensors several only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    """Lets torch.empty return NaN (or the largest integer), so that a kernel that forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["op by op", "captured"])
def make_decoder(request):
    """Makes decoders, and checks at the end of the test that none has leaked branches or pages.

    The captured ones take decode steps as on a GPU, one step behind and with idle rows; only the graph is missing.
    """
    from support.fakes import fake_decoder

    decoders = []

    def make(model=None, **options):
        decoders.append(fake_decoder(model, captured=request.param == "captured", **options))
        return decoders[-1]

    yield make
    gc.collect()
    for decoder in decoders:
        decoder.check_integrity()
        assert decoder.num_branches == 0, "branches leaked"
        pool = decoder.engine.pool
        assert pool.num_free_pages + len(decoder.engine.store.index.pages()) == pool.num_pages, "pages leaked"


@pytest.fixture(params=["dispatched", "cuda", "triton"])
def through(request, monkeypatch):
    """`through("sample")` sends an op's front door to a backend's kernels, or leaves it to the dispatcher."""
    from support.gpu_cases import send

    return lambda *names: None if request.param == "dispatched" else send(monkeypatch, request.param, *names)
