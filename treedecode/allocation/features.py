"""Features that the gate reads of a problem: of its prompt, and of its chains so far."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from treedecode.allocation.chains import Chain, selected
from treedecode.decoding.frontier import Frontier

# A gate is for one version of the features. Names are in the order of the vector.
FEATURE_VERSION = 1
FEATURE_NAMES = (
    "log_prompt_tokens",
    "prompt_entropy",  # of the next token after the prompt, nats
    "log_chains",
    "share_answered",  # chains that came to an answer
    "share_majority",  # chains in the largest class of equal answers
    "share_classes",  # classes per chain
    "mean_logprob",  # mean over chains of a chain's mean log-probability
    "best_logprob",  # the highest of them
    "mean_worst_logprob",  # mean over chains of a chain's worst window
    "best_worst_logprob",
    "log_tokens",  # mean length of the chains
    "selected_share",  # chains in the class of the selected answer
    "selected_logprob",
    "selected_worst_logprob",
    "best_score",  # of the verifier, among chains with an answer; all scores are 0 without one
    "mean_score",
    "other_score",  # the best one of a class other than the selected
)


@dataclass(frozen=True)
class PromptFeatures:
    """Features of a prompt, known before anything is generated.

    Attributes:
        num_tokens: of the prompt.
        entropy: of the next token after it, nats.
        hidden: `[hidden_size]` float32, the final hidden state at its last token; `[0]` where it is not used.
    """

    num_tokens: int
    entropy: float
    hidden: np.ndarray


async def prompt_features(root: Frontier, *, wants_hidden: bool) -> list[PromptFeatures]:
    """Reads the features of prompts from their roots, which computes the last token again for logits and hidden state.

    Args:
        root: branches that hold the prompts alone.
    """
    logits = await root.logits()
    logprobs = torch.log_softmax(logits.double(), dim=-1)
    # a masked token has probability 0 and log-probability -inf
    entropies = -torch.where(logprobs > -torch.inf, logprobs.exp() * logprobs, 0.0).sum(dim=-1)
    hidden = np.zeros((len(root), 0), np.float32)
    if wants_hidden:
        hidden = (await root.hidden()).float().numpy(force=True)
    prompts = zip(root.num_tokens.tolist(), entropies.tolist(), hidden, strict=True)
    return [PromptFeatures(*prompt) for prompt in prompts]


def feature_vector(prompt: PromptFeatures, chains: Sequence[Chain], classes: np.ndarray) -> np.ndarray:
    """Computes the features of a problem after at least one chain.

    Args:
        classes: `[n]`, equal for equal answers, -1 = no answer.

    Returns:
        `[len(FEATURE_NAMES) + hidden_size]` float32.
    """
    n = len(chains)
    answered = classes >= 0
    counts = np.bincount(classes[answered], minlength=1)
    logprobs = np.array([chain.logprob for chain in chains])
    worst = np.array([chain.worst_logprob for chain in chains])
    best = selected(chains, classes)
    same = (classes == classes[best]) & answered
    scores = np.array([0.0 if chain.score is None else chain.score for chain in chains])
    others = scores[answered & ~same]
    values = {
        "log_prompt_tokens": np.log(prompt.num_tokens),
        "prompt_entropy": prompt.entropy,
        "log_chains": np.log(n),
        "share_answered": answered.mean(),
        "share_majority": counts.max() / n,
        "share_classes": len(np.unique(classes[answered])) / n,
        "mean_logprob": logprobs.mean(),
        "best_logprob": logprobs.max(),
        "mean_worst_logprob": worst.mean(),
        "best_worst_logprob": worst.max(),
        "log_tokens": np.log1p(np.mean([chain.num_tokens for chain in chains])),
        "selected_share": same.mean(),
        "selected_logprob": logprobs[best],
        "selected_worst_logprob": worst[best],
        "best_score": scores[best],
        "mean_score": scores.mean(),
        "other_score": others.max() if len(others) else scores.min(),
    }
    return np.concatenate([[values[name] for name in FEATURE_NAMES], prompt.hidden]).astype(np.float32)
