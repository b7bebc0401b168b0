"""Forwards and captured steps with fake CUDA tensors: operations that a GPU would refuse or wait for raise here.

Fake tensors have a device and no values. So reading a value raises, and so does an op whose tensors lie on different
devices. A copy between devices is legal in a forward that is launched op by op, and an error in a captured step.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.transformers_models import MODELS, make_model
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from treedecode.cache.page_pool import PagePool
from treedecode.decoding.beam_graph_step import BeamGraphStep
from treedecode.decoding.beams import BeamSearch
from treedecode.engine.forward import forward
from treedecode.engine.graph_runner import DecodeStep
from treedecode.models import TransformersModel, prefill

DEVICE = torch.device("cuda:0")
# torch asks a device's guard before it dispatches to the fake device. A build for CPUs has none for CUDA.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
const c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
const c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);
"""

pytestmark = pytest.mark.usefixtures("one_thread", "device")


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    if torch.version.cuda is not None:
        pytest.skip("this torch has a driver of its own for CUDA devices")
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, torch_dir = tmp_path_factory.mktemp("guard") / "guard.cpp", Path(torch.__file__).parent
    source.write_text(GUARD)
    library = source.with_suffix(".so")
    command = [compiler, "-std=c++20", "-shared", "-fPIC", f"-I{torch_dir}/include", f"-L{torch_dir}/lib"]
    subprocess.run([*command, source, "-o", library, "-lc10"], check=True)
    ctypes.CDLL(str(library))


@pytest.fixture
def device(guard, monkeypatch):
    properties = SimpleNamespace(multi_processor_count=132, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    torch.utils.deterministic.fill_uninitialized_memory = False
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        yield


class OnTheDevice(TorchDispatchMode):
    """Tensors come from the device and stay there; a single number of the CPU may go in, as it does with a launch."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor) and tensor.device != DEVICE and tensor.dim():
                raise RuntimeError(f"{func} within a captured step: {list(tensor.shape)} on {tensor.device}")
        return out


def make_adapter(model):
    """Of a model whose parameters and buffers are on the device, as `.to` puts them there."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            moved = {name: torch.empty_like(x, device=DEVICE) for name, x in tensors.items() if x is not None}
            wrap = torch.nn.Parameter if tensors is module._parameters else lambda x, requires_grad: x
            tensors.update({name: wrap(x, requires_grad=False) for name, x in moved.items()})
    return TransformersModel(model)


def real_model(name, dtype):
    with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.inference_mode(False):
        return make_model(name, dtype)


def make_pool(adapter):
    return PagePool(
        num_layers=adapter.num_layers, num_kv_heads=adapter.num_kv_heads, head_dim=adapter.head_dim, num_pages=40,
        page_size=4, max_branches=9, max_pages_per_branch=8, dtype=adapter.dtype, device=adapter.device,
    )  # fmt: skip


def make_steps(adapter):
    pool, settings = make_pool(adapter), BeamSearch(num_beams=4, max_new_tokens=1, eos_token_ids=(2, 7))
    return DecodeStep(adapter, pool, 5), BeamGraphStep(adapter, pool, settings, (3, 2))


@pytest.mark.parametrize("name", MODELS)
def test_captured_steps_stay_on_the_device(name):
    adapter = make_adapter(real_model(name, torch.bfloat16))
    assert adapter.device == DEVICE
    for made in make_steps(adapter):
        with OnTheDevice():
            made._step()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("min_prefill", [None, 4])
def test_forwards_op_by_op(monkeypatch, name, min_prefill):
    """Long and short queries, with and without earlier tokens."""
    # torch's own is a tensor subclass, which no fake tensor can be
    mask = lambda q_len, seq_len: torch.ones(q_len, seq_len, dtype=torch.bool, device=DEVICE).tril(seq_len - q_len)  # noqa: E731
    monkeypatch.setattr(prefill, "causal_lower_right", mask)
    adapter = make_adapter(real_model(name, torch.bfloat16))
    pool = make_pool(adapter)
    if min_prefill is not None and adapter.min_prefill is not None:
        adapter.min_prefill = min_prefill
    cached, q_lens = np.array([0, 9, 3, 0]), np.array([6, 1, 5, 2], np.int32)
    rows, count = np.arange(4), int(q_lens.sum())
    table = SimpleNamespace(num_cached=cached, packed=lambda rows, lens: (np.arange(count), np.arange(count)))
    batch = SimpleNamespace(
        rows=rows, q_lens=q_lens, decode_only=False, row_ids=torch.arange(4, device=DEVICE), wanted=rows,
        q_lens_tensor=torch.zeros(4, dtype=torch.int32, device=DEVICE),
    )  # fmt: skip
    slots = torch.zeros(count, dtype=torch.int64, device=DEVICE)
    logits, hidden = forward(adapter, pool, table, batch, slots, wants_hidden=True)
    assert (logits.shape, logits.device) == ((4, adapter.vocab_size), DEVICE)
    assert (hidden.shape, hidden.device) == ((4, adapter.hidden_size), DEVICE)


PLANTED = {
    "a table on the CPU": lambda x: torch.ones(x.shape[-1], dtype=x.dtype) * x,
    "a copy to the device": lambda x: torch.ones(x.shape[-1], dtype=x.dtype).to(x.device) * x,
    "a copy to the host": lambda x: x.cpu().to(x.device),
    "a value read": lambda x: x * x.amax().item(),
    "a condition": lambda x: x if x.amax() > 0 else -x,
    "an index by a condition": lambda x: x[x > 0],
}


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_what_is_planted_is_found(planted):
    model = real_model("llama", torch.bfloat16)
    adapter = make_adapter(model)
    made, _ = make_steps(adapter)
    model.get_decoder().norm.register_forward_hook(lambda module, args, out: planted(out))
    adapter.refresh = lambda: 0  # which would run the hook with nobody looking
    with OnTheDevice(), pytest.raises((RuntimeError, DataDependentOutputException)):
        made._step()
