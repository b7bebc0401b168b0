"""Counts the work of forwards by hand from the page table, to check the meter."""

import numpy as np

from treedecode.accounting.meter import Spending
from treedecode.engine import runner

# fields of `Spending` that are counted
MEASURED = ("computed_tokens", "kv_bytes", "kv_bytes_copied", "forwards", "branch_forwards")
MEASURED += ("peak_pages", "peak_pages_copied")


class Count:
    """Counts what every forward reads and samples, by account and, under None, for all.

    Attributes:
        spent: account -> `Spending`, of which the fields `MEASURED` are counted.
        sampled: account -> tokens sampled in each forward.
    """

    def __init__(self, dec, monkeypatch):
        self.spent, self.sampled = {}, {}
        forward, sample_tokens = runner.forward, runner.sample_tokens
        pool, model = dec.engine.pool, dec.model
        token_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * 4

        def counted_forward(model, pool_, table, batch, slots, **options):
            q_lens = np.asarray(batch.q_lens)
            lens = table.num_cached[batch.rows] + q_lens
            accounts = table.account[batch.rows]
            for account in [None, *set(accounts.tolist())]:
                rows = [i for i in range(len(lens)) if account is None or accounts[i] == account]
                fill = {}  # page -> tokens read of it
                for i in rows:
                    pages = pool.page_table[batch.rows[i]][: -(-lens[i] // pool.page_size)].tolist()
                    for column, page in enumerate(pages):
                        fill[page] = max(fill.get(page, 0), min(lens[i] - column * pool.page_size, pool.page_size))
                spending = Spending(
                    computed_tokens=int(q_lens[rows].sum()),
                    kv_bytes=int(sum(fill.values())) * token_bytes,
                    kv_bytes_copied=int(lens[rows].sum()) * token_bytes,
                    forwards=1,
                    branch_forwards=len(rows),
                    peak_pages=len(fill),
                    peak_pages_copied=sum(-(-int(lens[i]) // pool.page_size) for i in rows),
                )
                self.spent[account] = self.spent.get(account, Spending()) + spending
            return forward(model, pool_, table, batch, slots, **options)

        def counted_sample_tokens(table, matcher, eos, sample, logits):
            accounts = table.account[sample.rows]
            for account in [None, *set(accounts.tolist())]:
                count = len(accounts) if account is None else int((accounts == account).sum())
                self.sampled.setdefault(account, []).append(count)
            return sample_tokens(table, matcher, eos, sample, logits)

        monkeypatch.setattr(runner, "forward", counted_forward)
        monkeypatch.setattr(runner, "sample_tokens", counted_sample_tokens)
