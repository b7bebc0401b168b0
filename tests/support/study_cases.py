"""A task for the fake model, whose texts are noise: solutions end with a digit, the answer is that modulo three."""

from dataclasses import dataclass

from treedecode.tasks.base import Problem


@dataclass(frozen=True)
class Digits:
    name = "digits"
    stop = ","
    end = tuple("0123456789")
    max_step_tokens = 4
    max_new_tokens = 12

    def problems(self, num_problems, *, split="test", seed=0):
        return [Problem(f"{split}-{i}", f"the {'abcdefghij'[i % 10]}{i} ", str(i % 3)) for i in range(num_problems)]

    def examples(self, count):
        return []

    def extract(self, text):
        return str(int(text[-1]) % 3) if text.endswith(self.end) else None

    def equivalent(self, first, second):
        return first == second

    def is_final(self, text):
        return text.endswith(self.end)

    def verify(self, problem, text):
        return self.extract(text) == problem.answer


class Length:
    """A verifier that scores branches by the length of their text, in which they differ often enough to be ranked."""

    probability, num_samples = True, 0

    def __repr__(self):
        return "Length()"

    async def __call__(self, frontier, problem):
        frontier.scores = [length(text) for text in frontier.texts()]
        return frontier.scores


def length(text):
    return 1 / (1 + len(text))
