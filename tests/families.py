"""Model families people use, small, with random weights, by the names of docs/families.md."""

import pytest
import torch
from helpers import small_vit
from torchvision.models import VisionTransformer as TorchvisionTransformer

from pm_models import to_timm


def torchvision_vit():
    return to_timm(randomised(TorchvisionTransformer(20, 4, 3, 2, 32, 96, num_classes=7)))


def transformers_model(name, **options):
    transformers = pytest.importorskip("transformers")
    config = {"Dinov2WithRegisters": "Dinov2WithRegistersConfig", "Dinov2": "Dinov2Config", "ViT": "ViTConfig"}
    kind = next(kind for kind in config if name.startswith(kind))
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 20, "patch_size": 4}
    torch.manual_seed(0)
    return randomised(getattr(transformers, name)(getattr(transformers, config[kind])(**sizes | options)))


def randomised(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# By its name there: what makes one, small, in timm's class.
FAMILIES = {
    "DeiT": lambda: small_vit("deit_small_patch16_224", depth=2),
    "DeiT, distilled": lambda: small_vit("deit_small_distilled_patch16_224", depth=2),
    "DeiT III": lambda: small_vit("deit3_small_patch16_224", depth=2),
    "AugReg": lambda: small_vit("vit_small_patch16_224", depth=2),
    "MAE": lambda: small_vit("vit_base_patch16_224.mae", depth=2, global_pool="avg"),
    "CLIP's vision tower": lambda: small_vit("vit_base_patch16_clip_224", depth=2),
    "SigLIP's vision tower": lambda: small_vit("vit_base_patch16_siglip_224", depth=2),
    "DINOv2 with registers": lambda: small_vit("vit_small_patch14_reg4_dinov2", depth=2),
    "EVA-02": lambda: small_vit("eva02_small_patch14_224", depth=2),
    "DINOv3": lambda: small_vit("vit_small_patch16_dinov3", depth=2),
    "RoPE-ViT, learned": lambda: small_vit("vit_small_patch16_rope_mixed_224", depth=2),
    "Perception Encoder": lambda: small_vit("vit_pe_core_tiny_patch16_384", depth=2),
    "torchvision's VisionTransformer": torchvision_vit,
    "Hugging Face's ViT": lambda: to_timm(transformers_model("ViTForImageClassification", num_labels=7)),
    "Hugging Face's DINOv2": lambda: to_timm(transformers_model("Dinov2WithRegistersModel")),
}
