"""Runs every CUDA kernel on the host under AddressSanitizer and UndefinedBehaviorSanitizer, on most of its paths.

`make sanitize` runs all tests of the ops in this way, those of the CPU kernels too.
"""

import os
import subprocess
import sys

import pytest
from support import simt_kernels
from support.paths import ROOT

TESTS = {
    "append_kv": ("matches_reference", "a_token_wider_than_a_block"),
    "beam_prune": ("any_vocab_and_alignment", "masks", "log_probabilities_are_used_as_they_are", "ties"),
    "beam_update": ("wide_beam", "a_refused_group_does_not_disturb_its_neighbours"),
    "pages": ("more_rows_than_threads", "default_lengths_and_empty_calls", "copy_pages"),
    "plan_tree": ("long_tables", "reads_nothing_beyond_seq_len", "counts_that_do_not_fit_are_marked"),
    "sample": ("any_vocab_and_alignment", "masks", "large_vocabularies", "a_row_without_a_token_is_marked"),
    "tree_attention": (
        *(f"tiles_of_all_heights[{shape}]" for shape in ("16-128", "17-96", "33-64", "65-128", "65-256")),
        "prefill_beside_decode[dtype1]", "rows_that_are_not_aligned", "without_keys",
        "equal_rows_and_rows_that_end_in_a_shared_page", "a_page_id_out_of_range_is_marked",
    ),
}  # fmt: skip

pytestmark = pytest.mark.skipif(not simt_kernels.SANITIZED.exists(), reason="this compiler has no sanitizers")


def run(*command):
    """Runs Python with the sanitizers loaded, and libstdc++, which they need at their start for C++ exceptions."""
    paths = [
        subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    env = {
        "LD_PRELOAD": " ".join(paths), "ASAN_OPTIONS": "detect_leaks=0", "SIMT_SANITIZED": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }  # fmt: skip
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=os.environ | env, capture_output=True, text=True)


@pytest.mark.slow
def test_every_kernel():
    tests = [f"tests/ops/cuda/test_cuda_{op}.py::test_{name}" for op, names in TESTS.items() for name in names]
    # Without capture by file descriptors, which would lose a sanitizer's report with the process.
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "--capture=sys", "-x", "--tb=short"]
    done = run("-m", "pytest", *options, "tests/ops/cuda/test_simt.py", *tests)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]


def test_a_write_beyond_the_end_is_found():
    code = """
import torch
from support import simt_kernels
values = torch.zeros(96, dtype=torch.int32)
simt_kernels.run("toy_reverse", num_threads=96, num_blocks=1, **{"in": values}, out=torch.zeros(%d, dtype=torch.int32))
print("went through")
"""
    good, bad = (run("-c", code % size) for size in (96, 90))
    assert (good.returncode, good.stdout) == (0, "went through\n"), good.stderr
    assert "AddressSanitizer: heap-buffer-overflow" in bad.stderr
    assert "self_test.cu" in bad.stderr
