"""The GPU benchmarks on the CPU: every line that can run without a GPU does, on tiny shapes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from support.benchmark_session import contestant, make_session, measure
from support.paths import ROOT

from bench.gpu import attention, decode, forests, logits_cases, pages, report, sanitize, select
from treedecode import ops

SCRIPT = ROOT / "bench" / "gpu" / "run.sh"
PARTS = {"attention": attention, "select": select, "pages": pages, "decode": decode}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The result files of all parts by name, and their `folder`."""
    folder = tmp_path_factory.mktemp("gpu")
    for part in PARTS.values():
        assert part.main(["--smoke", "--out", str(folder), "--commit", "abc"]) == 0
    return {"folder": folder} | {part: json.loads((folder / f"{part}.json").read_text()) for part in PARTS}


@pytest.mark.parametrize("part", PARTS)
def test_rows(results, part):
    """Every row has a checked entry of ours, and a reason for everything left out."""
    result = results[part]
    assert result["environment"]["commit"] == "abc"
    assert not result["not_reached"]
    assert min(result["peaks"]["copy_gbs"], *result["peaks"]["gemm_gflops"].values()) > 0
    for row in result["rows"]:
        assert row["floor_seconds"] > 0
        ours = [entry for entry in row["entries"] if entry["ours"]]
        assert ours
        for entry in ours:
            # a decode step is the difference of two runs, which for so few tokens is mostly noise
            assert entry["warm"]["seconds"] > 0 or part == "decode"
            assert entry.get("repeatable", True)
        for entry in row["entries"]:
            assert ("warm" in entry) != ("skipped" in entry), entry
            assert not entry.get("failed"), entry


def test_peers_run_where_they_can(results):
    ran = {entry["name"] for row in results["attention"]["rows"] for entry in row["entries"] if "warm" in entry}
    assert {"SDPA on copied caches", "FlexAttention on the flattened forest"} <= ran
    skipped = {
        entry["name"]: entry["skipped"] for entry in results["attention"]["rows"][0]["entries"] if "skipped" in entry
    }
    assert skipped["FlashInfer cascade"] == "runs on a GPU only"


def test_report(results, capsys):
    assert report.main(["--out", str(results["folder"])]) == 0
    text = capsys.readouterr().out
    assert text.strip() == (results["folder"] / "results.md").read_text().strip()
    for part in PARTS:
        assert f"## {part}" in text
    assert "commit abc" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {11}
    assert json.loads((results["folder"] / "results.json").read_text()).keys() == PARTS.keys()


@pytest.mark.parametrize("error", [0.6, float("nan")])
def test_a_wrong_result_has_no_time(tmp_path, error):
    session, written = make_session(tmp_path)
    measure(session, {"good": contestant(), "bad": contestant(error)}, {"peer": contestant(error)})
    good, bad, peer = written()["rows"][0]["entries"]
    assert "warm" in good
    assert "wrong result" in bad["skipped"]
    assert "wrong result" in peer["skipped"]
    assert "warm" not in bad
    assert "warm" not in peer
    assert session.failed


def test_a_peer_that_raises_is_listed(tmp_path):
    def broken():
        raise OSError("no such library")

    session, written = make_session(tmp_path)
    measure(session, {"good": contestant()}, {"peer": broken})
    assert written()["rows"][0]["entries"][1]["skipped"] == "OSError: no such library"
    assert not session.failed


def test_a_result_that_changes_is_a_failure(tmp_path):
    session, written = make_session(tmp_path)
    measure(session, {"ours": contestant(call=lambda i: torch.rand(3))})
    assert "differs from run to run" in written()["rows"][0]["entries"][0]["skipped"]
    assert session.failed


def test_cases_that_time_did_not_allow_are_listed(tmp_path):
    session, written = make_session(tmp_path, "--seconds", "-1", "--only", "b")
    assert list(session.cases({"a": 1, "b": 2, "bc": 3})) == []
    assert written()["not_reached"] == ["b", "bc"]


def test_a_run_resumes_where_the_last_one_ended(tmp_path):
    session, written = make_session(tmp_path, "--commit", "abc")
    measure(session, {"ours": contestant()})
    for argv, remaining in (
        (["--resume", "--commit", "abc"], ["other"]),
        (["--resume", "--commit", "abd"], ["case", "other"]),
        (["--commit", "abc"], ["case", "other"]),
    ):
        session, _ = make_session(tmp_path, *argv)
        assert [name for name, _ in session.cases({"case": 1, "other": 2})] == remaining
        measure(session, {"ours": contestant()})
        assert [row["case"] for row in written()["rows"]] == ["case"]


