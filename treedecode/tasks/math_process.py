"""Compares expressions in a process of its own, which is ended when a comparison takes too long.

Sympy can compute for hours, and a thread cannot be ended. Signals work in the main thread alone.
"""

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

TIMEOUT = 5.0  # seconds for one comparison
_START_TIMEOUT = 60.0  # seconds to import sympy
_MAX_TIMEOUTS = 2  # of one expression, which is then compared as text

_lock = threading.Lock()
_timeouts: Counter[str] = Counter()
_process: subprocess.Popen[bytes] | None = None
_owner = 0  # the process id that started it: a forked child must not talk to its parent's


def are_equal(a: str, b: str) -> bool:
    """Returns whether two expressions, LaTeX without delimiters, are equal; False if it takes longer than `TIMEOUT`.

    Raises:
        RuntimeError: the process cannot be started.
    """
    with _lock:
        if max(_timeouts[a], _timeouts[b]) >= _MAX_TIMEOUTS:
            return False
        answer = _ask(json.dumps([a, b]).encode() + b"\n")
        if answer is None:
            _timeouts.update((a, b))
        return answer == b"1"


def _ask(request: bytes) -> bytes | None:
    """Sends one line and returns the answer, or None if the process took too long or ended, and is ended now."""
    process = _running()
    assert process.stdin is not None
    answer = None
    with contextlib.suppress(OSError):
        process.stdin.write(request)
        process.stdin.flush()
        answer = _line(process, TIMEOUT)
    if answer is None:
        stop()
    return answer


def _line(process: subprocess.Popen[bytes], timeout: float) -> bytes | None:
    """Reads one line; None after `timeout` seconds, or if the process ends."""
    assert process.stdout is not None
    end = time.monotonic() + timeout
    line = b""
    while not line.endswith(b"\n"):
        if not select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
            return None
        part = os.read(process.stdout.fileno(), 65536)
        if not part:
            return None
        line += part
    return line.strip()


def _running() -> subprocess.Popen[bytes]:
    global _process, _owner
    if _process is not None and _owner != os.getpid():
        _process = None
    if _process is None:
        # By its path, because importing the package would import torch; -P, because this folder is no package's root.
        command = [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py"))]
        _process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        _owner = os.getpid()
        if _line(_process, _START_TIMEOUT) != b"ready":
            stop()
            raise RuntimeError("math-verify: the process that compares expressions did not start")
    return _process


@atexit.register
def stop() -> None:
    """Ends the process; the next comparison starts another."""
    global _process
    process, _process = _process, None
    if process is not None and _owner == os.getpid():
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
