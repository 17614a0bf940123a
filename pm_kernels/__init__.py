"""Token-compressing attention and static token mixes for Vision Transformers: tensors in, tensors out."""

from . import reference
from .attention import fused_merge_attention, fused_merge_attention_qkv
from .backend import backend
from .sparse import BlockRows, ByColumn, SparseRows
from .token_mix import token_mix, token_mix_layer_norm, transition

__all__ = [
    "BlockRows",
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
