"""Reads what a decoder holds from another thread while it decodes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from treedecode.decoding.decoder import Decoder

_PAUSE_TIMEOUT = 0.05  # seconds; during a longer tick the reader gets what it read last


@dataclass(frozen=True)
class Load:
    """The branches and pages that a decoder holds.

    Attributes:
        num_branches: branches alive.
        max_branches: branches that can be alive at once.
        num_pages: pages in use, by branches or by the prefix index.
        max_pages: pages of the pool.
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
        """Returns the load now; during a long tick on a GPU the pages are those of the last time."""
        pool = self._pool
        if self._stream is None:
            self._num_free_pages = pool.num_free_pages
        else:
            with self._decoder.paused(_PAUSE_TIMEOUT) as is_paused, torch.cuda.stream(self._stream):
                if is_paused:
                    self._num_free_pages = pool.num_free_pages
        num_branches = pool.max_branches - pool.num_free_rows
        return Load(num_branches, pool.max_branches, pool.num_pages - self._num_free_pages, pool.num_pages)
