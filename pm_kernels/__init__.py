"""Token-compressing attention, token mixes and token matching for Vision Transformers: tensors in, tensors out."""

from . import reference
from .attention import fused_merge_attention, fused_merge_attention_qkv
from .matching import match, match_tokens, merge_segments
from .mixing import token_mix, token_mix_layer_norm, transition
from .reference import ByColumn, Matching, SparseRows
from .runtime import backend

__all__ = [
    "ByColumn",
    "Matching",
    "SparseRows",
    "backend",
    "fused_merge_attention",
    "fused_merge_attention_qkv",
    "match",
    "match_tokens",
    "merge_segments",
    "reference",
    "token_mix",
    "token_mix_layer_norm",
    "transition",
]
