"""Orders and guards test runs on a GPU that may end at any time: `pytest -p bench.gpu.pytest_plugin`.

Triton's kernels, which take minutes to compile, come last. Each failure is written at once to the file that `FAILURES`
names. A process whose device reports errors after a test exits, because its later tests would all fail, and so fast
that it would take most of the remaining ones. With pytest-xdist another process takes its place.
"""

import os
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "triton" in item.name)  # stable, and so the same in every process


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = os.environ.get("FAILURES")
    if report.failed and path and "PYTEST_XDIST_WORKER" not in os.environ:
        with Path(path).open("a") as file:
            file.write(f"== {report.nodeid}, {report.when}\n{report.longreprtext}\n\n")


def pytest_runtest_logfinish(nodeid: str) -> None:
    if not device_is_lost():
        return
    if "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)  # its reports are on their way already
    pytest.exit(f"the device reports errors since {nodeid}", returncode=3)


def device_is_lost() -> bool:
    """Returns whether the device reports an error, which every later call would report again."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
