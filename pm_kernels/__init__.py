"""Token-compressing attention and static token mixes for Vision Transformers: tensors in, tensors out."""

from . import reference
from .attention import fused_merge_attention, fused_merge_attention_qkv
from .mixing import token_mix, token_mix_layer_norm, transition
from .reference import ByColumn, SparseRows
from .runtime import backend

__all__ = [
    "ByColumn",
    "SparseRows",
    "backend",
    "fused_merge_attention",
    "fused_merge_attention_qkv",
    "reference",
    "token_mix",
    "token_mix_layer_norm",
    "transition",
]
