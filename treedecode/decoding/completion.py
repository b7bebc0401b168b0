"""Completion: the text that a branch has generated, with its tokens and log-probabilities."""

from dataclasses import dataclass

from treedecode.common.arrays import IntArray
from treedecode.engine.branch_table import Finish
from treedecode.engine.engine import Engine


@dataclass(frozen=True)
class Completion:
    """One finished branch.

    Attributes:
        text: the generated text, before the stop string that ended it. Empty without a tokenizer.
        token_ids: all generated tokens, up to and including the one that ended the text (end of sequence, stop token,
            or the last token of a stop string).
        logprobs: per token, nats, under the model's own distribution (before temperature and filters).
        cum_logprob: their sum.
        finish_reason: "stop" (end of sequence, stop token or stop string) or "length".
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    cum_logprob: float
    finish_reason: str


def completions_of(engine: Engine, rows: IntArray) -> list[Completion]:
    """Reads the completions of branches as they are now."""
    table = engine.table
    completions = []
    for row in rows.tolist():
        new = slice(int(table.prompt_len[row]), int(table.num_tokens[row]))
        completions.append(
            Completion(
                text=engine.text(row, cut=True),
                token_ids=table.tokens[row, new].tolist(),
                logprobs=table.logprobs[row, new].tolist(),
                cum_logprob=float(table.cum_logprob[row]),
                finish_reason="stop" if table.finish[row] in (Finish.STOP, Finish.EOS) else "length",
            )
        )
    return completions
