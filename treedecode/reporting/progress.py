"""Shows a progress bar over the problems of a run, with the decoder's load."""

import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from treedecode.reporting.monitor import Monitor

if TYPE_CHECKING:
    from treedecode.decoding.decoder import Decoder

_INTERVAL = 0.25  # seconds between two readings of the decoder
_WINDOW = 8  # intervals that a rate is the mean of


class Progress:
    """Shows the problems that are done, live branches, tokens a second and pages in use, while its context lasts.

    A thread reads the decoder four times a second, also during a long forward; the decoder does not know of it.

    Args:
        num_problems: problems of the run.
        num_done: those of them that were solved before it began.
        show: False = shows nothing; None = shows the bar where `file` is a terminal.
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
        self._readings: deque[tuple[float, int]] = deque(maxlen=_WINDOW + 1)
        self._bar: Any = None
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Progress":
        if self.is_shown:
            total, initial = self._sizes
            self._bar = tqdm(
                total=total, initial=initial, file=self._file, unit="problem", dynamic_ncols=True, smoothing=0.1
            )
            self._thread = threading.Thread(target=self._run, name="treedecode-progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._end.set()
            self._thread.join()
            self._decoder.collect()  # branches whose handles are gone are not shown as alive
            self._refresh()
            self._bar.close()

    def advance(self) -> None:
        """Counts one more problem as done."""
        if self._bar is not None:
            self._bar.update()

    def write(self, line: str) -> None:
        """Writes a line above the bar."""
        if self._bar is not None:
            self._bar.write(line, file=self._file)
        else:
            print(line, file=self._file, flush=True)

    def _run(self) -> None:
        while not self._end.wait(_INTERVAL):
            self._refresh()

    def _refresh(self) -> None:
        load = self._monitor.read()
        self._readings.append((time.monotonic(), self._decoder.stats.num_sampled_tokens))
        (begin, before), (now, tokens) = self._readings[0], self._readings[-1]
        rate = (tokens - before) / (now - begin) if now > begin else 0.0
        self._bar.set_postfix_str(
            f"{load.num_branches} branches, {rate:,.0f} tokens/s, pages {load.num_pages:,}/{load.max_pages:,}"
        )
