"""Take timm's blocks apart, ``x + f(norm1(x))`` and then ``x + g(x)``, where no hook or wrapper would be bypassed."""

from timm.layers import LayerNorm
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..attention import FusedAttention
from ..modules import is_touched


def comes_apart(block: nn.Module) -> bool:
    """Whether the block is timm's sum of two branches, :func:`attend` and :func:`feed`; others have to run whole."""
    return type(block) in (Block, EvaBlock) and not is_touched(block)


def attend(block: Block | EvaBlock, normed: Tensor, **given: object) -> Tensor:
    """What the block adds to its tokens first, of ``norm1`` of them; ``given`` goes to the attention."""
    branch = block.attn(normed, **({"attn_mask": None, "is_causal": False} | given))
    if type(block) is Block:
        branch = block.ls1(branch)
    elif block.gamma_1 is not None:
        branch = block.gamma_1 * branch
    return block.drop_path1(branch)


def feed(block: Block | EvaBlock, x: Tensor) -> Tensor:
    """What the block adds to its tokens then."""
    branch = block.mlp(block.norm2(x))
    if type(block) is Block:
        branch = block.ls2(branch)
    elif block.gamma_2 is not None:
        branch = block.gamma_2 * branch
    return block.drop_path2(branch)


def opening_norm(block: nn.Module) -> tuple[Tensor, Tensor, float] | None:
    """Weight, bias and epsilon of the block's first LayerNorm, where it can be computed outside of the block."""
    if type(block) not in (Block, EvaBlock) or type(block.norm1) not in (nn.LayerNorm, LayerNorm):
        return None
    norm = block.norm1
    if is_touched(block, norm) or len(norm.normalized_shape) != 1:
        return None
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    return (weight, bias, norm.eps) if _are_plain(weight, bias) else None


def attends_apart(block: nn.Module) -> bool:
    """Whether :func:`run_block` can compute only some rows: nothing in the block would notice that there are fewer."""
    return (
        comes_apart(block)
        and isinstance(block.attn, FusedAttention)
        and block.attn.takes_rows
        and not is_touched(*block.modules())
        and _are_plain(*block.parameters())
    )


def _are_plain(*weights: Tensor | None) -> bool:
    """Whether weights are ordinary parameters, whose values can be used outside of their modules."""
    for weight in weights:
        kind = type(weight)
        derived = issubclass(kind, nn.Parameter) and kind is not nn.Parameter
        if weight is None or derived or hasattr(kind, "__tensor_flatten__"):
            return False
    return True


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
    if normed is None and not comes_apart(block):
        return block(x, **given), None
    normed = block.norm1(x) if normed is None else normed
    if rows is None:
        x = x + attend(block, normed, **given)
    else:
        x = x[:, :rows] + attend(block, normed[:, :rows], attended=normed, **given)
    return x, feed(block, x)
