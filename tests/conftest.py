"""Shared fixtures: every CPU instruction set this machine runs, and NaN in uninitialised memory."""

import pytest
import torch

from treedecode import env, ops

AVAILABLE_ISAS = env.CPU_ISAS[: env.CPU_ISAS.index(ops.cpu_isa()[1]) + 1]


@pytest.fixture(params=AVAILABLE_ISAS)
def isa(request):
    """Runs the test once per instruction set this machine can execute."""
    before = ops.cpu_isa()[0]
    ops.set_cpu_isa(request.param)
    yield request.param
    ops.set_cpu_isa(before)


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    """torch.empty returns NaN (or the largest integer), so a kernel that forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
