"""Prune and Merge for timm's Vision Transformers: timm in, timm out."""

from .checkpoints import load_authors_checkpoint, load_pretrained, save_pretrained
from .plan import CompressionPlan, StagePlan
from .registry import register_models
from .scoring import score_tokens
from .vision_transformer import PMVisionTransformer, compress

__all__ = [
    "CompressionPlan",
    "PMVisionTransformer",
    "StagePlan",
    "compress",
    "load_authors_checkpoint",
    "load_pretrained",
    "save_pretrained",
    "score_tokens",
]

register_models()
