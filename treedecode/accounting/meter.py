"""Meter: counts the work of each forward, and charges it to the accounts of its branches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from treedecode.common.arrays import IntArray

if TYPE_CHECKING:  # importing it imports torch
    from treedecode.models.adapter import ModelAdapter

_NO_LIMIT = np.inf


class BudgetExhausted(Exception):
    """An account has spent what it may; its branches keep the tokens they have."""


@dataclass(frozen=True)
class Spending:
    """The work that an account has paid for.

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
        """Adds counts; a peak is of one forward, so the higher one stays."""
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in FIELDS)
        return Spending(**{name: max(a, b) if name in _PEAKS else a + b for name, a, b in pairs})


FIELDS = tuple(field.name for field in fields(Spending))
_SUMS = ("computed_tokens", "generated_tokens", "flops", "kv_bytes", "kv_bytes_copied", "branch_forwards")
_PEAKS = ("peak_pages", "peak_pages_copied")


@dataclass(frozen=True)
class AccountRows:
    """The rows of a batch grouped by account, each account's in depth-first order, with what neighbours share."""

    order: IntArray  # [n] indices into the batch's rows, of those that have an account
    starts: IntArray  # [accounts] index in `order` where each account's rows begin
    accounts: IntArray  # [accounts] int64
    pages: IntArray  # [n, p] full pages of the ordered rows; other entries are negative and differ between rows

    @classmethod
    def of(cls, order: IntArray, ids: IntArray, pages: IntArray) -> "AccountRows":
        """Makes the groups of rows `order` (`[n]`), whose accounts are `ids` (`[n]`, equal ones adjacent)."""
        starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]][: len(ids)])
        return cls(order, starts, ids[starts], pages)

    def among(self, active: np.ndarray) -> "AccountRows":
        """Returns the groups without the rows that are not `active` (`[B]` bool)."""
        keep = active[self.order]
        if keep.all():
            return self
        ids = np.repeat(self.accounts, np.diff(np.r_[self.starts, len(self.order)]))
        return AccountRows.of(self.order[keep], ids[keep], self.pages[keep])

    def num_shared(self) -> IntArray:
        """Counts the full pages that each row has in common with the one before of its account, `[n]`."""
        shared = np.r_[0, np.cumprod(self.pages[1:] == self.pages[:-1], axis=1).sum(axis=1)]
        shared[self.starts] = 0
        return shared


