"""Energy counters of the machine: NVML on NVIDIA GPUs, RAPL on CPUs that let it be read."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

_RAPL = Path("/sys/class/powercap")


class Counter:
    """Joules since it was made.

    Attributes:
        source: what is counted: "nvml", "rapl", or why nothing is.
    """

    def __init__(self, device: Any = "cpu") -> None:
        """Args:
        device: a torch device, whose energy counts; on the CPU that of all packages.
        """
        self._read, self.source = _reader(str(device))
        self._begin = self._read() if self._read is not None else 0.0

    @property
    def is_available(self) -> bool:
        """Whether energy is measured here."""
        return self._read is not None

    def joules(self) -> float:
        """Raises RuntimeError where energy is not measured."""
        if self._read is None:
            raise RuntimeError(f"energy is not measured: {self.source}")
        return self._read() - self._begin


def _reader(device: str) -> tuple[Callable[[], float] | None, str]:
    if device.startswith("cuda"):
        try:
            nvml: Any = importlib.import_module("pynvml")
            nvml.nvmlInit()
            handle = nvml.nvmlDeviceGetHandleByIndex(int(device.partition(":")[2] or 0))
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except Exception as error:  # no such package, no driver, a GPU too old for the counter
            return None, f"not measured (NVML: {error})"
        return lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, "nvml"
    packages = [zone for zone in sorted(_RAPL.glob("intel-rapl:*")) if zone.name.count(":") == 1]
    if not packages:
        return None, "not measured (no RAPL counters)"
    try:
        zones = [_Zone(zone) for zone in packages]
    except OSError as error:
        return None, f"not measured (RAPL: {error.strerror})"
    return lambda: sum(zone.joules() for zone in zones), "rapl"


class _Zone:
    """A RAPL counter, which wraps around at `max_energy_range_uj`."""

    def __init__(self, path: Path) -> None:
        self._path = path / "energy_uj"
        self._range = int((path / "max_energy_range_uj").read_text())
        self._last, self._wrapped = int(self._path.read_text()), 0

    def joules(self) -> float:
        now = int(self._path.read_text())
        if now < self._last:
            self._wrapped += self._range
        self._last = now
        return (now + self._wrapped) / 1e6
