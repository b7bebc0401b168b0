"""Meter: what each forward costs, charged to the accounts of its branches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from treedecode.common.arrays import IntArray
from treedecode.models.adapter import ModelAdapter

_NO_LIMIT = np.inf


class BudgetExhausted(Exception):
    """An account has spent what it may; its branches keep the tokens they have."""


@dataclass(frozen=True)
class Spending:
    """What an account has spent; adds up over accounts.

    "Copied" is the same work with a cache of its own for every branch, as without sharing.

    Attributes:
        prompt_tokens: tokens of prompts, computed or found in the prefix index.
        generated_tokens: tokens sampled.
        computed_tokens: tokens that went through the model.
        flops: floating-point operations of products and attention, a multiply-add being two.
        kv_bytes: bytes of keys and values read, those shared by branches of one forward once.
        kv_bytes_copied: the same, once for every branch.
        forwards: forwards that the account had a branch in.
        branch_forwards: the same, counted for every branch: the forwards of branches decoded one after another.
        peak_pages: most pages one forward read for the account.
        peak_pages_copied: the same with a cache for every branch.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    computed_tokens: int = 0
    flops: int = 0
    kv_bytes: int = 0
    kv_bytes_copied: int = 0
    forwards: int = 0
    branch_forwards: int = 0
    peak_pages: int = 0
    peak_pages_copied: int = 0

    def __add__(self, other: "Spending") -> "Spending":
        """Both together; peaks are of one forward, so the higher one stays."""
        peaks = ("peak_pages", "peak_pages_copied")
        mine = ((field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return Spending(**{name: max(a, b) if name in peaks else a + b for name, a, b in mine})


FIELDS = tuple(field.name for field in fields(Spending))
_SUMS = ("computed_tokens", "generated_tokens", "flops", "kv_bytes", "kv_bytes_copied", "branch_forwards")
_PEAKS = ("peak_pages", "peak_pages_copied")


@dataclass(frozen=True)
class Shares:
    """Rows of a batch by account, each account's in depth-first order, and what neighbours share."""

    order: IntArray  # [n] indices into the batch's rows, of those that have an account
    starts: IntArray  # [accounts] where in `order` each account's rows begin
    accounts: IntArray  # [accounts] int64
    shared: IntArray  # [n] tokens in full pages that a row has in common with the one before of its account


class Meter:
    """Accounts by number, struct of arrays. An account may belong to another, to which all of it is charged too.

    Not thread-safe: the decoder's lock guards it.

    Attributes:
        token_bytes: of one token's keys and values, all layers.
    """

    def __init__(self, model: ModelAdapter, page_size: int) -> None:
        self._page_size = page_size
        self.token_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * model.dtype.itemsize
        self._costs = (
            model.flops_per_token,
            model.flops_per_logits,
            4 * model.num_layers * model.num_qo_heads * model.head_dim,  # a query and a key: two products of head_dim
        )
        self._spent = {name: np.zeros(8, np.int64) for name in FIELDS}
        self._limits = {name: np.full(8, _NO_LIMIT) for name in FIELDS}
        self._over = np.zeros(8, bool)
        self._parent = np.full(8, -1, np.int64)
        self._limited = np.zeros(8, bool)
        self._used = 0
        self._free: list[int] = []
        self._ended: dict[int, Callable[[], bool]] = {}

    def open(self, parent: int = -1, *, ended: Callable[[], bool] | None = None, **limits: float) -> int:
        """A new account.

        Args:
            parent: the account it belongs to; -1 = none. A parent has none itself.
            ended: asked after every forward; True: it is over its limits, whatever it has spent.
            limits: by the name of a `Spending` field.
        """
        if self._free:
            account = self._free.pop()
        else:
            account, self._used = self._used, self._used + 1
            if account == len(self._over):
                self._grow()
        for name in FIELDS:
            self._spent[name][account] = 0
            self._limits[name][account] = limits.get(name, _NO_LIMIT)
        self._over[account] = False
        self._parent[account] = parent
        self._limited[account] = bool(limits) or ended is not None
        if ended is not None:
            self._ended[account] = ended
        return account

    def close(self, account: int) -> Spending:
        """Ends an account that no branch has any more: what it has spent."""
        spent = self.spending(account)
        self._free.append(account)
        self._ended.pop(account, None)
        return spent

    def spending(self, account: int) -> Spending:
        """What an account has spent so far."""
        return Spending(**{name: int(self._spent[name][account]) for name in FIELDS})

    def charge_prompt(self, account: int, num_tokens: int) -> None:
        """Prompts of so many tokens in all have been given."""
        for payer in {account, int(self._parent[account])} - {-1}:
            self._spent["prompt_tokens"][payer] += num_tokens

    def add(self, account: int, spending: Spending) -> None:
        """Charges what was spent before the account was opened."""
        for name in FIELDS:
            self._spent[name][account] += getattr(spending, name)

    def is_over(self, account: int) -> bool:
        """Whether an account, or the one it belongs to, has spent what it may."""
        if account < 0:
            return False
        parent = int(self._parent[account])
        self._expire(np.array([account] if parent < 0 else [account, parent]))
        return bool(self._over[account] or (parent >= 0 and self._over[parent]))

    def shares(self, accounts: IntArray, pages: IntArray, used: np.ndarray, cached: IntArray) -> list[Shares]:
        """How rows of a batch share pages within their accounts, and within the accounts those belong to.

        Args:
            accounts: `[B]` int64; -1 = none.
            pages: `[B, p]` page ids; used: which of them the row has; rows with equal leading pages adjacent.
            cached: `[B]` int64, tokens in the cache. A page that is not full is copied before it is written to.
        """
        found = []
        for ids in (accounts, self._parents(accounts)):
            if (ids < 0).all():
                continue
            order = np.argsort(ids, kind="stable")
            order = order[ids[order] >= 0]
            mine = ids[order]
            first = np.r_[True, mine[1:] != mine[:-1]]
            same = (pages[order][1:] == pages[order][:-1]) & used[order][1:] & used[order][:-1]
            common = np.cumprod(same, axis=1).sum(axis=1)
            full = cached[order] // self._page_size
            shared = np.r_[0, np.minimum(common, np.minimum(full[1:], full[:-1]))] * self._page_size
            shared[first] = 0
            found.append(Shares(order, np.flatnonzero(first), mine[first], shared))
        return found

    def charge(
        self, shares: Sequence[Shares], cached: IntArray, q_lens: IntArray, wanted: np.ndarray, sampled: np.ndarray
    ) -> IntArray:
        """Charges a forward.

        Args:
            shares: of the batch.
            cached: `[B]` tokens in the cache before it; q_lens: `[B]` tokens computed, 0 where a row took no part.
            wanted, sampled: `[B]` bool, rows whose logits were computed, and from whose a token was sampled.

        Returns:
            accounts that are now over a limit, theirs or that of the account they belong to.
        """
        per_token, per_logits, per_pair = self._costs
        lens = np.where(q_lens > 0, cached + q_lens, 0).astype(np.int64)
        pairs = q_lens * cached + q_lens * (q_lens + 1) // 2
        flops = per_token * q_lens + per_logits * wanted + per_pair * pairs
        over = np.zeros(0, np.int64)
        for share in shares:
            rows = share.order
            own = np.maximum(lens[rows] - share.shared, 0)
            pages, own_pages = -(-lens[rows] // self._page_size), -(-own // self._page_size)
            weights = (
                q_lens[rows],
                sampled[rows],
                flops[rows],
                own * self.token_bytes,
                lens[rows] * self.token_bytes,
                q_lens[rows] > 0,
            )
            sums = np.add.reduceat(np.stack(weights).astype(np.int64), share.starts, axis=1)
            for name, total in zip(_SUMS, sums, strict=True):
                self._spent[name][share.accounts] += total
            self._spent["forwards"][share.accounts] += sums[-1] > 0
            for name, count in zip(_PEAKS, (own_pages, pages), strict=True):
                total = np.add.reduceat(count, share.starts)
                self._spent[name][share.accounts] = np.maximum(self._spent[name][share.accounts], total)
            over = np.union1d(over, self._expire(share.accounts))
        return over

    def charge_sampled(self, accounts: IntArray) -> IntArray:
        """A token has been sampled for each of `accounts` from logits that were there already; returns as `charge`."""
        over = np.zeros(0, np.int64)
        for ids in (accounts, self._parents(accounts)):
            np.add.at(self._spent["generated_tokens"], ids[ids >= 0], 1)
            over = np.union1d(over, self._expire(np.unique(ids[ids >= 0])))
        return over

    def members(self, accounts: IntArray, over: IntArray) -> np.ndarray:
        """Which of `accounts` are among `over` or belong to one that is."""
        return np.isin(accounts, over) | np.isin(self._parents(accounts), over)

    def _expire(self, accounts: IntArray) -> IntArray:
        """Marks those of `accounts` that are over a limit, and returns them."""
        limited = accounts[self._limited[accounts]]
        if len(limited):
            past = np.array([account in self._ended and self._ended[account]() for account in limited])
            for name in FIELDS:
                past |= self._spent[name][limited] >= self._limits[name][limited]
            self._over[limited] |= past
        return accounts[self._over[accounts]]

    def _parents(self, accounts: IntArray) -> IntArray:
        return np.where(accounts >= 0, self._parent[accounts], -1)

    def _grow(self) -> None:
        for group in (self._spent, self._limits, vars(self)):
            for name, array in list(group.items()):
                if isinstance(array, np.ndarray):
                    group[name] = np.concatenate([array, np.zeros_like(array)])
