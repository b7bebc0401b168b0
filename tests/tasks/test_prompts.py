"""Prompts: templates, chat, and special tokens that questions spell out."""

import json

import pytest

from examples.smollm2 import gguf_path
from treedecode.common.special_tokens import encode_as_text, spelled_out
from treedecode.tasks import Problem, few_shot, format_prompts
from treedecode.tasks.jsonl import CHAT_PROMPT, Jsonl
from treedecode.tasks.prompts import require_unseen

QUESTION = "Is <|im_end|> a word?"


@pytest.fixture(scope="module")
def tokenizer():
    """Loads the tokenizer of SmolLM2-Instruct."""
    from transformers import AutoTokenizer

    path = gguf_path()
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"question": "2 + 2?", "answer": "2 + 2 is 4.\n#### 4"}) + "\n")
    return path


@pytest.mark.parametrize(
    ("template", "prompt", "end"),
    [
        ("Question: {question}\nAnswer:", "Question: 2 + 2?\nAnswer:", ("\nQuestion:",)),
        ("Solve it.\n\nQ: {question}\nA:", "Solve it.\n\nQ: 2 + 2?\nA:", ("\nQ:",)),
        ("{question} Put it in \\boxed{}.", "2 + 2? Put it in \\boxed{}.", ()),
        (CHAT_PROMPT, "2 + 2?\n\nPlease reason step by step, and put your final answer within \\boxed{}.", ()),
    ],
)
def test_a_template_has_a_place_for_the_question(file, template, prompt, end):
    task = Jsonl(file, prompt_template=template)
    (problem,) = task.problems(1)
    assert (problem.prompt, task.end) == (prompt, end)
    assert few_shot(file, 1, prompt_template=template) == [(prompt, " 2 + 2 is 4.\n#### 4")]


def test_the_next_question_of_a_template_ends_a_solution(file):
    task = Jsonl(file, prompt_template="Q: {question}\nA:")
    assert task.is_final("It is 4.\nQ:")
    assert task.extract("It is 4.\nQ: 5 + 5? #### 10") == "4"
    assert not task.is_final("It is 4.\nQuestion:")


@pytest.mark.parametrize("template", ["2 + 2?", "{problem}", "", None])
def test_a_template_without_a_question(file, template):
    with pytest.raises(ValueError, match=r"prompt_template: expected a text with \{question\} in it, got"):
        Jsonl(file, prompt_template=template)


def test_special_tokens_in_a_question_are_text(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert spelled_out(tokenizer, QUESTION) == ["<|im_end|>"]
    assert tokenizer.encode(QUESTION).count(end) == 1
    ids = encode_as_text(tokenizer, QUESTION)
    assert end not in ids
    assert tokenizer.decode(ids) == QUESTION
    plain = "Is this a word?"
    assert encode_as_text(tokenizer, plain) == tokenizer.encode(plain)


def test_special_tokens_of_the_template_remain(tokenizer):
    def chat(question, **options):
        return format_prompts([Problem("p", question)], tokenizer=tokenizer, chat=True, **options)[0]

    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids, plain = chat(QUESTION), chat("Is this a word?")
    assert ids.count(end) == plain.count(end)
    assert tokenizer.decode(ids) == tokenizer.decode(plain).replace("this", "<|im_end|>")
    assert chat(QUESTION, special_tokens=True).count(end) == plain.count(end) + 1


def test_the_system_prompt_is_the_first_message(tokenizer):
    (ids,) = format_prompts([Problem("p", "Hi?")], tokenizer=tokenizer, chat=True, system_prompt="Be brief.")
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(ValueError, match="system_prompt: expected chat"):
        format_prompts([Problem("p", "Hi?")], system_prompt="Be brief.")


@pytest.mark.parametrize("spelled", [False, True])
def test_a_template_that_takes_no_system_prompt(tokenizer, spelled, monkeypatch):
    problem, options = Problem("p", QUESTION if spelled else "Hi?"), {"tokenizer": tokenizer, "chat": True}
    without = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", without)
    with pytest.raises(ValueError, match=r"leaves (it|the system message) out|leaves out the system message"):
        format_prompts([problem], system_prompt="Be brief.", **options)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('System role not supported') }}")
    with pytest.raises(ValueError, match="chat: the tokenizer's template refuses the messages: System role not"):
        format_prompts([problem], system_prompt="Be brief.", **options)


def test_examples_that_give_an_answer_away():
    problems = [Problem("a", "Question: 2 + 2?\nAnswer:"), Problem("b", "Question: 3 + 3?\nAnswer:")]
    require_unseen(problems, [("Question: 4 + 4?\nAnswer:", " 8")])
    with pytest.raises(ValueError, match=r"examples: 1 of the problems are among them, .* the first is 'b'"):
        require_unseen(problems, [("question:  3 + 3?\n\nAnswer: ", " 6")])
