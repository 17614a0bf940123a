"""Ways to fewer tokens: each runs a model's blocks on them, ``reduction(blocks, x, readout, rope) -> tokens``."""

from torch import nn

from ..compression import Compression
from .adaptive import AdaptiveReduction
from .static import StaticReduction

Reduction = StaticReduction | AdaptiveReduction


def make_reduction(compression: Compression, model: nn.Module) -> Reduction:
    """What carries out the compression of a model, by the kind of its plan."""
    rotary = (getattr(model, "rope", None), getattr(model, "rope_mixed", False))
    if compression.adaptive:
        return AdaptiveReduction(compression.plan, *rotary)
    return StaticReduction(compression, *rotary)
