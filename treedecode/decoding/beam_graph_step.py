"""BeamGraphStep: append, plan, forward, prune, update and the forks that follow, as one CUDA graph.

As with every `GraphStep` the host is one step behind. It takes a few steps at a time and then lets other work run.
"""

from dataclasses import replace

import numpy as np
import torch

from treedecode import ops
from treedecode.cache.page_pool import PagePool
from treedecode.common.arrays import IntArray
from treedecode.decoding.beams import Beams, BeamSearch, BeamStep
from treedecode.engine.engine import Engine
from treedecode.engine.graph_step import GraphStep, InFlight
from treedecode.models.adapter import ModelAdapter
from treedecode.ops.pages import OK, OUT_OF_PAGES, STATUS_ERROR

_STEPS = 16  # taken before others get a turn


class BeamGraphStep(GraphStep):
    """A step of several beam searches: one row per running beam, in the order of the searches.

    A search that is done keeps its rows, whose new token is cut off again, and changes nothing else.
    """

    def __init__(self, model: ModelAdapter, pool: PagePool, settings: BeamSearch, num_beams: tuple[int, ...]) -> None:
        size, groups = sum(num_beams), len(num_beams)
        super().__init__(model, pool, size, 3 * size + groups + 1)
        self.settings = settings
        self.num_candidates = ops.beam_candidates(max(num_beams), len(settings.eos_token_ids))
        device = pool.device
        self.group = torch.from_numpy(np.repeat(np.arange(groups), num_beams)).to(device)
        self.indptr = torch.tensor([0, *np.cumsum(num_beams)], dtype=torch.int32, device=device)
        self.eos = torch.tensor(settings.eos_token_ids, dtype=torch.int32, device=device)
        self.max_new_tokens = self.buffer(torch.int32, groups)
        self.gen_lens = self.buffer(torch.int32, groups)
        self.done = torch.ones(groups, dtype=torch.bool, device=device)  # so that capturing forks nothing
        self.scores = self.buffer(torch.float32)
        self.finished = (self.buffer(torch.float32), *(self.buffer(torch.int32) for _ in range(3)))

    def load(self, beams: Beams, rows: IntArray, tokens: IntArray) -> None:
        """Prepares the next replay, which appends `tokens` to the running beams' `rows`."""
        self.idle(rows)
        self.q_lens.fill_(1)
        self.ids.copy_(torch.from_numpy(np.asarray(tokens, np.int64)))
        self.gen_lens.fill_(beams.num_steps)
        self.max_new_tokens.fill_(beams.settings.max_new_tokens)
        self.done.zero_()
        for buffer, values in zip((self.scores, *self.finished), beams.state, strict=True):
            buffer.copy_(values)

    def _step(self) -> None:
        state, settings = self.pool.state, self.settings
        logits, _ = self._forward()
        scores, parent, token, _ = ops.beam_prune(logits, self.scores, self.indptr, self.num_candidates)
        is_bad = scores.isnan()  # of searches with bad logits; the host ends them all
        scores = torch.where(is_bad, -torch.inf, scores)
        # After a refused append the logits mean nothing: no search may take a step then.
        refused = state.status[STATUS_ERROR] != OK
        was_done = self.done | refused
        done = was_done.clone()
        pool_scores, pool_lens, pool_parents, pool_tokens = self.finished
        new_scores, new_parent, new_token = ops.beam_update(
            scores,
            parent,
            token,
            self.indptr,
            self.indptr,
            pool_scores,
            pool_lens,
            pool_parents,
            pool_tokens,
            done,
            gen_lens=self.gen_lens,
            max_new_tokens=self.max_new_tokens,
            eos_ids=self.eos,
            length_penalty=settings.length_penalty,
            early_stopping=settings.early_stopping,
        )
        stays = was_done[self.group]
        source = torch.where(stays, self._last, new_parent.long())
        lens = state.seq_lens.index_select(0, self.row_ids)[source] - stays * self.q_lens
        ops.fork_branches(state, self.rows[source], self.rows, lens)
        bad = (is_bad.any() & ~refused).int().view(1)
        shown = torch.where(stays, -torch.inf, new_scores)
        torch.cat(
            [source.int(), new_token, shown.view(torch.int32), done.int(), bad, self.pool.status], out=self.result
        )
        self.scores.copy_(torch.where(stays, self.scores, new_scores))
        self.ids.copy_(torch.where(stays, self.ids, new_token.clamp_min(0)))
        self.gen_lens += ~was_done
        self.done.copy_(torch.where(refused, self.done, done))

    def unpack(self, result: np.ndarray) -> tuple[IntArray, IntArray, np.ndarray, np.ndarray, bool, int]:
        """Splits a result into parents, tokens, scores, done, whether logits were bad, and status."""
        size, groups = self.size, len(self.done)
        parents, tokens, scores = result[: 3 * size].reshape(3, size)
        done = result[3 * size : 3 * size + groups] != 0
        status = result[3 * size + groups + 1 + STATUS_ERROR]
        return parents, tokens, scores.view(np.float32), done, bool(result[3 * size + groups]), int(status)


def run_graph_steps(engine: Engine, beams: Beams, rows: IntArray, tokens: IntArray) -> BeamStep | None:
    """Takes some steps of searches that are past their first one.

    Args:
        rows: branches of the running beams, wholly in the cache.
        tokens: the next token of each.

    Returns:
        What `Beams.step` would: `parent` is each beam's own row, for the branches have moved already. None if no step
        was taken: other work would rather share the forward, a branch is not in the cache, or pages have run out.

    Raises:
        ValueError: logits are NaN or +inf.
    """
    with engine.store.lock, torch.inference_mode():
        table, graphs = engine.table, engine.runner.graphs
        if (
            graphs is None
            or not engine.only_a_beam_search_runs
            or (table.num_cached[rows] != table.num_tokens[rows]).any()
        ):
            return None
        settings, num_beams = beams.settings, beams.num_beams
        kind = replace(settings, max_new_tokens=1, min_new_tokens=0)  # limits are loaded, not captured
        step = graphs.get((kind, num_beams), lambda: BeamGraphStep(engine.model, engine.pool, kind, num_beams))
        step.load(beams, rows, tokens)
        in_flight = InFlight(step)
        history: list[tuple[IntArray, IntArray, np.ndarray]] = []
        max_steps = min(_STEPS, settings.max_new_tokens - beams.num_steps)
        launched, stop = 0, False
        while True:
            while not stop and launched < max_steps and not in_flight.is_full:
                in_flight.launch()
                launched += 1
            if not in_flight:
                break
            parents, new_tokens, scores, done, bad, status = step.unpack(in_flight.take())
            if status != OK or bad:
                engine.pool.reset_status()  # on the device after what is in in_flight, which is void
                if bad:
                    raise ValueError("the model gave logits that are NaN or +inf for a beam")
                if status != OUT_OF_PAGES:
                    raise RuntimeError(f"the page ops refused a captured step: status {status}")
                break
            engine.runner.count_decoded(len(rows))
            table.append(rows, np.ones(len(rows), np.int64), tokens)
            table.copy(rows[parents], rows)
            table.num_cached[rows] = table.num_tokens[rows]
            tokens = new_tokens
            history.append((parents, new_tokens, scores))
            # Half of the work would be for nothing: others are captured with fewer searches.
            stop |= bool(2 * np.count_nonzero(done) >= len(done))
        if not history:
            return None
        return beams.resume(history, (step.scores, *step.finished), step.done)
