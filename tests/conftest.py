"""Shared fixtures: every CPU instruction set this machine runs, and NaN in uninitialised memory."""

import gc
import os

import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported: its kernels then run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

from treedecode import env, ops

try:
    from triton.runtime import interpreter
except ImportError:  # tests of its kernels are then skipped
    interpreter = None

AVAILABLE_ISAS = env.CPU_ISAS[: env.CPU_ISAS.index(ops.cpu_isa()[1]) + 1]


def _index_by_item(patch_tensor):
    """The interpreter of Triton 3.6 takes int() of arrays with one element, which NumPy 2.4 and later refuse."""

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch


if interpreter is not None:
    interpreter._patch_lang_tensor = _index_by_item(interpreter._patch_lang_tensor)


@pytest.fixture(params=AVAILABLE_ISAS)
def isa(request):
    """Runs the test once per instruction set this machine can execute."""
    before = ops.cpu_isa()[0]
    ops.set_cpu_isa(request.param)
    yield request.param
    ops.set_cpu_isa(before)


@pytest.fixture
def one_thread():
    """On tensors as small as the tests' threads only wait for each other; a test of threads sets its own number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    """torch.empty returns NaN (or the largest integer), so a kernel that forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["op by op", "captured"])
def make_decoder(request):
    """Makes decoders; at the end of the test each is whole and has leaked nothing.

    The captured ones take decode steps as on a GPU, one step behind and with idle rows; only the graph is missing.
    """
    from fakes import fake_decoder

    made = []

    def make(model=None, **options):
        made.append(fake_decoder(model, captured=request.param == "captured", **options))
        return made[-1]

    yield make
    gc.collect()
    for decoder in made:
        decoder.check_integrity()
        assert decoder.num_branches == 0, "branches leaked"
        pool = decoder.engine.pool
        assert pool.num_free_pages + len(decoder.engine.index.pages()) == pool.num_pages, "pages leaked"


@pytest.fixture(params=["dispatched", "cuda", "triton"])
def through(request, monkeypatch):
    """`through("sample")` sends an op's front door to a backend's kernels, or leaves it to the dispatcher."""
    from gpu_cases import send

    return lambda *names: None if request.param == "dispatched" else send(monkeypatch, request.param, *names)
