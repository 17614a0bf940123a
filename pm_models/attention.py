"""timm's attention on the fused kernel, with the two inputs that compression and scoring need."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from timm.layers import Attention, LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pm_kernels import fused_merge_attention, fused_merge_attention_qkv, token_mix

from .rewiring import Rewired


class PMAttention(Attention):
    """A timm :class:`~timm.layers.Attention` that attends through :func:`pm_kernels.fused_merge_attention`.

    It takes over the given attention's modules (they are shared, not copied), so parameter names stay timm's.

    Args:
        attention: the attention to take over.
        key_bias: (N,), added to the logits of every query and head.
        token_gate: (N,), multiplies the columns of the attention matrix; its gradient is the tokens' score.

    Raises:
        ValueError: the attention drops attention weights at random, which no fused kernel does.
    """

    def __init__(
        self, attention: Attention, *, key_bias: Tensor | None = None, token_gate: Tensor | None = None
    ) -> None:
        if attention.attn_drop.p > 0:
            raise ValueError(f"attention dropout must be 0 (attn_drop_rate of the model), got {attention.attn_drop.p}")
        nn.Module.__init__(self)
        self.__dict__.update(attention.__dict__)
        # Buffers are kept in containers of its own, so that the given attention does not see the one added here.
        self._buffers = dict(attention._buffers)
        self._non_persistent_buffers_set = set(attention._non_persistent_buffers_set)
        self.register_buffer("key_bias", key_bias, persistent=False)
        self.token_gate = token_gate

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        attended: Tensor | None = None,
        merge: Tensor | None = None,
    ) -> Tensor:
        """(B, N, D) -> (B, N, D); masks are refused, as merged tokens have none.

        ``attended`` (B, M, D) gives the keys and values where they are not x's: only x's rows are computed.
        ``merge`` (C, N) merges queries, keys and values: (B, N, D) -> (B, C, D).
        """
        refuse_masks(attn_mask, is_causal)
        options = {"gate": self.token_gate, "key_bias": self.key_bias, "scale": self.scale}
        if attended is None and isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity):
            qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
            out = fused_merge_attention_qkv(qkv, merge, **options)
        else:
            if attended is None:
                q, k, v = self._heads(self.qkv(x))
            else:
                query, key_value = self._split_projection()
                (q,), (k, v) = self._heads(F.linear(x, *query)), self._heads(F.linear(attended, *key_value))
            out = fused_merge_attention(self.q_norm(q), self.k_norm(k), v, merge, **options)
        out = self.norm(out.transpose(1, 2).flatten(2))
        output_gate = getattr(self, "gate", None)
        if output_gate is not None:
            out = out * torch.sigmoid(output_gate(x))
        return self.proj_drop(self.proj(out))

    def _heads(self, packed: Tensor) -> tuple[Tensor, ...]:
        """(B, N, n * H * d) as n views (B, H, N, d)."""
        batch, tokens, _ = packed.shape
        return packed.reshape(batch, tokens, -1, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)

    def _split_projection(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Weight and bias of the queries' projection, and of the keys' and values'."""
        sizes = [self.num_heads * self.head_dim, 2 * self.num_heads * self.head_dim]
        biases = (None, None) if self.qkv.bias is None else self.qkv.bias.split(sizes)
        return zip(self.qkv.weight.split(sizes), biases, strict=True)


def runs_rewired(block: nn.Module) -> bool:
    """Whether the block is timm's plain Block with nothing around it, so that :func:`run_block` can take it apart.

    Hooks, wrappers and adapters expect to see the block's whole input and output.
    """
    return type(block) is Block and not _has_hooks(block)


def attends_apart(block: nn.Module) -> bool:
    """Whether :func:`run_block` can run some rows of the block: its attention is a plain :class:`PMAttention`."""
    return runs_rewired(block) and type(block.attn) is PMAttention and type(block.attn.qkv) is nn.Linear


def opening_norm(block: nn.Module) -> tuple[Tensor, Tensor, float] | None:
    """Weight, bias and epsilon of the LayerNorm that the block starts with, where :func:`run_block` can be given it."""
    if not runs_rewired(block):
        return None
    norm = block.norm1
    plain = type(norm) in (nn.LayerNorm, LayerNorm) and not _has_hooks(norm) and len(norm.normalized_shape) == 1
    if not plain or norm.weight is None or norm.bias is None:
        return None
    return norm.weight, norm.bias, norm.eps


