"""The unshared baseline: a decoder that takes branches one after another over copied caches.

It runs the same strategies and does the same work to the last token (on the CPU to the last bit), without sharing: a
fork copies the parent's K and V, no prefix index remembers prompts, and a forward holds one branch, which goes to its
stop before the next one begins. Kernels, sampling and the loop are the same code, so that a ratio of times is the price
of not sharing alone.
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
        """Forks like `PagePool.fork`, and copies the pages that rows would share.

        Raises:
            OutOfPages: there are too few for the copies; rows may then share pages.
        """
        super().fork(src_rows, dst_rows, lens)
        for row in np.asarray(dst_rows).tolist():
            pages = self.pages(row)
            if len(pages) == 0 or (self.refcount[self._tensor(pages)] == 1).all():
                continue  # an empty row, or one that took over the pages of its source
            num_tokens = int(self.seq_lens[row])
            self.retain(pages)
            try:
                self.clear([row])
                self.append([row], [num_tokens])
                copy_pages(self.kv, self._tensor(pages), self._tensor(self.pages(row)))
            finally:
                self.drop(pages)


class OneAtATime(Scheduler):
    """Schedules one branch at a time, in the order of requests, and remembers no prompts."""

    def remember(self, rows: IntArray) -> None:
        """Puts nothing into the prefix index."""

    def _admit(self, waiting: IntArray, decoding: IntArray) -> tuple[IntArray, IntArray]:
        rows = np.concatenate([waiting, decoding])
        first = rows[[np.argmin(self.table.order[rows])]] if len(rows) else rows
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