HANGS = """
import sys, time
sys.path.insert(0, "tests")
from support.benchmark_session import contestant, make_session, measure
from pathlib import Path

session, _ = make_session(Path(sys.argv[1]), "--resume", "--commit", "abc", "--patience", "0.5")
for case, _ in session.cases({"case": 1}):
    measure(session, {"good": contestant(), "stuck": contestant(call=lambda i: time.sleep(60))})
"""


def test_a_hanging_contestant_ends_its_process_and_not_the_next(tmp_path):
    outcomes = []
    for _ in range(2):
        command = [sys.executable, "-c", HANGS, str(tmp_path)]
        code = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).returncode
        outcomes.append((code, json.loads((tmp_path / "part.json").read_text())))
    (first, hung), (second, done) = outcomes
    assert (first, hung["hung"], hung["finished"], hung["rows"]) == (3, [["case", "stuck"]], False, [])
    assert (second, done["finished"]) == (0, True)
    good, stuck = done["rows"][0]["entries"]
    assert "warm" in good
    assert (stuck["skipped"], stuck["failed"]) == ("hung", True)


def test_contestants_left_out_on_request(tmp_path):
    session, written = make_session(tmp_path, "--skip", "other,eer")
    measure(session, {"ours": contestant()}, {"peer": contestant()})
    ours, peer = written()["rows"][0]["entries"]
    assert "warm" in ours
    assert peer == {"name": "peer", "ours": False, "skipped": "left out on request"}


def test_sanitizer_calls_every_op(capsys):
    assert sanitize.main(["--smoke"]) == 0
    lines = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert lines.keys() == set(ops.names())
    assert {op for op, backends in lines.items() if backends != "cpu"} == {"decoder_forward", "packed_linear"}


@pytest.mark.parametrize("page_size", [16, 64])
def test_forests_have_the_pages_and_lengths_of_their_names(page_size):
    """Branches share whole pages, page ids are used once, and a level that ends within a page is cut back to it."""
    forest = forests.tree((1, 8, 64), (2041, 251, 35), page_size)
    shared, middle = 2041 // page_size, (2041 + 251) // page_size
    assert forest.path_tokens == 64 * (2041 + 251 + 35)
    rest = 2041 + 251 + 35 - middle * page_size
    assert forest.unique_tokens == page_size * (shared + 8 * (middle - shared)) + 64 * rest
    assert [level.num_queries for level in forest.levels] == [64, 8, 1]
    for other in (forests.unsorted(forest), forests.ragged(page_size), forests.deep_leaf_among_singletons(page_size)):
        table = other.page_table
        for row, pages_, seq_len in zip(table, other.rows, other.seq_lens, strict=True):
            assert len(pages_) == len(set(pages_)) == -(-seq_len // page_size)
            assert row[: len(pages_)].tolist() == pages_
    assert forests.unsorted(forest).unique_tokens == forest.unique_tokens


def test_every_case_can_be_made():
    """Names and forests of the full tables are made without a GPU."""
    cases = attention.all_cases(False)
    assert len(cases) == 2 * (len(attention.TREES) + len(attention.LOSING)) + 4 * len(attention.WITH_OTHER_HEADS)
    assert len(logits_cases.all_cases(False)) > 80
    unique = {name: build().unique_tokens * 4096 / 1e6 for name, (_, build) in list(cases.items())[:3]}
    assert [round(size) for size in unique.values()] == [33, 101, 168]  # MB


def run(*parts, **env):
    return subprocess.run(
        [SCRIPT, *parts], env=os.environ | {"PYTHON": sys.executable} | env, capture_output=True, text=True
    )


def test_the_script_runs_its_parts(results, tmp_path):
    done = run("nonsense")
    assert done.returncode == 2
    assert "bench/gpu/run.sh [part[:seconds] ...]" in done.stderr
    assert run("report:1m").returncode == 2
    done = run("report", OUT=str(results["folder"]))
    assert done.returncode == 0, done.stderr
    assert "# Results on a GPU" in (results["folder"] / "report.log").read_text()
    done = run("report", OUT=str(tmp_path))
    assert done.returncode == 1
    assert "failed: report" in done.stderr
