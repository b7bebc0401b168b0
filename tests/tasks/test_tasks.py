"""Tasks from files and generators: their problems, answers and prompts."""

import itertools
import json
import subprocess
import sys

import pytest

import treedecode as td
from treedecode.tasks import Problem, few_shot, format_prompts, load, prefix
from treedecode.tasks.jsonl import Jsonl

ROWS = [
    {"question": "Ann has 2 cats and 3 dogs. How many pets?", "answer": "2+3 = <<2+3=5>>5 pets.\n#### 5"},
    {"question": "What is half of one?", "answer": "It is $\\boxed{\\frac{1}{2}}$.", "id": "half", "group": "easy"},
    {"question": "What is 10 * 100?", "answer": 1000},
]


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "three.jsonl", ROWS)


def test_rows_become_problems(file):
    problems = load(file).problems(3)
    assert [p.id for p in problems] == ["three-1", "half", "three-3"]
    assert [p.answer for p in problems] == ["5", r"\frac{1}{2}", "1000"]
    assert [p.group for p in problems] == [None, "easy", None]
    assert problems[0].prompt == "Question: Ann has 2 cats and 3 dogs. How many pets?\nAnswer:"


def test_a_sample_is_that_of_its_seed(tmp_path):
    task = load(write(tmp_path / "many.jsonl", [{"question": f"q{i}", "answer": i} for i in range(40)]))
    assert all(problem.task is task for problem in task.problems(40))
    drawn = [[int(p.answer) for p in task.problems(10, seed=seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(sorted(set(some)) == some for some in drawn), "each once, in the file's order"
    assert [p.answer for p in task.problems(40, seed=7)] == [str(i) for i in range(40)]
    with pytest.raises(ValueError, match=r"num_problems: .*many.jsonl has 40, got 41"):
        task.problems(41)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", "expected an object .*, got list"),
        ({"question": "q", "answer": " "}, "answer: expected a text, got ' '"),
        ({"question": " ", "answer": "1"}, "question: expected a text, got ' '"),
        ({"question": "q", "answer": True}, "answer: expected a text, got True"),
        ({"question": "q", "answer": "two\nlines"}, r"answer: expected the result after #### or in \\boxed\{\}"),
        ({"question": "q", "answer": "1", "id": "half"}, "id: 'half' is that of line 2"),
        ({"question": "q", "answer": "####"}, "answer: expected the result after ####"),
        ({"question": "q", "answer": float("inf")}, "answer: expected a text, got inf"),
        ({"question": "q", "answer": float("nan")}, "answer: expected a text, got nan"),
        ({"question": "q\ud800", "answer": "1"}, "question: is no Unicode text: surrogates not allowed at 1"),
        ({"question": "q", "answer": "1", "id": "\ud800"}, "id: is no Unicode text"),
    ],
)
def test_errors_name_file_and_line(tmp_path, row, message):
    path = write(tmp_path / "bad.jsonl", [*ROWS[:2], "", row])
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 4: {message}"):
        load(path)


def test_bytes_that_are_no_text_are_an_error_of_their_line(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"question": "q", "answer": "1"}\n{"question": "\xe9t\xe9", "answer": "1"}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl, line 2: .*utf-8"):
        load(path)


def test_empty_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match="expected problems, one a line, got an empty file"):
        load(write(tmp_path / "empty.jsonl", [""]))
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "missing.jsonl")


def test_splits_are_files(tmp_path, file):
    other = write(tmp_path / "other.jsonl", ROWS[:1])
    task = Jsonl(file, train=other)
    assert [p.id for p in task.problems(1, split="train")] == ["other-1"]
    with pytest.raises(ValueError, match=r"is 'test' and 'train' alone; .*, validation=FILE\) adds 'validation'"):
        task.problems(1, split="validation")
    with pytest.raises(ValueError, match="split: expected 'train', 'validation' or 'test', got 'dev'"):
        task.problems(1, split="dev")
    with pytest.raises(ValueError, match="max_new_tokens: expected an int >= 1, got 0"):
        Jsonl(file, max_new_tokens=0)


def test_solutions_are_graded_by_their_answers(file):
    task = load(file)
    pets, half, _ = task.problems(3)
    assert task.verify(pets, " 2 + 3 = 5, so\n#### $5.00")
    assert task.verify(pets, "She has 5 pets.\n\nQuestion: And 7?\nAnswer: 7\n#### 7")
    assert not task.verify(pets, "#### 6")
    assert not task.verify(pets, "I do not know")
    assert task.verify(half, r"so $\boxed{\frac{1}{2}}$")
    assert task.extract("no answer yet") is None
    assert task.equivalent("1,000", "1000.0")


