"""The countdown model in the package: its tokenizer, how much it solves, and what its value head knows."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import treedecode as td
from examples.countdown.rollouts import grades, hidden_states, roll_out, sample
from examples.countdown.tokenizer import build_tokenizer
from treedecode.allocation.calibration import auc
from treedecode.models import load_pretrained
from treedecode.models.value_head import ValueHead
from treedecode.tasks.countdown import Countdown, model_path, prompt_of

TASK = Countdown()
PROBLEMS = TASK.problems(60, split="test", seed=1)


@pytest.fixture(scope="module")
def model():
    return load_pretrained(model_path())


@pytest.fixture(scope="module")
def dec(model):
    with td.Decoder.from_pretrained(model_path(), kv_memory="64MiB") as decoder:
        yield decoder


@pytest.fixture(scope="module")
def outs(dec):
    return sample(dec, PROBLEMS, branches=4, seed=0)


# -- tokenizer --

NUMBERS = st.integers(1, 999)
LINES = st.tuples(NUMBERS, st.sampled_from("+-*/"), NUMBERS, NUMBERS, st.lists(NUMBERS, min_size=1, max_size=5)).map(
    lambda parts: "{} {} {} = {}, left {}\n".format(*parts[:4], " ".join(map(str, parts[4])))
)
TEXTS = st.one_of(
    st.lists(LINES, max_size=4).map("".join),
    st.tuples(st.lists(NUMBERS, min_size=2, max_size=6), NUMBERS, st.lists(LINES, max_size=4)).map(
        lambda parts: prompt_of(*parts[:2]) + "".join(parts[2])
    ),
)


@given(TEXTS)
def test_every_text_of_the_format_comes_back(model, text):
    tokenizer = model[1]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.decode([i]) for i in ids) == text
    assert tokenizer.encode(text) == [tokenizer.bos_token_id, *ids]
    assert tokenizer.decode([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


@given(TEXTS, st.data())
def test_steps_are_encoded_as_their_text_is(model, text, data):
    """A search appends line by line: cutting after a newline must not change the tokens."""
    tokenizer = model[1]
    lines = text.splitlines(keepends=True)
    cut = data.draw(st.integers(0, len(lines)))
    parts = ["".join(lines[:cut]), "".join(lines[cut:])]
    joined = [i for part in parts for i in tokenizer.encode(part, add_special_tokens=False)]
    assert joined == tokenizer.encode(text, add_special_tokens=False)


def test_the_shipped_tokenizer_is_the_one_that_is_built(model):
    assert model[1].get_vocab() == build_tokenizer().get_vocab()
    assert model[0].config.vocab_size == len(model[1])
    assert model[1].convert_ids_to_tokens(model[1].encode("Use 25 ~", add_special_tokens=False))[-1] == "<unk>"


# -- model --


def test_the_model_is_small():
    files = {path.name: path.stat().st_size for path in model_path().iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "value_head.safetensors", "README.md"} <= set(files)
    assert sum(files.values()) <= 25 * 2**20


def test_it_solves_problems_of_every_count(outs):
    right = grades(PROBLEMS, outs)
    assert right.mean() > 0.15
    groups = np.array([problem.group for problem in PROBLEMS])
    solved = right.any(axis=1)
    assert solved[groups == "3 numbers"].mean() > solved[groups == "5 numbers"].mean() > 0


def test_it_writes_the_format(outs):
    texts = [out.text for completions in outs for out in completions]
    assert np.mean([TASK.extract(text) is not None for text in texts]) > 0.85
    assert np.mean([out.finish_reason == "stop" for completions in outs for out in completions]) > 0.95


def test_where_it_fails_it_is_mostly_not_by_wrong_arithmetic(outs):
    """Most failures come to another number than the target; few claim the target by a false line."""
    reached, other = 0, 0
    for problem, completions in zip(PROBLEMS, outs, strict=True):
        for out in completions:
            if not TASK.verify(problem, out.text) and TASK.extract(out.text) is not None:
                last = int(out.text.split()[-1])
                reached += last == problem.data["target"]
                other += last != problem.data["target"]
    assert other > 2 * reached


def test_a_step_is_one_line(dec):
    async def steps():
        with await dec.roots([problem.prompt for problem in PROBLEMS[:6]]) as frontier:
            await frontier.extend(stop=TASK.stop, max_new_tokens=TASK.max_step_tokens)
            return frontier.texts()

    for text in dec.run(steps()):
        assert text.endswith("\n")
        assert text.count("\n") == 1


# -- value head --


def test_the_value_head_tells_good_states_from_bad(dec, model, outs):
    head = ValueHead.load(model_path() / "value_head.safetensors")
    rollouts = roll_out(dec, PROBLEMS, outs)
    success = rollouts.state_labels().numpy()
    assert len(success) > 4 * len(PROBLEMS) * 3
    with torch.no_grad():
        values = head(hidden_states(model[0], rollouts)).numpy()
    lines = (rollouts.ends.cumsum(dim=1)[rollouts.ends] - 1).numpy()
    assert auc(values, success) > 0.75
    for written in (1, 2, 3):
        assert auc(values[lines == written], success[lines == written]) > 0.65
    assert abs(values.mean() - success.mean()) < 0.15
