"""Fingerprints of weights, which tell whether two processes have the same model."""

import hashlib
from itertools import chain

import torch
from torch import Tensor, nn

_NUM_SAMPLES = 64  # entries of a tensor that are looked at


@torch.no_grad()
def fingerprint(module: nn.Module) -> str:
    """Hashes the names, shapes and types of all parameters and buffers, and of entries spread evenly over each.

    Weights that were trained on, or had an adapter merged, differ in almost all entries, so a few of each tensor tell.
    It takes milliseconds, where all of an 8B model's would take seconds. A change of single entries can go unnoticed,
    and tensors that are no plain arrays (sparse, quantised by torch, on no device) count by name, shape and type alone.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        values = tensor.data
        digest.update(f"{name} {list(values.shape)} {values.dtype}".encode())
        is_plain = type(values) is Tensor and values.layout == torch.strided and not values.is_quantized
        if not is_plain or values.is_meta or values.numel() == 0:
            continue
        indices = torch.linspace(0, values.numel() - 1, min(_NUM_SAMPLES, values.numel()), dtype=torch.float64).long()
        samples = values[torch.unravel_index(indices.to(values.device), values.shape)]
        samples = torch.view_as_real(samples) if samples.is_complex() else samples
        digest.update(samples.double().numpy(force=True).tobytes())
    return digest.hexdigest()
