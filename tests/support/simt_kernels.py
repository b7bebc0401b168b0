"""Runs CUDA kernels on the host: `run("append_kv", seed=3, k=..., ...)` calls a launcher with a params struct.

The fields of the struct are read from its header, so that they are listed only there.
"""

import ctypes
import faulthandler
import functools
import os
import re
import signal
from pathlib import Path

import torch
from support.paths import ROOT, TESTS

import treedecode

SANITIZED = Path(treedecode.__path__[0]) / "_simt_sanitized.so"
LIBRARY = SANITIZED if "SIMT_SANITIZED" in os.environ else SANITIZED.with_name("_simt.so")  # see test_sanitized.py
SCALARS = {
    "int32_t": ctypes.c_int32, "uint32_t": ctypes.c_uint32, "int64_t": ctypes.c_int64, "uint64_t": ctypes.c_uint64,
    "size_t": ctypes.c_size_t, "float": ctypes.c_float, "double": ctypes.c_double, "bool": ctypes.c_bool,
    "DType": ctypes.c_int32,
}  # fmt: skip
SEEDS = (0, 1, 2, 3)  # threads in ascending order, in descending order, at random


class KernelError(Exception):
    """An error that the shim reports: a divergent collective, a deadlock, a wrong launch."""


@functools.cache
def _library():
    library = ctypes.CDLL(str(LIBRARY))
    library.simt_barriers.restype = ctypes.c_char_p
    library.simt_configure.argtypes = (ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p)
    return library


@functools.cache
def _sources():
    headers = [*TESTS.glob("simt/*.h"), *ROOT.glob("csrc/cuda/*/*.h"), ROOT / "csrc" / "cpu" / "strides.h"]
    return "\n".join(path.read_text() for path in headers), "\n".join(p.read_text() for p in TESTS.glob("simt/*.cpp"))


@functools.cache
def _struct(name):
    """Returns the ctypes twin of a plain struct: one field per line, `type name;` or `type name[n];`."""
    body = re.search(rf"\bstruct {name} {{\n(.*?)\n}};", _sources()[0], re.DOTALL)[1]
    fields = []
    for line in body.splitlines():
        code = line.split("//")[0].strip()
        if not code or "(" in code:
            continue
        kind, pointer, field, count = re.fullmatch(r"(?:const )?([\w:]+)(\*?) (\w+)(?:\[(\d+)\])?;", code).groups()
        kind = ctypes.c_void_p if pointer else SCALARS.get(kind) or _struct(kind)
        fields.append((field, kind * int(count) if count else kind))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def _fill(kind, value):
    if value is None or isinstance(value, torch.Tensor):
        assert kind is ctypes.c_void_p, "a tensor where no pointer is"
        assert value is None or value.device.type == "cpu"
        return None if value is None else value.data_ptr()
    if isinstance(value, dict):
        fields = dict(kind._fields_)
        assert value.keys() == fields.keys(), f"{kind.__name__}: {sorted(value.keys() ^ fields.keys())}"
        return kind(**{name: _fill(fields[name], part) for name, part in value.items()})
    return kind(*value) if isinstance(value, tuple) else value


def run(op, *, seed=0, resident_blocks=1, drop=None, **fields):
    """Runs the launcher `op` on the host.

    Args:
        seed: chooses the threads that run next; see tests/simt/simt.h.
        resident_blocks: blocks that run interleaved.
        drop: "file:line" of a `sync_threads` that shall do nothing.
        fields: of the params struct; tensors for pointers, tuples for arrays, dictionaries for structs in it.

    Raises:
        KernelError: the kernel misused a barrier or a collective.
    """
    library = _library()
    struct = _struct(re.search(rf"SIMT_BIND\({op}, [\w:]*?(\w+)\)", _sources()[1])[1])
    size = getattr(library, f"simt_sizeof_{op}")
    size.restype = ctypes.c_size_t
    assert size() == ctypes.sizeof(struct), "the header was read wrongly, or the library is not built from it"
    function = getattr(library, f"simt_{op}")
    function.restype = ctypes.c_char_p
    library.simt_configure(seed, resident_blocks, drop and drop.encode())
    error = function(ctypes.byref(_fill(struct, fields)))
    if error is not None:
        raise KernelError(error.decode())


def traffic(call):
    """Returns the memory traffic of the kernels that `call()` runs, by the names of tests/simt/traffic.h."""
    counts = _struct("Traffic")()
    _library().simt_count_traffic()
    try:
        call()
    finally:
        _library().simt_traffic(ctypes.byref(counts))
    return {name: getattr(counts, name) for name, _ in counts._fields_}


def barriers_seen():
    """Returns "file:line" of every `sync_threads` that was reached since the last call."""
    return _library().simt_barriers().decode().split()


def is_noticed(goes_wrong):
    """Returns whether `goes_wrong()` is true or crashes, in another process: it may write anywhere."""
    unnoticed = 42
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        torch.set_num_threads(1)  # a fork has no other threads
        signal.setitimer(signal.ITIMER_VIRTUAL, 5)  # ends endless loops
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        status = 0
        try:
            status = 0 if goes_wrong() else unnoticed
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != unnoticed
