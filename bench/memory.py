"""Activation memory of a training step: what the forward leaves for the backward."""

import torch
from torch import Tensor, nn


def activation_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes that are kept, or on a GPU the most that are in use at once, above parameters, gradients and buffers.

    On a CPU it is what autograd saves in the forward, each memory once; on a GPU what the allocator counts through
    forward and backward.
    """
    if images.is_cuda:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for _ in range(2):  # what the first step alone takes, compilation and workspaces, is not counted
            gradients = None
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            gradients = torch.autograd.grad(model(images).float().square().mean(), parameters, allow_unused=True)
            torch.cuda.synchronize()
        own = sum(gradient.nbytes for gradient in gradients if gradient is not None)
        return torch.cuda.max_memory_allocated() - before - own
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(images).float().square().mean()
    del loss
    return sum(size for size, _ in kept.values())
