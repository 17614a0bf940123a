"""Ways to reduce the tokens: each runs a model's blocks, ``reduction(blocks, x, readout, rope) -> tokens``."""

from torch import nn

from ..compression import Compression
from .adaptive import AdaptiveReduction
from .static import StaticReduction

Reduction = StaticReduction | AdaptiveReduction


def make_reduction(compression: Compression, model: nn.Module) -> Reduction:
    """The module that carries out a model's compression, chosen by the kind of its plan."""
    rotary = (getattr(model, "rope", None), getattr(model, "rope_mixed", False))
    if compression.adaptive:
        return AdaptiveReduction(compression.plan, *rotary)
    return StaticReduction(compression, *rotary)
