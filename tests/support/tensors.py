"""Makes small tensors."""

import torch


def int32(*values):
    """Makes a vector of int32."""
    return torch.tensor(values, dtype=torch.int32)
