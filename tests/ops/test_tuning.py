import json
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from treedecode.cli import main as cli
from treedecode.ops import _native, _tuned
from treedecode.ops import tuning as tune


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """Makes an empty cache folder."""
    monkeypatch.setenv("TREEDECODE_CACHE", str(tmp_path))
    for cached in (_tuned.tables, _tuned._sizes):
        cached.cache_clear()
    yield tmp_path
    for cached in (_tuned.tables, _tuned._sizes):
        cached.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that there is a GPU; everything runs on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")


def test_without_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert cli.main(["tune"]) == 1
    assert "torch sees none here" in capsys.readouterr().err


@pytest.mark.parametrize("op", tune.CASES)
def test_cases_are_arguments_of_the_op(op):
    sizes = []
    for args in tune.CASES[op]("cpu"):
        schema = getattr(torch.ops.treedecode, op).default._schema
        assert len(args) == len(schema.arguments)
        for argument, value in zip(schema.arguments, args, strict=True):
            assert value is None or isinstance(value, Tensor) == ("Tensor" in str(argument.type)), argument.name
        if op != "tree_attention":  # its plan is a flat one, which the CPU op refuses
            before = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
            getattr(torch.ops.treedecode, op)(*args)
            if op == "fork_branches":
                assert torch.equal(before[3], args[3])
        sizes.append(_tuned.size_class(args))
        if len(sizes) == 4:
            break
    assert len(set(sizes)) > 1


def test_the_faster_kernel_is_kept_and_taken(cache, gpu, monkeypatch):
    def small(device):
        yield (torch.zeros(1),)
        yield (torch.zeros(1),)
        yield (torch.zeros(1000),)

    def kernel(name):
        def run(x):
            calls.append(name)
            return name

        return run

    calls = []
    kernels = {"cuda": kernel("cuda"), "triton": kernel("triton")}
    times = {("cuda", 1): 1.0, ("triton", 1): 3.0, ("cuda", 1000): 5.0, ("triton", 1000): 4.0}
    monkeypatch.setattr(tune, "CASES", {"sample": small, "rms_norm": small})
    monkeypatch.setattr(tune, "kernels", lambda op: kernels if op == "sample" else {"triton": kernels["triton"]})
    monkeypatch.setattr(tune, "seconds", lambda call: times[call(), call.args[0].numel()])
    lines = []
    path = tune.tune(lines.append)
    assert path == str(cache / "tuned" / "nvidia-h100-80gb-hbm3.json")
    table = json.loads((cache / "tuned" / "nvidia-h100-80gb-hbm3.json").read_text())
    assert table["choices"] == {"sample": {"1": "cuda", "10": "triton"}}
    assert table["seconds"]["sample"]["1"] == {"cuda": 2.0, "triton": 6.0}
    assert table["device"] == "NVIDIA H100 80GB HBM3"
    assert any(line.startswith("rms_norm: only triton") for line in lines)
    assert [path.name for path in (cache / "tuned").iterdir()] == ["nvidia-h100-80gb-hbm3.json"]

    _tuned.tables.cache_clear()
    assert _tuned.takes_triton("sample")
    assert not _tuned.takes_triton("beam_prune")
    choose = _tuned.chooser("sample", kernels["cuda"], kernels["triton"])
    assert [choose(torch.zeros(n)) for n in (1, 2, 31, 33, 5000)] == ["cuda", "cuda", "cuda", "triton", "triton"]
    other = _tuned.chooser("beam_prune", kernels["cuda"], kernels["triton"])
    assert other(torch.zeros(5000)) == "cuda"


def test_a_broken_table_is_named(cache):
    path = _tuned.path_of("Some GPU")
    path.parent.mkdir()
    for text in ("{", "[]", '{"format": 99, "choices": {}}', '{"format": 1, "choices": {"sample": {"x": "cuda"}}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"some-gpu\.json: not a table of `treedecode tune`"):
            _tuned.tables()


def test_kernels_are_those_of_this_build():
    for op in ("sample", "append_kv"):
        by_backend = tune.kernels(op)
        assert ("cuda" in by_backend) == (op in _native.CUDA_OPS)


@pytest.mark.skipif("sample" not in _native.CUDA_OPS, reason="this build has no CUDA kernels")
@pytest.mark.parametrize(("sizes", "backend"), [({"9": "cuda", "20": "triton"}, "cuda"), ({"9": "triton"}, "triton")])
def test_a_table_is_in_force_in_the_next_process(cache, sizes, backend):
    path = _tuned.path_of("Some GPU")
    path.parent.mkdir()
    path.write_text(json.dumps({"format": 1, "choices": {"sample": sizes}}))
    code = (
        "from treedecode import ops; print(*ops.explain('sample', 'cuda')); print(*ops.explain('beam_prune', 'cuda'))"
    )
    env = {**os.environ, "TREEDECODE_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    sample, beam_prune = done.stdout.splitlines()
    assert sample.startswith(f"sample cuda {backend} ")
    assert ("measured slower at every size" if backend == "triton" else "taken at sizes where it measured") in sample
    assert beam_prune.startswith("beam_prune cuda cuda ")
    assert done.stderr == ""
