"""EnergyCounter: reads the machine's energy counters, NVML on NVIDIA GPUs and RAPL on CPUs that allow it."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

_RAPL = Path("/sys/class/powercap")


class EnergyCounter:
    """Counts the joules that a device takes from the moment this is made.

    Args:
        device: a torch device; "cpu" counts all packages of the machine.

    Attributes:
        source: "nvml", "rapl", or the reason why energy is not measured.
    """

    def __init__(self, device: Any = "cpu") -> None:
        self._read, self.source = _open_counter(str(device))
        self._begin = self._read() if self._read is not None else 0.0

    @property
    def is_available(self) -> bool:
        """True where energy is measured."""
        return self._read is not None

    def joules(self) -> float:
        """Returns the energy since the counter was made.

        Raises:
            RuntimeError: energy is not measured here.
        """
        if self._read is None:
            raise RuntimeError(f"energy is not measured: {self.source}")
        return self._read() - self._begin


def _open_counter(device: str) -> tuple[Callable[[], float] | None, str]:
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
