"""The models that a benchmark compares: the same weights dense, compressed in both executions, and ideal."""

import copy

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pm_models import CompressionPlan, compress

KEEP_RATE, PRUNE_RATE = 0.6, 0.1


class FirstTokens(nn.Module):
    """Lets the first tokens pass: a plain ViT with fewer tokens, which is as fast as compression can get."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : self.tokens].contiguous()


def compared_models(name: str) -> dict[str, VisionTransformer]:
    """``dense_eager``, ``folded``, ``literal`` and ``ideal``, in evaluation mode, on random scores.

    ``ideal`` is the dense model on its first C tokens, with C the mean of the compressed model's tokens per block.
    """
    torch.manual_seed(0)
    dense = timm.create_model(name).eval()
    grid = tuple(dense.patch_embed.grid_size)
    scores = torch.rand(len(dense.blocks), grid[0] * grid[1])
    plan = CompressionPlan.from_scores(scores, grid, KEEP_RATE, PRUNE_RATE, num_prefix_tokens=dense.num_prefix_tokens)
    folded, literal = compress(dense, plan), compress(dense, plan)
    literal.execution = "literal"
    ideal = copy.deepcopy(dense)
    ideal.patch_drop = FirstTokens(round(sum(plan.tokens) / plan.depth))
    return {"dense_eager": dense, "folded": folded, "literal": literal, "ideal": ideal}
