"""Take timm's blocks apart, ``x + f(norm1(x))`` and then ``x + g(x)``, where no hook or wrapper would be bypassed."""

from collections.abc import Callable

from timm.layers import LayerNorm
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..attention import FusedAttention
from ..modules import is_touched


def branches(block: nn.Module) -> tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]] | None:
    """The two terms that timm's Block or EvaBlock adds to its tokens, as functions: ``f(norm1(x), **given)``, ``g(x)``.

    ``given`` goes to the attention. ``None``: the block is of another class or touched, and has to run as a whole.
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
    """Weight, bias and epsilon of the block's first LayerNorm, where it can be computed outside of the block."""
    if type(block) not in (Block, EvaBlock) or is_touched(block):
        return None
    norm = block.norm1
    if type(norm) not in (nn.LayerNorm, LayerNorm) or is_touched(norm) or len(norm.normalized_shape) != 1:
        return None
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    return (weight, bias, norm.eps) if _is_plain(weight) and _is_plain(bias) else None


def attends_apart(block: nn.Module) -> bool:
    """Whether :func:`run_block` can compute only some rows: nothing in the block would notice that there are fewer."""
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
    """Whether a weight is an ordinary parameter, whose values can be used outside of its module."""
    kind = type(weight)
    known = not issubclass(kind, nn.Parameter) or kind is nn.Parameter
    return weight is not None and known and not hasattr(kind, "__tensor_flatten__")


def run_block(
    block: nn.Module, x: Tensor, normed: Tensor | None = None, rows: int | None = None, **given: Tensor
) -> tuple[Tensor, Tensor | None]:
    """``block(x)`` as the two terms of its last sum; the second is ``None`` where the block has to run as a whole.

    Args:
        block: a timm block.
        x: (B, N, D).
        normed: (B, N, D), ``block.norm1(x)`` if it was computed already, which needs an :func:`opening_norm`.
        rows: compute only the first rows, which still attend to all of x; the block must :func:`attends_apart`.
        given: the block's further arguments: ``rope``, and an ``attn_mask`` (B, 1, 1, N) that biases keys.
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
