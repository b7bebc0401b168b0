"""Measures the machine's peaks, describes the machine in result files, and prints a table at the end of a session."""

import functools
import platform
from dataclasses import asdict

import numpy
import pytest
import torch

from bench import harness, report


@pytest.fixture
def compare(benchmark):
    """Binds `harness.compare` to this benchmark."""
    return functools.partial(harness.compare, benchmark)


@pytest.fixture(scope="session")
def peaks():
    """The machine's peaks, measured in this run."""
    return harness.measure_peaks()


def pytest_benchmark_generate_machine_info():
    """Describes the machine for readers of a result, without a name of it or its owner."""
    # Imported here: importing treedecode loads the native library, and pytest imports this file even to collect.
    from treedecode.common import machine

    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "num_threads": torch.get_num_threads(),
        **machine.cpu(),
    }


def pytest_benchmark_update_commit_info(commit_info):
    for name in set(commit_info) - {"id", "time", "dirty"}:
        del commit_info[name]


def pytest_benchmark_update_json(output_json):
    output_json["peaks"] = asdict(harness.measure_peaks())
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    rows = [{"name": b.name, "extra_info": b.extra_info} for b in session.benchmarks] if session else []
    if any(row["extra_info"] for row in rows):
        terminalreporter.write("\n" + report.table(rows, asdict(harness.measure_peaks())) + "\n")
