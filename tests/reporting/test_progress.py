import io
import re
import threading
import time

import pytest

from treedecode.reporting.monitor import Load, Monitor
from treedecode.reporting.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_load_is_what_the_pool_holds(make_decoder):
    decoder = make_decoder(max_branches=32)
    monitor = Monitor(decoder)
    assert monitor.read() == Load(0, 32, 0, 200)

    async def fork():
        with await decoder.roots(["one two three four"]) as root, root.fork(5):
            return monitor.read()

    load = decoder.run(fork())
    pool = decoder.engine.pool
    assert load.num_branches == 6
    # all six share the prompt's full pages
    assert 0 < load.num_pages < 6 * len("one two three four") // pool.page_size
    assert monitor.read().num_branches == 0
    assert monitor.read().num_pages == len(decoder.engine.store.index.pages())


def test_a_bar_over_problems(make_decoder):
    decoder, terminal = make_decoder(), Terminal()
    with Progress(decoder, 4, 1, file=terminal) as progress:
        assert progress.is_shown
        progress.write("a line of its own")
        for prompt in ("one", "two", "three"):
            decoder.generate(prompt, num_branches=2, max_new_tokens=8)
            progress.advance()
    shown = terminal.getvalue()
    assert "a line of its own\n" in shown
    last = shown.split("\r")[-1]
    assert "4/4" in last
    assert re.search(r"0 branches, [\d,]+ tokens/s, pages [\d,]+/200", last)
    assert not any(thread.name == "treedecode-progress" for thread in threading.enumerate())


def test_nothing_without_a_terminal_unless_asked(make_decoder):
    decoder, file = make_decoder(), io.StringIO()
    with Progress(decoder, 1, file=file) as progress:
        progress.advance()
    assert file.getvalue() == ""
    with Progress(decoder, 1, show=True, file=file) as progress:
        progress.advance()
    assert "1/1" in file.getvalue()
    terminal = Terminal()
    with Progress(decoder, 1, show=False, file=terminal) as progress:
        progress.advance()
        progress.write("still said")
    assert terminal.getvalue() == "still said\n"


def test_it_looks_while_the_decoder_works(make_decoder, monkeypatch):
    decoder, terminal = make_decoder(), Terminal()
    seen = threading.Event()
    read = Monitor.read

    def reading(self):
        load = read(self)
        if load.num_branches == 3:
            seen.set()
        return load

    monkeypatch.setattr(Monitor, "read", reading)

    async def work():
        frontier = (await decoder.roots(["one"])).fork(2)
        with await decoder.roots(["two"]), frontier:
            end = time.monotonic() + 20
            while not seen.is_set() and time.monotonic() < end:
                time.sleep(0.01)  # the event loop stands still, as in a long forward

    with Progress(decoder, 1, file=terminal):
        decoder.run(work())
    assert seen.is_set()


def test_the_bar_ends_with_an_error(make_decoder):
    with pytest.raises(RuntimeError, match="out"), Progress(make_decoder(), 2, file=Terminal()):
        raise RuntimeError("out")
    assert not any(thread.name == "treedecode-progress" for thread in threading.enumerate())
