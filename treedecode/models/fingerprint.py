"""Fingerprint: whether a model's weights are those of another process."""

import hashlib

import torch
from torch import nn

_PICKED = 64  # entries of a tensor


@torch.no_grad()
def fingerprint(module: nn.Module) -> str:
    """A hash of the names, shapes and types of all parameters and buffers, and of entries spread evenly over each.

    Weights that were trained on, or had an adapter merged, differ in almost all entries, so a few of each tensor tell.
    It takes milliseconds, where all of an 8B model's would take seconds. A change of single entries can go unnoticed.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        if tensor.is_meta or tensor.numel() == 0:
            continue
        at = torch.linspace(0, tensor.numel() - 1, min(_PICKED, tensor.numel()), dtype=torch.float64).long()
        places = torch.unravel_index(at.to(tensor.device), tensor.shape)
        digest.update(tensor[places].double().numpy(force=True).tobytes())
    return digest.hexdigest()