class Meter:
    """Keeps accounts, by number. An account may have a parent, to which everything is charged too.

    Not thread-safe: the decoder's lock guards it.

    Attributes:
        token_bytes: bytes of one token's keys and values, all layers.
    """

    def __init__(self, model: "ModelAdapter", page_size: int) -> None:
        self._page_size = page_size
        self.token_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * model.dtype.itemsize
        self._flops_per_token = model.flops_per_token
        self._flops_per_logits = model.flops_per_logits
        # of a query and a key: two products over head_dim
        self._flops_per_pair = 4 * model.num_layers * model.num_qo_heads * model.head_dim
        self._spent = {name: np.zeros(8, np.int64) for name in FIELDS}
        self._limits = {name: np.full(8, _NO_LIMIT) for name in FIELDS}
        self._over = np.zeros(8, bool)
        self._parent = np.full(8, -1, np.int64)
        self._limited = np.zeros(8, bool)
        self._used = 0
        self._free: list[int] = []
        self._is_expired: dict[int, Callable[[], bool]] = {}

    def open(self, parent: int = -1, *, is_expired: Callable[[], bool] | None = None, **limits: float) -> int:
        """Opens an account.

        Args:
            parent: the account that pays too; -1 = none. A parent has none itself.
            is_expired: asked after every forward; True puts the account over its limits, whatever it has spent.
            limits: by the name of a `Spending` field.

        Returns:
            the account's number.
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
        self._limited[account] = bool(limits) or is_expired is not None
        if is_expired is not None:
            self._is_expired[account] = is_expired
        return account

    def close(self, account: int) -> Spending:
        """Closes an account that no branch has any more, and returns what it has spent."""
        spending = self.spending(account)
        self._free.append(account)
        self._is_expired.pop(account, None)
        return spending

    def spending(self, account: int) -> Spending:
        """Returns what an account has spent so far."""
        return Spending(**{name: int(self._spent[name][account]) for name in FIELDS})

    def charge_prompt(self, account: int, num_tokens: int) -> None:
        """Charges prompts of `num_tokens` tokens in all."""
        for payer in {account, int(self._parent[account])} - {-1}:
            self._spent["prompt_tokens"][payer] += num_tokens

    def add(self, account: int, spending: Spending) -> None:
        """Charges work that was done before the account was opened."""
        for name in FIELDS:
            self._spent[name][account] += getattr(spending, name)

    def is_over(self, account: int) -> bool:
        """Returns whether an account, or its parent, has spent what it may."""
        if account < 0:
            return False
        parent = int(self._parent[account])
        self._mark_over(np.array([account] if parent < 0 else [account, parent]))
        return bool(self._over[account] or (parent >= 0 and self._over[parent]))

    def group_rows(self, accounts: IntArray, pages: IntArray, used: np.ndarray, cached: IntArray) -> list[AccountRows]:
        """Groups the rows of a batch by account, and once more by parent, and counts the pages that they share.

        Args:
            accounts: `[B]` int64; -1 = none.
            pages: `[B, p]` page ids.
            used: `[B, p]` bool, the entries of `pages` that the row has.
            cached: `[B]` int64, tokens in the cache. A page that is not full is copied before it is written to.

        Returns:
            one grouping, two where accounts have parents, none without accounts.
        """
        is_full = used & (np.arange(pages.shape[1]) < (cached // self._page_size)[:, None])
        full = np.where(is_full, pages, -1 - np.arange(len(pages))[:, None])
        groupings = []
        for ids in (accounts, self._parents(accounts)):
            if (ids < 0).all():
                continue
            order = np.lexsort([*full.T[::-1], ids])
            order = order[ids[order] >= 0]
            groupings.append(AccountRows.of(order, ids[order], full[order]))
        return groupings

    def charge(
        self,
        groupings: Sequence[AccountRows],
        cached: IntArray,
        q_lens: IntArray,
        wanted: np.ndarray,
        sampled: np.ndarray,
    ) -> IntArray:
        """Charges a forward.

        Args:
            groupings: of the batch, from `group_rows`.
            cached: `[B]` tokens in the cache before the forward.
            q_lens: `[B]` tokens computed, 0 where a row took no part.
            wanted: `[B]` bool, rows whose logits were computed.
            sampled: `[B]` bool, rows from whose logits a token was sampled.

        Returns:
            the accounts, parents among them, that are over a limit now.
        """
        lens = np.where(q_lens > 0, cached + q_lens, 0).astype(np.int64)
        pairs = q_lens * cached + q_lens * (q_lens + 1) // 2
        flops = self._flops_per_token * q_lens + self._flops_per_logits * wanted + self._flops_per_pair * pairs
        over = np.zeros(0, np.int64)
        for grouping in groupings:
            # A row that took no part reads nothing, so the next one shares with the one before it.
            group = grouping.among(q_lens > 0)
            if len(group.order) == 0:
                continue
            rows = group.order
            own = lens[rows] - group.num_shared() * self._page_size
            pages, own_pages = -(-lens[rows] // self._page_size), -(-own // self._page_size)
            counts = (
                q_lens[rows],
                sampled[rows],
                flops[rows],
                own * self.token_bytes,
                lens[rows] * self.token_bytes,
                q_lens[rows] > 0,
            )
            sums = np.add.reduceat(np.stack(counts).astype(np.int64), group.starts, axis=1)
            for name, total in zip(_SUMS, sums, strict=True):
                self._spent[name][group.accounts] += total
            self._spent["forwards"][group.accounts] += sums[-1] > 0
            for name, count in zip(_PEAKS, (own_pages, pages), strict=True):
                total = np.add.reduceat(count, group.starts)
                self._spent[name][group.accounts] = np.maximum(self._spent[name][group.accounts], total)
            over = np.union1d(over, self._mark_over(group.accounts))
        return over

    def charge_sampled(self, accounts: IntArray) -> IntArray:
        """Charges a token for each of `accounts`, sampled from logits that an earlier forward left.

        Returns:
            the accounts, parents among them, that are over a limit now.
        """
        over = np.zeros(0, np.int64)
        for ids in (accounts, self._parents(accounts)):
            np.add.at(self._spent["generated_tokens"], ids[ids >= 0], 1)
            over = np.union1d(over, self._mark_over(np.unique(ids[ids >= 0])))
        return over

    def members(self, accounts: IntArray, over: IntArray) -> np.ndarray:
        """Marks those of `accounts` that are among `over`, or whose parent is: a bool array."""
        return np.isin(accounts, over) | np.isin(self._parents(accounts), over)

    def _mark_over(self, accounts: IntArray) -> IntArray:
        """Marks those of `accounts` that are over a limit, and returns them."""
        limited = accounts[self._limited[accounts]]
        if len(limited):
            past = np.array([account in self._is_expired and self._is_expired[account]() for account in limited])
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
