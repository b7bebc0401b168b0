"""Progress: a bar over the problems of a run, with what the decoder is doing."""

import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from treedecode.reporting.monitor import Monitor

if TYPE_CHECKING:
    from treedecode.decoding.decoder import Decoder

_INTERVAL = 0.25  # seconds between looks at the decoder
_WINDOW = 8  # looks that a rate is over


class Progress:
    """A bar over problems: those done, live branches, tokens a second, pages in use.

    A thread looks at the decoder a few times a second, also while a forward takes long; nothing in the decoder calls
    it. A context manager; without a terminal, and unless `show` says otherwise, it does nothing.

    Args:
        num_problems: in the run. num_done: of which solved before it began.
        show: None = if `file` is a terminal.
        file: where the bar goes; None = standard error.
    """

    def __init__(
        self,
        decoder: "Decoder",
        num_problems: int,
        num_done: int = 0,
        *,
        show: bool | None = None,
        file: TextIO | None = None,
    ) -> None:
        self._file = sys.stderr if file is None else file
        self.is_shown = self._file.isatty() if show is None else show
        self._sizes = num_problems, num_done
        self._decoder, self._monitor = decoder, Monitor(decoder)
        self._looks: deque[tuple[float, int]] = deque(maxlen=_WINDOW + 1)
        self._bar: Any = None
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Progress":
        if self.is_shown:
            total, initial = self._sizes
            self._bar = tqdm(
                total=total, initial=initial, file=self._file, unit="problem", dynamic_ncols=True, smoothing=0.1
            )
            self._thread = threading.Thread(target=self._watch, name="treedecode-progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._end.set()
            self._thread.join()
            self._decoder.collect()  # branches whose handles are gone, so that they are not shown as left
            self._look()
            self._bar.close()

    def advance(self) -> None:
        """One more problem is solved."""
        if self._bar is not None:
            self._bar.update()

    def write(self, line: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is not None:
            self._bar.write(line, file=self._file)
        else:
            print(line, file=self._file, flush=True)

    def _watch(self) -> None:
        while not self._end.wait(_INTERVAL):
            self._look()

    def _look(self) -> None:
        load = self._monitor.read()
        self._looks.append((time.monotonic(), self._decoder.stats.num_sampled_tokens))
        (begin, before), (now, tokens) = self._looks[0], self._looks[-1]
        rate = (tokens - before) / (now - begin) if now > begin else 0.0
        self._bar.set_postfix_str(
            f"{load.num_branches} branches, {rate:,.0f} tokens/s, pages {load.num_pages:,}/{load.max_pages:,}"
        )
