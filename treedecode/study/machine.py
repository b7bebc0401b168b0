"""Describes the machine that the times of a study are from, and the load of other processes on it."""

import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from treedecode.common.machine import attempt, cpu, gpus, memory

_IDLE = (3, 4)  # of the columns of /proc/stat: idle, and idle while waiting for a disk
_GUEST = 8  # from here on: time of virtual machines, which is in the others already


def machine(decoder: Any) -> dict[str, Any]:
    """Describes the hardware, and the part of it that torch uses."""
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": cpu()["cpu"],
        "memory": attempt(memory),
        "gpu": gpus(),
        "device": str(decoder.pool.device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


class BackgroundLoad:
    """Measures the cores that other processes, and the machine's other guests, use from its creation on.

    Args:
        stat: the file in which Linux counts the time of its cores.
    """

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._begin = time.perf_counter()
        self._before = self._seconds()

    @property
    def mean_cores(self) -> float | None:
        """Cores used in the mean; None where the system does not tell."""
        now = self._seconds()
        if now is None or self._before is None:
            return None
        return max(0.0, now - self._before) / (time.perf_counter() - self._begin)

    def _seconds(self) -> float | None:
        try:
            line = self._stat.read_text(encoding="ascii").split("\n", 1)[0]
        except OSError:
            return None
        ticks = [int(value) for value in line.split()[1:]][:_GUEST]
        busy = sum(value for i, value in enumerate(ticks) if i not in _IDLE) / os.sysconf("SC_CLK_TCK")
        return busy - sum(os.times()[:4])  # this process's own, and its children's
