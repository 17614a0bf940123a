"""timm's blocks taken apart, where nothing that hangs on them is passed by: ``x + f(norm1(x))``, then ``x + g(x)``."""

from collections.abc import Callable

from timm.layers import LayerNorm
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..attention import FusedAttention
from ..modules import is_touched


def branches(block: nn.Module) -> tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]] | None:
    """What timm's Block or EvaBlock adds to its tokens: first ``f(norm1(x), **given)``, then ``g(x)``.

    ``given`` goes to the attention. ``None`` is a block that has to run whole: one of another class, or touched.
    """
    if type(block) not in (Block, EvaBlock) or is_touched(block):
        return None
    scales = (block.ls1, block.ls2) if type(block) is Block else (block.gamma_1, block.gamma_2)

    def scaled(branch: Tensor, scale: nn.Module | Tensor | None) -> Tensor:
        if scale is None:
            return branch
        return scale * branch if isinstance(scale, Tensor) else scale(branch)

    def attend(normed: Tensor, **given: object) -> Tensor:
        given = {"attn_mask": None, "is_causal": False} | given
        return block.drop_path1(scaled(block.attn(normed, **given), scales[0]))

    def feed(x: Tensor) -> Tensor:
        return block.drop_path2(scaled(block.mlp(block.norm2(x)), scales[1]))

    return attend, feed


def opening_norm(block: nn.Module) -> tuple[Tensor, Tensor, float] | None:
    """Weight, bias and epsilon of the LayerNorm that the block begins with, where it can be computed elsewhere."""
    if type(block) not in (Block, EvaBlock) or is_touched(block):
        return None
    norm = block.norm1
    if type(norm) not in (nn.LayerNorm, LayerNorm) or is_touched(norm) or len(norm.normalized_shape) != 1:
        return None
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    return (weight, bias, norm.eps) if _is_plain(weight) and _is_plain(bias) else None


def attends_apart(block: nn.Module) -> bool:
    """Whether :func:`run_block` can compute some rows of the block: nothing in it would see that there are fewer."""
    return (
        branches(block) is not None
        and isinstance(block.attn, FusedAttention)
        and block.attn.takes_rows
        and not any(
            is_touched(module) or not all(map(_is_plain, module.parameters(recurse=False)))
            for module in block.modules()
        )
    )


def _is_plain(weight: Tensor | None) -> bool:
    """Whether a weight is a parameter as torch makes it, whose numbers can be taken from its module."""
    kind = type(weight)
    known = not issubclass(kind, nn.Parameter) or kind is nn.Parameter
    return weight is not None and known and not hasattr(kind, "__tensor_flatten__")


def run_block(
    block: nn.Module, x: Tensor, normed: Tensor | None = None, rows: int | None = None, **given: Tensor
) -> tuple[Tensor, Tensor | None]:
    """``block(x)`` as the two terms of its last sum; the second is ``None`` where the block runs whole.

    Args:
        block: a timm block.
        x: (B, N, D).
        normed: (B, N, D), ``block.norm1(x)`` where it is there already, because the block has an :func:`opening_norm`.
        rows: compute the first rows alone, which still attend to all of x, because the block :func:`attends_apart`.
        given: what the block takes beside x: ``rope``, and ``attn_mask`` (B, 1, 1, N) that biases keys.
    """
    parts = branches(block)
    if parts is None:
        return block(x, **given), None
    attend, feed = parts
    normed = block.norm1(x) if normed is None else normed
    if rows is None:
        x = x + attend(normed, **given)
    else:
        x = x[:, :rows] + attend(normed[:, :rows], attended=normed, **given)
    return x, feed(x)
