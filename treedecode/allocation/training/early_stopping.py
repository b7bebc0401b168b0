"""Early stopping."""

import copy
from collections.abc import Callable

import torch
from torch import nn


def fit_until_best(
    network: nn.Module, epoch: Callable[[], None], loss: Callable[[], float], *, max_epochs: int, patience: int
) -> float:
    """Runs epochs until `patience` of them have not been better; the network has the weights of the best afterwards.

    Args:
        epoch: one pass over what is fitted.
        loss: of the network as it is, on what is not.

    Returns:
        the best loss.
    """
    best, best_weights, since = float("inf"), copy.deepcopy(network.state_dict()), 0
    for _ in range(max_epochs):
        network.train()
        epoch()
        network.eval()
        with torch.inference_mode():
            now = loss()
        since += 1
        if now < best:
            best, best_weights, since = now, copy.deepcopy(network.state_dict()), 0
        elif since >= patience:
            break
    network.load_state_dict(best_weights)
    network.eval()
    return best
