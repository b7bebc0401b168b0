"""The counterfactual: a decoder that takes branches one after another over copied caches.

It runs the very same strategy, so it does the same work to the last token (on the CPU to the last bit), in another way:
a fork copies the parent's keys and values, nothing is found again in a prefix index, and a forward has one branch in
it, which goes to its stop before the next one begins. Everything else (kernels, sampling, the tick) is the same code,
so a ratio of times is the price of that way alone.
"""

import numpy as np

from treedecode.cache.page_pool import IntArrayLike, PagePool
from treedecode.common.arrays import IntArray
from treedecode.decoding.decoder import Decoder
from treedecode.engine.scheduler import Scheduler
from treedecode.ops import copy_pages


class CopyingPool(PagePool):
    """A pool in which no two branches share a page: forks copy."""

    def fork(self, src_rows: IntArrayLike, dst_rows: IntArrayLike, lens: IntArrayLike | None = None) -> None:
        """As `PagePool.fork`, with pages of their own for rows that would share some.

        Raises:
            OutOfPages: there are too few for the copies; rows may then share pages.
        """
        super().fork(src_rows, dst_rows, lens)
        for row in np.asarray(dst_rows).tolist():
            pages = self.pages(row)
            if len(pages) == 0 or (self.refcount[self._tensor(pages)] == 1).all():
                continue  # a truncated row, or one that took over what its source gave up
            num_tokens = int(self.seq_lens[row])
            self.retain(pages)
            try:
                self.clear([row])
                self.append([row], [num_tokens])
                copy_pages(self.kv, self._tensor(pages), self._tensor(self.pages(row)))
            finally:
                self.drop(pages)


class OneAtATime(Scheduler):
    """Forwards of one branch: the first that asked, until it has what it asked for. Nothing is remembered."""

    def remember(self, rows: IntArray) -> None:
        """Puts nothing into the prefix index."""

    def _admit(self, waiting: IntArray, decoding: IntArray) -> tuple[IntArray, IntArray]:
        everyone = np.concatenate([waiting, decoding])
        first = everyone[[np.argmin(self.table.order[everyone])]] if len(everyone) else everyone
        return super()._admit(np.intersect1d(first, waiting), np.intersect1d(first, decoding))


class UnsharedDecoder(Decoder):
    """A decoder that takes branches one after another over copied caches."""

    _pool_type = CopyingPool
    _scheduler_type = OneAtATime

    @classmethod
    def like(cls, decoder: Decoder) -> "UnsharedDecoder":
        """Makes one on the model of `decoder`, of the same sizes."""
        pool = decoder.pool
        return cls(
            decoder.model,
            decoder.tokenizer,
            kv_memory=pool.num_pages * pool.page_bytes,
            page_size=pool.page_size,
            max_branches=pool.max_branches,
            prefill_tokens=decoder.prefill_tokens,
            cuda_graphs=decoder.uses_graphs,
        )
