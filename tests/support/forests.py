"""Makes page tables of random forests, for tests of the ops that read them."""

import itertools
import random

import torch
from hypothesis import strategies as st

UNUSED = 2**31 - 1  # a page id that no op may read


def as_tables(rows, page_size, last_page_tokens, max_pages=None):
    """Returns (page_table, seq_lens) from rows of page ids and the number of tokens in the last page of each."""
    max_pages = max([1, *map(len, rows)]) if max_pages is None else max_pages
    page_table = torch.full((len(rows), max_pages), UNUSED, dtype=torch.int32)
    for table_row, row in zip(page_table, rows, strict=True):
        table_row[: len(row)] = torch.tensor(row, dtype=torch.int32)
    seq_lens = [
        max(0, len(row) - 1) * page_size + (n if row else 0) for row, n in zip(rows, last_page_tokens, strict=True)
    ]
    return page_table, torch.tensor(seq_lens, dtype=torch.int32)


def tree_rows(children, pages):
    """Returns rows of page ids in depth-first order; a node at depth d has pages[d] pages and children[d] children."""
    counter = itertools.count()

    def grow(depth, path):
        path = path + [next(counter) for _ in range(pages[depth])]
        if depth + 1 == len(pages):
            return [path]
        return [row for _ in range(children[depth]) for row in grow(depth + 1, path)]

    return grow(0, [])


@st.composite
def forests(draw, max_rows=10, max_tokens=3000, page_sizes=(1, 8, 16, 32, 64)):
    """Draws (page_table, seq_lens, q_lens or None, page_size), with forks anywhere and empty and equal rows."""
    page_size = draw(st.sampled_from(page_sizes))
    max_pages = max(1, draw(st.sampled_from([page_size, 300, max_tokens])) // page_size)
    rng = random.Random(draw(st.integers(0, 2**32)))
    counter = itertools.count(rng.randrange(10**6))
    rows = []
    for _ in range(draw(st.integers(0, max_rows))):
        row = []
        if rows and rng.random() < 0.8:  # a fork of one of the last rows
            source = rng.choice(rows[-3:])
            row = source[: rng.choice([len(source), rng.randint(0, len(source))])]
        while len(row) < max_pages and rng.random() < 0.6:
            room = max_pages - len(row)
            row = row + [next(counter) for _ in range(rng.choice([1, 2, min(5, room), room][: room + 1]))][:room]
        rows.append(row)
    if draw(st.booleans()):
        rng.shuffle(rows)
    page_table, seq_lens = as_tables(rows, page_size, [rng.randint(1, page_size) for _ in rows], max_pages)
    q_lens = None
    if draw(st.booleans()):
        q_lens = torch.tensor([rng.choice([0, 1, 1, min(n, 7), n]) for n in seq_lens.tolist()], dtype=torch.int32)
    return page_table, seq_lens, q_lens, page_size
