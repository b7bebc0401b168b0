"""Monitor: what a decoder holds at this moment, read from another thread while it decodes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from treedecode.decoding.decoder import Decoder

_PATIENCE = 0.05  # seconds; a tick that takes longer leaves the reader with what it last saw


@dataclass(frozen=True)
class Load:
    """What a decoder holds.

    Attributes:
        num_branches: branches alive. num_pages: pages in use, by branches or by the prefix index.
        max_branches, max_pages: what there is of each.
    """

    num_branches: int
    max_branches: int
    num_pages: int
    max_pages: int


class Monitor:
    """Reads a decoder's load without making it wait for the device.

    On the CPU the page state is memory like any other. On a GPU reading it means a copy, on a stream of its own, which
    does not wait for the kernels in flight; forwards are paused meanwhile, since a call from another thread would
    spoil a graph that is being captured.
    """

    def __init__(self, decoder: "Decoder") -> None:
        self._decoder, self._pool = decoder, decoder.pool
        self._stream = torch.cuda.Stream(self._pool.device) if self._pool.device.type == "cuda" else None
        self._num_free_pages = self._pool.num_pages

    def read(self) -> Load:
        """The load now; pages as of the last time they could be read, if a tick is in the way."""
        pool = self._pool
        if self._stream is None:
            self._num_free_pages = pool.num_free_pages
        else:
            with self._decoder.paused(_PATIENCE) as is_paused, torch.cuda.stream(self._stream):
                if is_paused:
                    self._num_free_pages = pool.num_free_pages
        num_branches = pool.max_branches - pool.num_free_rows
        return Load(num_branches, pool.max_branches, pool.num_pages - self._num_free_pages, pool.num_pages)
