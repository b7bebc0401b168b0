"""Fits a network until its loss on other data stops falling."""

import copy
from collections.abc import Callable

import torch
from torch import nn


def fit_until_best(
    network: nn.Module, epoch: Callable[[], None], loss: Callable[[], float], *, max_epochs: int, patience: int
) -> float:
    """Runs epochs until the loss has not fallen for `patience` of them, and restores the best weights.

    Args:
        epoch: one pass over the data that the network is fitted to.
        loss: the network's present loss on other data.

    Returns:
        the best loss.
    """
    best_loss, best_weights, num_worse = float("inf"), copy.deepcopy(network.state_dict()), 0
    for _ in range(max_epochs):
        network.train()
        epoch()
        network.eval()
        with torch.inference_mode():
            current_loss = loss()
        num_worse += 1
        if current_loss < best_loss:
            best_loss, best_weights, num_worse = current_loss, copy.deepcopy(network.state_dict()), 0
        elif num_worse >= patience:
            break
    network.load_state_dict(best_weights)
    network.eval()
    return best_loss