@pytest.mark.parametrize(
    ("text", "final"),
    [
        (" 2+3 = 5\n", False),
        (" 2+3 = 5\n#### 5", False),
        (" 2+3 = 5\n#### 5\n", True),
        ("#### Step 1: add the pets\n", False),
        (r"It is $\boxed{5}$", False),
        ("It is $\\boxed{5}$.\n", True),
        ("It is $\\boxed{\n", False),
        ("5 pets\n\nQuestion: And", True),
    ],
)
def test_a_solution_is_final_with_its_marked_line(file, text, final):
    assert load(file).is_final(text) == final


def test_worked_examples(tmp_path, file):
    examples = few_shot(file, 2)
    assert prefix(examples) == (
        "Question: Ann has 2 cats and 3 dogs. How many pets?\nAnswer: 2+3 = <<2+3=5>>5 pets.\n#### 5\n\n"
        "Question: What is half of one?\nAnswer: It is $\\boxed{\\frac{1}{2}}$.\n\n"
    )
    assert few_shot(file, 3)[2][1] == " #### 1000", "a bare answer is shown as the format wants it"
    assert few_shot(Jsonl(file, train=file), 2) == examples
    assert few_shot(file, 0) == []
    assert prefix([]) == ""
    with pytest.raises(ValueError, match=r"count: .*three.jsonl has 3 problems, got 4"):
        few_shot(file, 4)
    with pytest.raises(ValueError, match="is 'test' alone"):
        few_shot(load(file), 1)
    with pytest.raises(ValueError, match="shots: expected a number >= 0, got -1"):
        few_shot(file, -1)
    with pytest.raises(TypeError, match="shots: expected an int, got True"):
        few_shot(file, True)


def test_worked_examples_are_computed_once(make_decoder):
    dec = make_decoder(num_pages=400)
    problems = [Problem(str(i), f"the {i}") for i in range(8)]
    prompts = format_prompts(problems, [("a cat", " is 1\n"), ("a dog", " is 2\n")])
    assert prompts[3] == "a cat is 1\n\na dog is 2\n\nthe 3"
    dec.generate(prompts[:1], max_new_tokens=1)
    before = dec.stats.num_prefill_tokens + dec.stats.num_decode_tokens
    greedy = td.Sampling(temperature=0)
    dec.generate(prompts[1:], max_new_tokens=1, sampling=greedy)
    computed = dec.stats.num_prefill_tokens + dec.stats.num_decode_tokens - before
    per_problem = len(dec.encode("the 3")) + 4  # a page of the prefix may be shared with the problem's own tokens
    assert computed <= 7 * per_problem < 7 * len(dec.encode(prompts[0]))


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_tokenizer(template):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "<user>", "<assistant>", "<end>", "one", "two", "three", "1", "2", "[UNK]"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="[UNK]")
    tokenizer.add_special_tokens({"additional_special_tokens": words[1:4]})
    tokenizer.chat_template = template
    return tokenizer


def test_chat_puts_examples_into_earlier_turns():
    tokenizer = chat_tokenizer(TEMPLATE)
    (ids,) = format_prompts(
        [Problem("p", "three\n")], [("one\n", " 1\n"), ("two\n", " 2\n")], tokenizer=tokenizer, chat=True
    )
    assert " ".join(tokenizer.convert_ids_to_tokens(ids)) == (
        "<s> <user> one <end> <assistant> 1 <end> <user> two <end> <assistant> 2 <end> <user> three <end> <assistant>"
    )
    with pytest.raises(ValueError, match=r"chat: expected a tokenizer with a chat template, got \w+ without one"):
        format_prompts([Problem("p", "three")], tokenizer=chat_tokenizer(None), chat=True)
    with pytest.raises(ValueError, match="chat: expected a tokenizer with a chat template, got NoneType"):
        format_prompts([Problem("p", "three")], chat=True)


@pytest.mark.parametrize("name", ["sudoku", "reasoning_gym:", "reasoning_gym", "problems.json"])
def test_unknown_tasks_are_told_what_exists(name):
    with pytest.raises(ValueError, match=r"expected 'countdown', 'reasoning_gym:<dataset>' .* path of a .jsonl file"):
        load(name)


