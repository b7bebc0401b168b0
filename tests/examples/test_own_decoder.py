"""The example of a decoder of your own: every branch gets the logits of a plain forward over its tokens."""

import copy
import subprocess
import sys

import pytest
import torch
from support.paths import ROOT
from support.transformers_models import make_model
from transformers import AutoModelForCausalLM

from examples import own_decoder
from treedecode.cache.page_pool import PagePool
from treedecode.tasks.countdown import model_path

PAGE_SIZE = 4
LEVELS = ((3, 5), (2, 6))  # forks at 7 and 12 tokens: the first one within a page


def countdown_model():
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32, attn_implementation="eager")


def plain(model, tokens):
    with torch.inference_mode():
        return model(input_ids=tokens[None], use_cache=False).logits[0]


def page_pool(model, max_branches=9):
    config = model.config
    return PagePool(
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        num_pages=64,
        page_size=PAGE_SIZE,
        max_branches=max_branches,
        max_pages_per_branch=8,
        dtype=model.dtype,
    )


@pytest.fixture(params=["llama", "qwen3", "countdown"])
def model(request, one_thread):
    return countdown_model() if request.param == "countdown" else make_model(request.param)


@pytest.fixture
def decoded(model, monkeypatch):
    """Decodes a tree; returns its branches, the logits of every forward by the tokens they follow, and the pool."""
    paged = copy.deepcopy(model)
    paged.set_attn_implementation("paged")
    pool, by_row, seen = page_pool(model), {}, {}
    forward, fork = own_decoder.forward, pool.fork

    def forward_and_record(model, pool, rows, tokens):
        logits = forward(model, pool, rows, tokens)
        pool.check_integrity()
        for row, new, row_logits in zip(rows.tolist(), tokens, logits, strict=True):
            by_row[row] = by_row.get(row, ()) + tuple(new.tolist())
            seen[by_row[row]] = row_logits
        return logits

    def fork_and_record(src, dst):
        fork(src, dst)
        by_row.update({int(to): by_row[int(of)] for of, to in zip(src, dst, strict=True)})

    monkeypatch.setattr(own_decoder, "forward", forward_and_record)
    monkeypatch.setattr(pool, "fork", fork_and_record)
    branches = own_decoder.decode_tree(paged, pool, torch.arange(3, 10), LEVELS)
    return branches, seen, pool


def test_logits_are_those_of_transformers(model, decoded):
    branches, seen, _ = decoded
    exact = copy.deepcopy(model).double()
    assert [len(branch) for branch in branches] == [7 + 5 + 6] * 6
    checked = set()
    for branch in branches:
        truth, theirs = plain(exact, branch), plain(model, branch)
        # what plain fp32 arithmetic loses, for sums in another order
        budget = 4 * (theirs.double() - truth).abs().max() + 1e-6 * truth.abs().max()
        for end in range(7, len(branch) + 1):
            tokens = tuple(branch[:end].tolist())
            assert (seen[tokens] - theirs[end - 1]).abs().max() <= budget
            checked.add(tokens)
    assert checked == set(seen)


def test_branches_share_pages(decoded):
    branches, _, pool = decoded
    tables = [pool.pages(row).tolist() for row in pool.seq_lens.nonzero().flatten().tolist()]
    assert len(tables) == len(branches)
    assert len({table[0] for table in tables}) == 1  # the prompt's full page
    assert len({tuple(table[:3]) for table in tables}) == 3  # 12 tokens, of the branches of the first level
    assert len({page for table in tables for page in table}) == 1 + 3 * 2 + 6 * 2


def test_the_random_numbers_are_those_of_sample(model, decoded):
    branches, seen, _ = decoded
    logits = torch.stack([seen[tuple(branch[:-1].tolist())] for branch in branches])
    tokens, _, _ = own_decoder.ops.sample(logits, temperature=1.0, seed=torch.arange(6), position=17)
    assert tokens.tolist() == [branch[-1] for branch in branches]


def test_it_runs_and_prints_its_branches():
    done = subprocess.run([sys.executable, "-m", "examples.own_decoder"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 16
    assert any(line.endswith("left 19") for line in lines)


def test_it_fits_a_page():
    assert len((ROOT / "examples" / "own_decoder.py").read_text().splitlines()) <= 60
