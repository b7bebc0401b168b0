"""Rows of known data sets, as these have them, and fields that the caller names."""

import itertools
import json

import pytest

from treedecode.tasks import load
from treedecode.tasks.jsonl import Jsonl

GSM8K = {"question": "Ann has 2 cats and 3 dogs. Pets?", "answer": "2+3 = <<2+3=5>>5\n#### 5"}
MATH = {"problem": "What is half?", "level": "Level 1", "type": "Algebra", "solution": r"It is $\boxed{\frac{1}{2}}$."}
MATH_500 = {
    "problem": "Convert the point.",
    "solution": r"So $\boxed{\left( 3, \frac{\pi}{2} \right)}$.",
    "answer": r"\left( 3, \frac{\pi}{2} \right)",
    "subject": "Precalculus",
    "level": 2,
    "unique_id": "test/precalculus/807.json",
}
SVAMP = {
    "ID": "chal-1",
    "Body": "Each pack of dvds costs 76 dollars. There is a discount of 25 dollars.",
    "Question": "How much do you have to pay for a pack?",
    "Equation": "( 76.0 - 25.0 )",
    "Answer": 51.0,
    "Type": "Subtraction",
}
MGSM = {"question": "七枝筆多少錢?", "answer": None, "answer_number": 21, "equation_solution": None}
MGSM_TRAIN = {"question": "Wie viele?", "answer": "5 + 6 = 11. Die Antwort ist 11.", "answer_number": 11}
SYMBOLIC = [
    {"id": 7, "instance": i, "question": f"There are {i} bees.", "answer": f"#### {i}", "original_id": 1}
    for i in (0, 1)
]


@pytest.fixture
def problems(tmp_path):
    def read(*rows, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = Jsonl(path, **options)
        return task.problems(len(rows))

    return read


@pytest.mark.parametrize(
    ("row", "id", "question", "answer"),
    [
        (GSM8K, "rows-1", GSM8K["question"], "5"),
        (MATH, "rows-1", "What is half?", r"\frac{1}{2}"),
        (MATH_500, "test/precalculus/807.json", "Convert the point.", MATH_500["answer"]),
        (SVAMP, "chal-1", f"{SVAMP['Body']} {SVAMP['Question']}", "51"),
        (MGSM, "rows-1", MGSM["question"], "21"),
    ],
    ids=["GSM8K", "MATH", "MATH-500", "SVAMP", "MGSM"],
)
def test_known_data_sets(problems, row, id, question, answer):
    (problem,) = problems(row)
    assert (problem.id, problem.prompt, problem.answer) == (id, f"Question: {question}\nAnswer:", answer)


def test_worked_examples_show_the_solution_of_the_row(problems, tmp_path):
    problems(MATH_500, SVAMP)
    task = Jsonl(tmp_path / "rows.jsonl", train=tmp_path / "rows.jsonl")
    assert [solution for _, solution in task.examples(2)] == [" " + MATH_500["solution"], " #### 51"]


def test_ids_that_are_repeated_have_the_instance(problems):
    assert [problem.id for problem in problems(*SYMBOLIC)] == ["7-0", "7-1"]
    with pytest.raises(ValueError, match="line 2: id: '7-0' is that of line 1"):
        problems(SYMBOLIC[0], SYMBOLIC[0])


def test_named_fields_count_alone(problems):
    row = {"id": "a", "uid": "b", "question": "x?", "frage": "y?", "answer": "1", "loesung": "2"}
    (problem,) = problems(row, question_field="frage", answer_field="loesung", id_field="uid")
    assert (problem.id, problem.prompt, problem.answer) == ("b", "Question: y?\nAnswer:", "2")
    (problem,) = problems(MGSM_TRAIN, answer_field="answer_number")
    assert problem.answer == "11"


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {"text": "x?"},
            {},
            r'question: expected a text, got None; the fields are "text", and question_field names it',
        ),
        ({}, {}, "question: expected a text, got None; there are no fields"),
        (GSM8K, {"question_field": "q"}, 'question_field: there is no \'q\'; the fields are "question", "answer"'),
        (GSM8K, {"answer_field": "a"}, "answer_field: there is no 'a'"),
        (GSM8K, {"id_field": "key"}, "id_field: there is no 'key'"),
        ({"problem": "x", "solution": "no mark"}, {}, r"solution: expected the result after #### or in \\boxed"),
        ({"question": "x", "answer": "a\nb"}, {}, r"answer: expected the result after #### or in \\boxed"),
    ],
)
def test_rows_without_what_is_needed(problems, row, options, message):
    with pytest.raises(ValueError, match=f"rows.jsonl, line 1: {message}"):
        problems(row, **options)


def test_a_field_is_named_by_a_text(problems):
    with pytest.raises(ValueError, match="question_field: expected the name of a field, got ''"):
        problems(GSM8K, question_field="")


def test_problems_without_an_answer_are_not_graded(problems, tmp_path):
    given, absent = problems(GSM8K, {"question": "And now?", "answer": None})
    task = given.task
    assert (task.verify(given, "#### 5"), task.verify(given, "#### 6"), task.verify(given, "")) == (True, False, False)
    assert absent.answer is None
    assert task.verify(absent, "#### 5") is None
    assert task.verify(absent, "") is None
    with pytest.raises(ValueError, match="problem 'rows-2', has no answer to show"):
        Jsonl(tmp_path / "rows.jsonl", train=tmp_path / "rows.jsonl").examples(2)


def test_more_problems_of_a_file_have_the_same_among_them(problems, tmp_path):
    rows = [{"question": f"{i}?", "answer": str(i)} for i in range(40)]
    problems(*rows)
    task = load(tmp_path / "rows.jsonl")
    drawn = [[problem.id for problem in task.problems(count, seed=3)] for count in (5, 10, 39, 40)]
    for fewer, more in itertools.pairwise(drawn):
        assert set(fewer) < set(more)
    assert drawn[3] == [f"rows-{i + 1}" for i in range(40)]
    assert drawn[0] != [problem.id for problem in task.problems(5, seed=4)]