@pytest.fixture
def reasoning_gym():
    return pytest.importorskip("reasoning_gym")


def test_problems_are_scored_by_their_dataset(reasoning_gym):
    task = load("reasoning_gym:leg_counting", max_animals=4)
    assert task.name == "reasoning_gym:leg_counting"
    problems = task.problems(5)
    assert all(problem.task is task for problem in problems)
    assert problems == task.problems(5) == task.problems(9)[:5]
    for problem in problems:
        assert int(problem.answer) == problem.data["metadata"]["total_legs"]
        assert len(problem.data["metadata"]["animals"]) <= 4
        solution = f"Two legs each.\n<answer>\n{problem.answer}</answer>\n"
        assert task.verify(problem, solution)
        assert task.is_final(solution)
        assert not task.verify(problem, "<answer>1</answer>")
        assert task.score(problem, problem.answer) == 0, "an answer has its tags"


def test_splits_and_seeds_share_no_generator_seed(reasoning_gym):
    """A dataset seeds problem i with seed + i; the largest sets of neighbouring seeds and splits must not meet."""
    task = load("reasoning_gym:leg_counting")
    ranges = []
    task._problem = lambda *_: None
    task._create = lambda seed, size: (
        ranges.append(range(seed, seed + size)) or [{"question": "q", "answer": ""}] * size
    )
    for split in ("train", "validation", "test"):
        for seed in (0, 1, 2**14 - 1):
            task.problems(2**16, split=split, seed=seed)
    ranges.sort(key=lambda r: r.start)
    assert all(a.stop <= b.start for a, b in itertools.pairwise(ranges))
    assert ranges[-1].stop <= 2**32, "what NumPy takes"


def test_partial_credit_is_a_score_but_not_right(reasoning_gym):
    task = load("reasoning_gym:word_sorting")
    (problem,) = task.problems(1)
    words = problem.data["metadata"]["sorted_words"]
    almost = f"<answer>{', '.join(words[::-1])}</answer>"
    assert 0 < task.score(problem, almost) < 1
    assert not task.verify(problem, almost)


def test_answers(reasoning_gym):
    task = load("reasoning_gym:leg_counting")
    assert task.extract("<answer>1</answer> no, <answer> 2\n</answer>") == "2"
    assert task.extract("<answer>1") is None
    assert task.extract("<answer></answer>") is None
    assert task.equivalent("1 0\n0  1", "1 0 0 1")
    assert task.equivalent("1,000", "1000.0")
    assert not task.equivalent("1/2", "0.5"), "moves and grids are no mathematics"


def test_examples_are_no_test_problems(reasoning_gym):
    task = load("reasoning_gym:leg_counting")
    (prompt, solution), _ = few_shot(task, 2)
    assert prompt not in [problem.prompt for problem in task.problems(200)]
    assert task.is_final(solution)
    with pytest.raises(ValueError, match="graph_color has no answers to show, so expected 0, got 1"):
        few_shot(load("reasoning_gym:graph_color"), 1)


def test_errors(reasoning_gym):
    with pytest.raises(ValueError, match=r"dataset: expected one of .*leg_counting.*; got 'legs'"):
        load("reasoning_gym:legs")
    for config in ({"wings": 1}, {"min_animals": 0}):
        with pytest.raises(ValueError, match=f"config: leg_counting refuses .*{next(iter(config))}"):
            load("reasoning_gym:leg_counting", **config).problems(1)
    with pytest.raises(ValueError, match="config: size follow"):
        load("reasoning_gym:leg_counting", size=3)
    with pytest.raises(ValueError, match="seed: expected 0 to 16383, got 16384"):
        load("reasoning_gym:leg_counting").problems(1, seed=2**14)
    with pytest.raises(ValueError, match="split: expected one of train, validation, test, got 'dev'"):
        load("reasoning_gym:leg_counting").problems(1, split="dev")


def test_importing_tasks_and_scorers_costs_nothing():
    code = (
        "import sys, treedecode, treedecode.tasks, treedecode.verify\n"
        "print(*sorted({'torch', 'transformers', 'math_verify', 'sympy', 'reasoning_gym'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_reasoning_gym_missing_is_said(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "reasoning_gym"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'treedecode\[tasks\]'"):
        load("reasoning_gym:leg_counting")
