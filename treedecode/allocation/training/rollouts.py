"""Rollouts: chains and tree searches on training problems, with their outcomes."""

import json
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar

import numpy as np

from treedecode.allocation.chain_costs import kv_tokens
from treedecode.allocation.chains import Chain, chains_of
from treedecode.allocation.features import PromptFeatures, prompt_features
from treedecode.allocation.provenance import Provenance
from treedecode.decoding.decoder import Decoder
from treedecode.engine.sampling import Sampling
from treedecode.search.search import Outcome, Search
from treedecode.search.solve import solve
from treedecode.search.strategy import Strategy
from treedecode.tasks.base import Problem, Task
from treedecode.verify.scorers import scorer_of

TreeShape = tuple[int, int, int]  # depth, width, keep
TreeSearchFactory = Callable[[int, int, int], Strategy]  # depth, width, keep -> the tree search with these settings


@dataclass(frozen=True)
class Rollouts:
    """`n` problems with `c` chains and `m` tree searches each.

    Attributes:
        ids, groups: `[n]` str; a problem without a group has "".
        prompt_tokens, prompt_entropy: `[n]` features of the prompt.
        hidden: `[n, hidden_size]` float32, of the prompt.
        classes: `[n, c + m]` int64, equal for equal answers of a problem, -1 = no answer; chains first.
        scores: `[n, c + m]` float64 of the verifier; nan without one.
        tokens: `[n, c]` int64, generated.
        logprobs, worst_logprobs: `[n, c]`, as in `Chain`.
        right: `[n, c + m]` bool, by the task.
        tree_tokens, tree_kv_bytes: `[n, m]` float64 costs of the searches, in units of the cost of a single chain.
        menu: `[m, 3]` int64, (depth, width, keep) of the searches.
        provenance: of the run that they are from.
    """

    ids: np.ndarray
    groups: np.ndarray
    prompt_tokens: np.ndarray
    prompt_entropy: np.ndarray
    hidden: np.ndarray
    classes: np.ndarray
    scores: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray
    worst_logprobs: np.ndarray
    right: np.ndarray
    tree_tokens: np.ndarray
    tree_kv_bytes: np.ndarray
    menu: np.ndarray
    provenance: Provenance

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_chains(self) -> int:
        """Chains per problem."""
        return self.tokens.shape[1]

    @property
    def has_scores(self) -> bool:
        """True if there was a verifier."""
        return self.provenance.verifier != ""

    def rows(self, problems: np.ndarray) -> "Rollouts":
        """Returns the rollouts of the problems with given indices."""
        return replace(self, **{name: getattr(self, name)[problems] for name in _ARRAYS if name != "menu"})

    def without_hidden(self) -> "Rollouts":
        """Returns the rollouts for a gate that reads no hidden states."""
        return replace(self, hidden=self.hidden[:, :0])

    def prompt(self, problem: int) -> PromptFeatures:
        """Returns the features of a problem's prompt."""
        num_tokens, entropy = int(self.prompt_tokens[problem]), float(self.prompt_entropy[problem])
        return PromptFeatures(num_tokens, entropy, self.hidden[problem])

    def chains(self, problem: int) -> list[Chain]:
        """Returns the chains of a problem, without their texts."""
        return [
            Chain(
                text="",
                answer=None,
                score=float(self.scores[problem, i]) if self.has_scores else None,
                num_tokens=int(self.tokens[problem, i]),
                logprob=float(self.logprobs[problem, i]),
                worst_logprob=float(self.worst_logprobs[problem, i]),
            )
            for i in range(self.num_chains)
        ]

    def corrects(self, problem: int, chosen: int) -> np.ndarray:
        """Tells which chains and trees give the right answer, and are taken in place of the chosen chain.

        Without a verifier a right answer counts as taken, because the number of votes it will need is not known.

        Returns:
            `[c + m]` bool.
        """
        if not self.has_scores:
            return self.right[problem]
        scores = self.scores[problem]
        taken = (scores > scores[chosen]) | (self.classes[problem, chosen] < 0)
        return self.right[problem] & taken & (self.classes[problem] >= 0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an npz file."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        np.savez_compressed(path, **arrays, origin=np.array(json.dumps(asdict(self.provenance))))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Rollouts":
        """Loads the rollouts that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds something else.
        """
        if not zipfile.is_zipfile(path):
            if not os.path.isfile(path):
                raise FileNotFoundError(f"path: no file {os.fspath(path)}")
            raise ValueError(f"path: {os.fspath(path)} is no npz file")
        with np.load(path, allow_pickle=False) as arrays:
            missing = {*_ARRAYS, "origin"} - set(arrays)
            if missing:
                raise ValueError(f"path: {os.fspath(path)} holds no rollouts: {sorted(missing)} are missing")
            provenance = Provenance(**json.loads(arrays["origin"].item()))
            return cls(**{name: arrays[name] for name in _ARRAYS}, provenance=provenance)


_ARRAYS = tuple(attribute.name for attribute in fields(Rollouts) if attribute.name != "provenance")


@dataclass(frozen=True)
class Collect(Strategy):
    """Samples the chains and tree searches that a gate is trained on; its answer is that of the first chain.

    Args:
        num_chains: of every problem.
        menu: shapes of the tree searches.
        wants_hidden: whether the prompt's hidden state is kept.
        tree_searches: one for each shape of the menu.
    """

    name: ClassVar[str] = "gate_rollouts"

    num_chains: int
    menu: tuple[TreeShape, ...] = ()
    wants_hidden: bool = True
    tree_searches: tuple[Strategy, ...] = field(default=(), repr=False)  # journals know them by their shapes

    @property
    def num_branches(self) -> int:
        return max([self.num_chains, *(tree.num_branches for tree in self.tree_searches)])

    async def solve(self, search: Search) -> Outcome:
        with await search.root() as root:
            [prompt] = await prompt_features(root, wants_hidden=self.wants_hidden)
            with root.spread(self.num_chains) as frontier:
                await search.complete(frontier)
                chains = await chains_of(search, frontier)
        outcomes = [chain.outcome for chain in chains]
        costs = []
        for tree in self.tree_searches:
            before = search.spending
            outcomes.append(await tree.solve(search))
            costs.append(
                [getattr(search.spending, name) - getattr(before, name) for name in ("generated_tokens", "kv_bytes")]
            )
        search.notes.update(
            prompt={**asdict(prompt), "hidden": prompt.hidden.tolist()},
            chains=[asdict(replace(chain, text="")) for chain in chains],
            classes=search.classes([outcome.answer for outcome in outcomes]).tolist(),
            scores=[outcome.score for outcome in outcomes],
            right=[search.task.verify(search.problem, outcome.text) for outcome in outcomes],
            costs=costs,
        )
        return outcomes[0]


def collect(
    decoder: Decoder,
    problems: Iterable[Problem],
    *,
    task: Task,
    num_chains: int,
    tree_search: TreeSearchFactory,
    verifier: Any = None,
    menu: Sequence[TreeShape] = (),
    sampling: Sampling | None = None,
    seed: int = 0,
    journal: str | None = None,
    **settings: Any,
) -> Rollouts:
    """Runs chains and tree searches on problems, and keeps what a gate is trained on.

    Args:
        tree_search: makes the tree searches of the menu.
        menu: shapes of tree searches, which need a verifier.
        journal: goes on with an earlier call's, as `solve` does.
        settings: further arguments of `solve`.

    Raises:
        ValueError: the menu has a tree search that there cannot be, or there is no verifier for it.
    """
    searches = tree_searches_of(menu, tree_search, verifier)
    strategy = Collect(num_chains, tuple(menu), decoder.model.hidden_size > 0, tuple(searches))
    result = solve(
        decoder,
        problems,
        strategy=strategy,
        task=task,
        verifier=verifier,
        sampling=sampling,
        seed=seed,
        journal=journal,
        grade=False,
        **settings,
    )
    notes = [solution.notes for solution in result.solutions]
    prompts = [note["prompt"] for note in notes]
    tokens = _column(notes, "num_tokens")
    prompt_tokens = np.array([prompt["num_tokens"] for prompt in prompts])
    chain_bytes = decoder.meter.token_bytes * kv_tokens(prompt_tokens[:, None], tokens)
    costs = np.array([note["costs"] for note in notes], np.float64).reshape(len(notes), len(menu), 2)
    return Rollouts(
        ids=np.array([solution.problem.id for solution in result.solutions]),
        groups=np.array([solution.problem.group or "" for solution in result.solutions]),
        prompt_tokens=prompt_tokens,
        prompt_entropy=np.array([prompt["entropy"] for prompt in prompts]),
        hidden=np.array([prompt["hidden"] for prompt in prompts], np.float32),
        classes=np.array([note["classes"] for note in notes], np.int64),
        scores=np.array([note["scores"] for note in notes], np.float64),
        tokens=tokens,
        logprobs=_column(notes, "logprob"),
        worst_logprobs=_column(notes, "worst_logprob"),
        right=np.array([note["right"] for note in notes], bool),
        tree_tokens=costs[:, :, 0] / tokens.mean(axis=1, keepdims=True),
        tree_kv_bytes=costs[:, :, 1] / chain_bytes.mean(axis=1, keepdims=True),
        menu=np.array(menu, np.int64).reshape(-1, 3),
        provenance=Provenance.of(decoder, task, scorer_of(verifier)),
    )


def tree_searches_of(menu: Sequence[TreeShape], tree_search: TreeSearchFactory, verifier: Any) -> list[Strategy]:
    """Makes the tree searches of a menu.

    Raises:
        ValueError: they have no verifier, or there can be no search of such a shape.
    """
    if menu and verifier is None:
        raise ValueError("menu: tree searches score branches and need a verifier")
    searches = []
    for shape in menu:
        try:
            searches.append(tree_search(*shape))
        except ValueError as error:
            raise ValueError(f"menu: {shape}: {error}") from None
    return searches


def _column(notes: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    """Returns a field of the chains, `[n, c]`."""
    return np.array([[chain[name] for chain in note["chains"]] for note in notes])
