"""Prune and Merge for timm's Vision Transformers: timm in, timm out."""

from .adapters import to_timm
from .adaptive_plan import AdaptivePlan
from .checkpoints import load_pretrained, save_pretrained
from .export import export_model
from .plan import CompressionPlan, StagePlan
from .published import load_authors_checkpoint, load_segmenter_checkpoint
from .registry import register_models
from .scoring import score_tokens
from .segmenter import Segmenter
from .serving import warmup
from .vision_transformer import PMEva, PMVisionTransformer, compress

__all__ = [
    "AdaptivePlan",
    "CompressionPlan",
    "PMEva",
    "PMVisionTransformer",
    "Segmenter",
    "StagePlan",
    "compress",
    "export_model",
    "load_authors_checkpoint",
    "load_pretrained",
    "load_segmenter_checkpoint",
    "save_pretrained",
    "score_tokens",
    "to_timm",
    "warmup",
]

register_models()
