"""What the tests share: small models and plans with ugly sizes."""

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from pm_models import CompressionPlan


def small_vit(name: str = "vit_tiny_patch16_224", **arguments) -> VisionTransformer:
    """A ViT of width 32 with a 7 x 5 grid of patches, random biases and norms, in evaluation mode."""
    arguments = {
        "img_size": (28, 20),
        "patch_size": 4,
        "embed_dim": 32,
        "depth": 5,
        "num_heads": 2,
        "num_classes": 7,
    } | arguments
    model = timm.create_model(name, **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def plan_for(model: VisionTransformer, keep_rate: float = 0.4, prune_rate: float = 0.3, **arguments) -> CompressionPlan:
    """A plan from random scores for the model's grid."""
    grid = tuple(model.patch_embed.grid_size)
    scores = torch.rand(len(model.blocks), grid[0] * grid[1])
    return CompressionPlan.from_scores(
        scores, grid, keep_rate, prune_rate, num_prefix_tokens=model.num_prefix_tokens, **arguments
    )


def images_for(model: VisionTransformer, batch: int = 3) -> torch.Tensor:
    weight = model.patch_embed.proj.weight
    return torch.randn(batch, model.in_chans, *model.patch_embed.img_size, dtype=weight.dtype)
