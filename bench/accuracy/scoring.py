"""Scores that need no gradient, to see what gradient-weighted ones are worth."""

from collections.abc import Iterable
from itertools import islice

import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

# The fractions of the plane's low-discrepancy sequence: powers of 1 over the root of x^3 = x + 1.
_ROW, _COLUMN = 0.7548776662466927, 0.5698402909980532


@torch.inference_mode()
def attention_received(model: VisionTransformer, loader: Iterable[tuple[Tensor, Tensor]], batches: int) -> Tensor:
    """How much attention each patch gets, the mean over images, heads and queries: (L, patches)."""
    device, totals = model.pos_embed.device, [0.0] * len(model.blocks)

    def count(layer: int, attention: Attention, x: Tensor) -> None:
        qkv = attention.qkv(x).unflatten(2, (3, attention.num_heads, attention.head_dim))
        q, k, _ = qkv.permute(2, 0, 3, 1, 4).float().unbind(0)
        received = (q @ k.mT * attention.scale).softmax(dim=-1).mean(dim=(0, 1, 2))
        totals[layer] += received[model.num_prefix_tokens :]

    hooks = [
        block.attn.register_forward_pre_hook(lambda attention, inputs, layer=layer: count(layer, attention, inputs[0]))
        for layer, block in enumerate(model.blocks)
    ]
    try:
        for images, _ in islice(loader, batches):
            model(images.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(totals).cpu() / batches


def evenly_spread(depth: int, grid: tuple[int, int]) -> Tensor:
    """Scores whose highest ones are spread evenly over the grid, however many they are: (L, patches)."""
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in grid)
    scores = (0.5 + _ROW * rows[:, None] + _COLUMN * columns) % 1
    return scores.flatten().float().expand(depth, -1).clone()
