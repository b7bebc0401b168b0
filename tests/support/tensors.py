"""Small tensors."""

import torch


def int32(*values):
    """A vector of int32."""
    return torch.tensor(values, dtype=torch.int32)
