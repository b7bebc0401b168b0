"""Tasks and verifiers on the random texts of `fakes.FakeModel`."""

import hashlib
from dataclasses import dataclass

import numpy as np
from support.fakes import FakeModel, fake_decoder

from treedecode.tasks import Problem

PROMPTS = ["the cat sat on the mat. ", "a dog, the cat and 12 mice. ", "the cat sat on the dog. "]


@dataclass(frozen=True)
class FakeTask:
    """Steps end with an e, solutions with a full stop; the answer is one of three letters, or none."""

    name: str = "fake"
    stop: str = "e"
    end: tuple[str, ...] = (".",)
    max_step_tokens: int = 4
    max_new_tokens: int = 14

    def problems(self, num_problems, *, split="test", seed=0):
        return [Problem(f"{split}/{i}", PROMPTS[i % len(PROMPTS)], answer="a") for i in range(num_problems)]

    def examples(self, count):
        return []

    def extract(self, text):
        return (*"aAbBc", None)[len(text) % 6]

    def equivalent(self, first, second):
        return first.lower() == second.lower()

    def is_final(self, text):
        return False

    def verify(self, problem, text):
        return (self.extract(text) or "").lower() == problem.answer


class Digits:
    """The answer is the first digit of a text, which ends with its line."""

    name, stop, end = "digits", " ", ("\n",)
    max_step_tokens, max_new_tokens = 4, 12

    def extract(self, text):
        return next((c for c in text if c.isdigit()), None)

    def equivalent(self, first, second):
        return first == second

    def is_final(self, text):
        return False

    def verify(self, problem, text):
        return self.extract(text) == problem.answer


class Lines:
    """A line is a step, and an empty one the end."""

    name, stop, end, max_step_tokens, max_new_tokens = "lines", "\n", ("\n\n",), 6, 18

    def extract(self, text):
        return text.strip() or None

    def equivalent(self, first, second):
        return first == second

    def is_final(self, text):
        return False

    def verify(self, problem, text):
        return "the" in text


def rate(problem, text):
    """Scores a text by some probability, which depends on the problem and the text alone."""
    digest = hashlib.blake2b(f"{problem.id}/{text}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") / 2**32


def talkative_decoder(**options):
    """Makes a decoder on a model that ends its text now and then."""
    return fake_decoder(FakeModel(eos_logit=1.5), **options)


class Recorder:
    """Scores texts, and records the (text, score) of every call in `calls`."""

    probability = True

    def __init__(self, rate=rate, fail_at=None):
        self.rate = rate
        self.fail_at = fail_at
        self.calls = []

    def __repr__(self):
        return "Recorder()"

    async def __call__(self, frontier, problem):
        if self.fail_at == len(self.calls):
            raise ArithmeticError("the verifier broke")
        texts = frontier.texts()
        self.calls.append([(text, self.rate(problem, text)) for text in texts])
        frontier.scores = np.array([score for _, score in self.calls[-1]])
        return frontier.scores
