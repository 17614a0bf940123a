"""Mixed precision: under autocast the ops take part like a matmul does."""

import torch
from torch import Tensor


def autocast_inputs(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype where autocast is on for their device, and unchanged elsewhere.

    float64 tensors stay as they are, as in a matmul under autocast.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