def run_block(
    block: nn.Module, x: Tensor, *, normed: Tensor | None = None, rows: int | None = None, apart: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``block(x)`` for x (B, N, D), by timm's own forward on rewired attributes.

    Args:
        block: a timm block; with any option, one that :func:`runs_rewired`.
        x: (B, N, D).
        normed: (B, N, D), ``block.norm1(x)`` where it is there already.
        rows: compute the first rows alone, which still attend to all of x; the block :func:`attends_apart`.
        apart: leave the last sum to be done.

    Returns:
        The result (B, N or rows, D) and ``None``, or the two terms of its last sum.
    """
    replaced: dict[str, object] = {}
    if rows is not None:
        attended = block.norm1(x) if normed is None else normed

        def attention(queries: Tensor, **masks: object) -> Tensor:
            return block.attn(queries, **masks, attended=attended)

        replaced["attn"] = attention
        x, normed = x[:, :rows], attended[:, :rows]
    if normed is not None:
        replaced["norm1"] = lambda _: normed
    if apart:
        return _without_last_sum(block, x, replaced)
    return (Block.forward(Rewired(block, **replaced), x) if replaced else block(x)), None


class _Term:
    """What a sum with a tensor makes a pair of."""

    def __init__(self, term: Tensor) -> None:
        self.term = term

    def __radd__(self, other: Tensor) -> tuple[Tensor, Tensor]:
        return other, self.term


def _without_last_sum(block: Block, x: Tensor, replaced: dict[str, object]) -> tuple[Tensor, Tensor]:
    if not torch.compiler.is_compiling():
        return Block.forward(Rewired(block, **replaced, drop_path2=lambda x: _Term(block.drop_path2(x))), x)
    # A compiler knows no sums of tensors with other things; it drops the one that nothing reads.
    terms = []

    def norm(x: Tensor) -> Tensor:
        terms.append(x)
        return block.norm2(x)

    def drop_path(x: Tensor) -> Tensor:
        terms.append(block.drop_path2(x))
        return terms[-1]

    Block.forward(Rewired(block, **replaced, norm2=norm, drop_path2=drop_path), x)
    return tuple(terms)


def _has_hooks(module: nn.Module) -> bool:
    return any((module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks))


def merges_inside(block: nn.Module) -> bool:
    """Whether :func:`run_merging` can run the block: timm's plain Block on its plain Attention, without output gate."""
    attention = getattr(block, "attn", None)
    return type(block) is Block and type(attention) is Attention and getattr(attention, "gate", None) is None


def run_merging(block: Block, x: Tensor, merge: Tensor) -> Tensor:
    """The block with its merge inside the attention: (B, N, D) and merge (C, N) -> (B, C, D).

    The first norm and the projection to queries, keys and values run on all N tokens, the rest on the C merged ones.
    """
    attended = block.norm1(x)

    def attention(_: Tensor, **masks: object) -> Tensor:
        return block.attn(attended, **masks, merge=merge)

    return Block.forward(Rewired(block, norm1=nn.Identity(), attn=attention), token_mix(x, merge))


def refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    """Accept the mask arguments that timm passes everywhere, and refuse them where they are set.

    Raises:
        ValueError: a mask or causality is asked for.
    """
    if attn_mask is not None:
        raise ValueError("attn_mask must be None: a mask over tokens has no meaning once tokens are merged")
    if is_causal:
        raise ValueError("is_causal must be False: merged tokens have no causal order")


def fusable_attentions(block: nn.Module) -> dict[str, Attention]:
    """The block's attentions that :class:`PMAttention` can take over, by module name."""
    return {name: module for name, module in block.named_modules() if type(module) is Attention}


def fused_attentions(block: nn.Module) -> dict[str, PMAttention]:
    """The block's attentions that are taken over already, by module name."""
    return {name: module for name, module in block.named_modules() if type(module) is PMAttention}


def plain_attention(attention: PMAttention) -> Attention:
    """timm's attention with the same modules, which are shared."""
    plain = Attention.__new__(Attention)
    nn.Module.__init__(plain)
    plain.__dict__.update(attention.__dict__)
    plain._buffers = {name: value for name, value in attention._buffers.items() if name != "key_bias"}
    plain._non_persistent_buffers_set = attention._non_persistent_buffers_set - {"key_bias"}
    del plain.token_gate
    return plain


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of ``root``'s submodule ``name`` (dotted)."""
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)
