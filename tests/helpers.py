"""What the tests share: small models and plans with ugly sizes."""

import numpy
import pytest
import timm
import torch
from packaging.version import Version
from timm.models.vision_transformer import VisionTransformer

from pm_models import CompressionPlan


def skip_without_kernels() -> None:
    """Skip the module where neither a GPU nor Triton's interpreter can run kernels."""
    triton = pytest.importorskip("triton")
    if not torch.cuda.is_available() and Version(triton.__version__) < Version("3.9"):
        # Triton's interpreter used to take int() of arrays of one element, which numpy 2.4 no longer does.
        if Version(numpy.__version__) >= Version("2.4"):
            pytest.skip("the interpreter of Triton 3.6 needs numpy below 2.4", allow_module_level=True)


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


def attention_written_out(q, k, v, merge=None, gate=None, key_bias=None, scale=None, merge_queries=True):
    """The contract, with the attention matrix in memory."""
    if merge is not None:
        q = torch.einsum("cn,bhnd->bhcd", merge, q) if merge_queries else q
        k = torch.einsum("cn,bhnd->bhcd", merge, k)
        v = torch.einsum("cn,bhnd->bhcd", merge, v)
    logits = torch.einsum("bhid,bhjd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if key_bias is not None:
        logits = logits + key_bias.expand(*k.shape[:-1])[:, :, None, :]
    weights = logits.exp() / logits.exp().sum(dim=-1, keepdim=True)
    if gate is not None:
        weights = weights * gate.expand(*k.shape[:-1])[:, :, None, :]
    return torch.einsum("bhij,bhjd->bhid", weights, v)


def packed_qkv(batch, heads, tokens, width, dtype=torch.float64):
    """Views of one packed projection, as a ViT makes them."""
    qkv = torch.randn(batch, tokens, 3, heads, width, dtype=dtype, requires_grad=True)
    return qkv.permute(2, 0, 3, 1, 4).unbind(0), qkv
