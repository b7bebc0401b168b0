"""The README: it is short, its blocks run alone as they stand, and its figures are those of the recorded runs."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
from support.paths import ROOT
from support.tiny_model import save_tiny_model

TEXT = (ROOT / "README.md").read_text()
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
RESULTS = ROOT / "bench" / "results"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def run(command, folder):
    """Runs a command in a folder, offline, as a user with the package installed would."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_short():
    lines = TEXT.splitlines()
    assert len(lines) <= 130
    assert max(map(len, lines)) <= 100


def test_the_first_result_takes_six_lines():
    assert len(blocks("python")[0].splitlines()) <= 6


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_runs_alone(number, tmp_path):
    block = blocks("python")[number]
    if HUB_NAME in block:  # the only thing that a machine without the hub lacks
        block = block.replace(f'"{HUB_NAME}"', repr(str(save_tiny_model(tmp_path / "model"))))
    printed = run([sys.executable, "-W", "error::SyntaxWarning", "-c", block], tmp_path)
    assert printed.strip()
    if "countdown" in block:
        last_line = printed.strip().splitlines()[-1]
        assert re.fullmatch(r"\d+ [-+*/] \d+ = \d+, left \d+", last_line)


def test_names_of_the_hub_are_one():
    assert set(re.findall(r'"([\w-]+/[\w.-]+)"', "".join(blocks("python")))) == {HUB_NAME}


def test_shell_commands_run(tmp_path):
    (block,) = blocks("sh")
    for line in block.replace("\\\n", " ").splitlines():
        name, *arguments = shlex.split(line, comments=True)
        assert name == "treedecode"
        printed = run([sys.executable, "-m", "treedecode.cli", *arguments], tmp_path)
        assert "accuracy" in printed
    assert len(list(tmp_path.glob("runs/tot/trees/*.html"))) == 1
    assert (tmp_path / "runs/tot/ledger.json").exists()


def test_targets_of_make_and_extras_of_pip_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", TEXT, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (named,) = re.findall(r'pip install "\.\[(\w+)\]"', TEXT)
    assert named in extras


def recorded(file, name):
    """Median seconds of a recorded benchmark, and of its peers."""
    rows = json.loads((RESULTS / file).read_text())["benchmarks"]
    (info,) = (row["extra_info"] for row in rows if row["name"] == name)
    return info["median_seconds"], {peer: value["median_seconds"] for peer, value in info["peers"].items()}


@pytest.mark.parametrize(
    ("case", "file", "name", "peer"),
    [
        ("1 branch", "end_to_end.json", "bench_generate[1]", "transformers.generate"),
        ("16 branches", "end_to_end.json", "bench_generate[16]", "transformers.generate"),
        ("64 branches", "end_to_end.json", "bench_generate[64]", "transformers.generate"),
        ("64 x (2048 shared + 64)", "tree_attention.json", "bench_tree_attention[bf16-64x(2048+64)]", "two SDPA calls"),
        ("64 x 151936, best 16", "select.json", "bench_beam_prune[64x151936-normal-16-bf16]", "log_softmax + topk"),
        (
            "64 x 151936, top-p 0.95",
            "select.json",
            "bench_sample[64x151936-normal-temperature1.0-top_p0.95-bf16]",
            "transformers",
        ),
        ("1 branch becomes 64", "pages.json", "bench_fork_and_first_append", "index_select (dense cache)"),
    ],
)
def test_figures_are_those_of_the_recorded_runs(case, file, name, peer):
    (row,) = re.findall(rf"^\|[^|]*\| {re.escape(case)} \| (\S+) (m?s) \|[^|]*\| (\S+)x \|$", TEXT, re.MULTILINE)
    seconds, peers = recorded(file, name)
    shown, unit, ratio = row

    def rounded(value, text):
        return f"{value:.{len(text.partition('.')[2])}f}"

    assert rounded(seconds * (1000 if unit == "ms" else 1), shown) == shown
    assert rounded(peers[peer] / seconds, ratio) == ratio


def test_every_figure_has_its_benchmark():
    files = re.findall(r"^\| `(bench_\w+\.py)` \|", TEXT, re.MULTILINE)
    assert len(files) == 5
    assert all((ROOT / "bench" / file).exists() for file in files)
