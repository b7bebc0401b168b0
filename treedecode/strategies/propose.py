"""propose: asks the model for several next steps in one answer (Tree of Thoughts, 2305.10601)."""

import re

import numpy as np

from treedecode.decoding.frontier import Frontier
from treedecode.engine.sampling import Sampling
from treedecode.search.search import Search

_BULLET = re.compile(r"^\s*(?:[-*\u2022]|\(?[0-9]+[.):])\s+")
_REPLACEMENT = "\ufffd"  # stands for bytes that are no character


async def propose(
    search: Search, states: Frontier, prompt: str, *, width: int, max_new_tokens: int, sampling: Sampling | None
) -> Frontier:
    """Makes children of every state from the first `width` different steps that the model lists.

    The model is asked on side branches, which share the pages of the states and are released afterwards; a child has
    the step alone, as forced text. Bullets and numbers before a step are left out, and so are steps that are too long
    for the solution, or cut off with the list. A complete solution is its own only child; a state without a proposal
    has no child. If nothing at all is proposed, every state is its own only child.
    """
    asked = np.flatnonzero(search.unfinished(states))
    listed: list[list[list[int]]] = [[[]] for _ in range(len(states))]  # of each state: tokens that its children add
    question = search.decoder.encode(prompt, special=False)
    room = int(search.room(states).min()) - len(question)
    if len(asked) and room > 0:
        with states.select(asked) as selected, selected.fork(1) as side:
            side.leave_record()
            side.append(question)
            stop = ["\n\n", *search.task.end]
            begins, list_limit = side.num_tokens, min(max_new_tokens, room)
            await side.extend(stop=stop, max_new_tokens=list_limit, sampling=sampling)
            answers, is_cut = side.step_texts(), (side.num_tokens - begins == list_limit) & ~side.finished
        remaining = search.remaining_tokens(states)[asked]
        for state, answer, cut, limit in zip(asked, answers, is_cut, remaining, strict=True):
            lines = answer.splitlines()[: -1 if cut and not answer.endswith("\n") else None]  # half a step is none
            steps = [_BULLET.sub("", line).strip() for line in lines if _REPLACEMENT not in line]
            texts = list(dict.fromkeys(step + search.task.stop for step in steps if step))
            tokens = [search.decoder.encode(text, special=False) for text in texts]
            listed[state] = [ids for ids in tokens if 0 < len(ids) <= limit][:width]
    counts = np.array([len(steps) for steps in listed])
    if not counts.any():
        return states.fork(1)
    return states.fork(counts).append([ids for steps in listed for ids in steps])
