"""Prune and Merge for timm's Vision Transformers: timm in, timm out."""

from .plan import CompressionPlan, StagePlan
from .scoring import score_tokens
from .vision_transformer import PMVisionTransformer, compress

__all__ = ["CompressionPlan", "PMVisionTransformer", "StagePlan", "compress", "score_tokens"]
