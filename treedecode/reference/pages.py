"""References of the page ops. `state` is any object with the fields of `treedecode.ops.PageState`."""

from typing import Any

from torch import Tensor

# Positions of the numbers in the status, and values of its error, as in csrc/cpu/page_status.h.
STATUS_ERROR, STATUS_NUM_FREE, STATUS_NUM_NEEDED, STATUS_PEAK_USED = range(4)
OK, OUT_OF_PAGES, BAD_ARGUMENT = range(3)


def _refused(state: Any) -> bool:
    return bool(state.status[STATUS_ERROR] != OK)


def _pages_of(state: Any, num_tokens: int) -> int:
    return -(-num_tokens // state.page_size)


def _row(state: Any, row: int) -> list[int]:
    return state.page_table[row, : _pages_of(state, int(state.seq_lens[row]))].tolist()


def _check_rows(state: Any, rows: Tensor, name: str) -> None:
    if any(not 0 <= row < len(state.seq_lens) for row in rows.tolist()):
        raise ValueError(f"{name}: expected rows below {len(state.seq_lens)}, got {rows.tolist()}")


def _check_unique(rows: Tensor, name: str) -> None:
    if len(set(rows.tolist())) != len(rows):
        raise ValueError(f"{name}: expected each row once, got {rows.tolist()}")


def _drop(state: Any, page: int) -> None:
    state.refcount[page] -= 1
    if state.refcount[page] == 0:
        state.free_pages[int(state.status[STATUS_NUM_FREE])] = page
        state.status[STATUS_NUM_FREE] += 1


def _take(state: Any) -> int:
    state.status[STATUS_NUM_FREE] -= 1
    page = int(state.free_pages[int(state.status[STATUS_NUM_FREE])])
    state.refcount[page] = 1
    return page


def fork_branches(state: Any, src: Tensor, dst: Tensor, lens: Tensor | None = None) -> None:
    """See `treedecode.ops.fork_branches`."""
    _check_rows(state, src, "src")
    _check_rows(state, dst, "dst")
    _check_unique(dst, "dst")
    new_lens = [int(state.seq_lens[row]) for row in src.tolist()]
    if lens is not None:
        if any(not 0 <= new <= old for new, old in zip(lens.tolist(), new_lens, strict=True)):
            raise ValueError(f"lens: expected lengths from 0 to the source's {new_lens}, got {lens.tolist()}")
        new_lens = lens.tolist()
    if _refused(state):
        return
    new_rows = [_row(state, row)[: _pages_of(state, n)] for row, n in zip(src.tolist(), new_lens, strict=True)]
    old_rows = [_row(state, row) for row in dst.tolist()]
    for pages in new_rows:
        for page in pages:
            state.refcount[page] += 1
    for pages in old_rows:
        for page in reversed(pages):
            _drop(state, page)
    for row, pages, n in zip(dst.tolist(), new_rows, new_lens, strict=True):
        for j, page in enumerate(pages):
            state.page_table[row, j] = page
        state.seq_lens[row] = n


def append_slots(state: Any, kv: Tensor, slots: Tensor, rows: Tensor, q_lens: Tensor | None = None) -> None:
    """See `treedecode.ops.append_slots`."""
    _check_rows(state, rows, "rows")
    _check_unique(rows, "rows")
    new = [1] * len(rows) if q_lens is None else q_lens.tolist()
    room = state.page_table.shape[1] * state.page_size
    if any(n < 0 or int(state.seq_lens[row]) + n > room for row, n in zip(rows.tolist(), new, strict=True)):
        raise ValueError(f"q_lens: expected rows of at most {room} tokens, got {new}")
    if sum(new) > len(slots):
        raise ValueError(f"slots: expected at least {sum(new)} of them, got {len(slots)}")

    needed = 0
    references = state.refcount.tolist()  # to each page, after the copies of the sharers so far
    for row, n in zip(rows.tolist(), new, strict=True):
        length = int(state.seq_lens[row])
        needed += _pages_of(state, length + n) - _pages_of(state, length)
        if n and length % state.page_size:
            last = _row(state, row)[-1]
            if references[last] > 1:
                references[last] -= 1
                needed += 1
    if not _refused(state) and needed > int(state.status[STATUS_NUM_FREE]):
        state.status[STATUS_ERROR] = OUT_OF_PAGES
        state.status[STATUS_NUM_NEEDED] = needed
    if _refused(state):
        slots.fill_(-1)
        return

    out = []
    slots.fill_(-1)
    for row, n in zip(rows.tolist(), new, strict=True):
        length = int(state.seq_lens[row])
        if n and length % state.page_size:
            position = length // state.page_size
            last = int(state.page_table[row, position])
            if state.refcount[last] > 1:
                page = _take(state)
                _drop(state, last)
                state.page_table[row, position] = page
                tokens = slice(0, length % state.page_size)
                kv[:, :, page, :, tokens] = kv[:, :, last, :, tokens]
        for token in range(length, length + n):
            position, offset = divmod(token, state.page_size)
            if offset == 0:
                state.page_table[row, position] = _take(state)
            out.append(int(state.page_table[row, position]) * state.page_size + offset)
        state.seq_lens[row] = length + n
    for i, slot in enumerate(out):
        slots[i] = slot
    used = len(state.refcount) - int(state.status[STATUS_NUM_FREE])
    state.status[STATUS_PEAK_USED] = max(int(state.status[STATUS_PEAK_USED]), used)


def hold_pages(state: Any, pages: Tensor, hold: bool = True) -> None:
    """See `treedecode.ops.hold_pages`."""
    ids = pages.tolist()
    if any(not 0 <= page < len(state.refcount) for page in ids):
        raise ValueError(f"pages: expected page ids below {len(state.refcount)}, got {ids}")
    if any(state.refcount[page] < (1 if hold else ids.count(page)) for page in ids):
        raise ValueError(f"pages: expected pages in use, got {ids}")
    if _refused(state):
        return
    for page in ids:
        if hold:
            state.refcount[page] += 1
        else:
            _drop(state, page)


def adopt_pages(state: Any, pages: Tensor, row: int, num_tokens: int) -> None:
    """See `treedecode.ops.adopt_pages`."""
    if not 0 <= row < len(state.seq_lens) or state.seq_lens[row] != 0:
        raise ValueError(f"row: expected an empty row, got {row}")
    if len(pages) > state.page_table.shape[1]:
        raise ValueError(f"pages: expected at most {state.page_table.shape[1]}, got {len(pages)}")
    if num_tokens < 0 or _pages_of(state, num_tokens) != len(pages):
        raise ValueError(f"num_tokens: expected a length that ends in the last of {len(pages)} pages, got {num_tokens}")
    if _refused(state):
        return
    hold_pages(state, pages)
    for j, page in enumerate(pages.tolist()):
        state.page_table[row, j] = page
    state.seq_lens[row] = num_tokens


def copy_pages(kv: Tensor, src: Tensor, dst: Tensor, num_tokens: Tensor | None = None) -> None:
    """See `treedecode.ops.copy_pages`."""
    lens = [kv.shape[4]] * len(src) if num_tokens is None else num_tokens.tolist()
    used = [page for pair in zip(src.tolist(), dst.tolist(), strict=True) if pair[1] >= 0 for page in pair]
    if any(not 0 <= page < kv.shape[2] for page in used):
        raise ValueError(f"src, dst: expected page ids below {kv.shape[2]}, got {used}")
    for page, to, n in zip(src.tolist(), dst.tolist(), lens, strict=True):
        if to >= 0:
            kv[:, :, to, :, :n] = kv[:, :, page, :, :n]
