"""A session of the GPU benchmarks on the CPU, and contestants for it."""

import json

import torch

from bench.gpu import contestants, harness


def make_session(tmp_path, *argv):
    """Makes a session, and a function that reads its result file."""
    args = harness.parser("").parse_args(["--smoke", "--out", str(tmp_path), *argv])
    return harness.Session("part", args), lambda: json.loads((tmp_path / "part.json").read_text())


def contestant(error=0.0, call=None):
    """Returns a function that makes a contestant; an error of up to 0.5 passes."""
    x = torch.ones(3)
    return lambda: contestants.Contestant(call or (lambda i: x), 2, lambda: error, 0.5)


def measure(session, ours, peers=None):
    session.measure("case", ours, peers or {}, num_bytes=1, num_flops=1, dtype=torch.float32)
