import shutil
import signal
import subprocess
import sys

import pytest
from support import cuda_library

import treedecode
from treedecode import ops, triton_kernels
from treedecode.cli import main as cli
from treedecode.common import env, machine
from treedecode.ops import _native
from treedecode.tasks.countdown import Countdown


def run(*arguments, cwd=None, **variables):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=variables or None, timeout=120
    )


def test_info_says_which_backend_each_op_takes_and_why(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "failed" not in out
    lines = [line.strip() for line in out[out.index("ops:") :].splitlines()]
    entries = [i for i, line in enumerate(lines) if line.startswith("cpu on cpu: ")]  # ops with the same reasons
    taken = {i: lines[i].removeprefix("cpu on cpu: ").split(", ") for i in entries}
    assert sorted(op for group in taken.values() for op in group) == ops.names()
    for i, group in taken.items():
        has_triton = set(group) <= set(triton_kernels.OPS)
        has_cuda = "runs on cuda tensors only" if set(group) <= _native.CUDA_OPS else "has no CUDA kernel yet"
        if not cuda_library.LIBRARY.exists():
            has_cuda = "not in this build: needs the CUDA kernels"
        assert lines[i + 1] == f"not cuda: {has_cuda}"
        assert lines[i + 2] == "not triton: " + (
            "runs on cuda tensors only" if has_triton else "has no Triton kernel yet"
        )
        assert lines[i + 3].startswith("not reference: only on request")
    assert "_host:        present" in out
    active, detected = ops.cpu_isa()
    assert f"{active} (machine: {detected}; compiled: {', '.join(ops.compiled_isas())}" in out


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"treedecode {treedecode.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["unknown"]])
def test_wrong_command(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert "usage: treedecode" in capsys.readouterr().err


@pytest.mark.parametrize("library", ["missing", "broken"])
def test_info_prints_without_a_working_library(tmp_path, library):
    package = tmp_path / "treedecode"
    shutil.copytree(
        treedecode.__path__[0], package, ignore=shutil.ignore_patterns("*.so", "__pycache__", "strategies", "models")
    )
    if library == "broken":
        (package / "_ops.so").write_bytes(b"\x7fELF nonsense")
    done = run("-m", "treedecode.cli", "info", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "torch:        2." in done.stdout
    assert "kernels:      failed: " in done.stdout
    assert ("is not built" in done.stdout) == (library == "missing")
    assert "_host:        missing" in done.stdout


def test_a_variable_chooses_backend_and_isa():
    variables = {"OMP_NUM_THREADS": "2", "TREEDECODE_BACKEND": "reference", "TREEDECODE_CPU_ISA": "generic"}
    done = run("-m", "treedecode.cli", "info", **variables)
    assert done.returncode == 0, done.stderr
    assert "variables:    " + " ".join(f"{name}={value!r}" for name, value in variables.items()) in done.stdout
    taken = [line.strip() for line in done.stdout.splitlines() if " on cpu: " in line]
    assert sorted(op for line in taken for op in line.removeprefix("reference on cpu: ").split(", ")) == ops.names()
    assert "not cpu: TREEDECODE_BACKEND=reference is set" in done.stdout
    assert "kernels:      generic (" in done.stdout
    assert "variables:    none set" in run("-m", "treedecode.cli", "info", PATH="").stdout


def test_explain_rejects_what_it_does_not_know():
    with pytest.raises(ValueError, match="no op 'sing'"):
        ops.explain("sing")
    with pytest.raises(ValueError, match="device: expected 'cpu' or 'cuda', got 'tpu'"):
        ops.explain("append_kv", "tpu")


def test_attempt_turns_errors_into_text():
    assert machine.attempt(lambda: 1 / 0) == "failed: ZeroDivisionError: division by zero"
    assert machine.version("no-such-package") == "not installed"


@pytest.mark.parametrize(
    ("variable", "function"), [("TREEDECODE_CPU_ISA", "cpu_isa"), ("TREEDECODE_BACKEND", "backend")]
)
def test_bad_variables_are_named(monkeypatch, variable, function):
    monkeypatch.setenv(variable, "sse9")
    with pytest.raises(ValueError, match=f"{variable}: expected .*, got 'sse9'"):
        getattr(env, function)()


@pytest.mark.parametrize("command", ["info", "solve --strategy help"])
def test_a_reader_that_has_seen_enough_is_no_error(command):
    program = "import sys; from treedecode.cli.main import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *command.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 128 + signal.SIGPIPE


def test_another_broken_pipe_is_an_error(monkeypatch):
    def verify(task, problem, text):
        raise BrokenPipeError("the judge has ended")

    monkeypatch.setattr(Countdown, "verify", verify)
    with pytest.raises(BrokenPipeError, match="the judge has ended"):
        cli.main(["solve", "--strategy", "best_of_n:num_samples=2", "--num-problems", "1", "--verifier", "task"])
