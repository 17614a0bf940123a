"""timm's attentions on the fused kernel, with the two inputs that compression and scoring need."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, LayerNorm, apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pm_kernels import fused_merge_attention, fused_merge_attention_qkv, token_mix

from .rewiring import Rewired


class FusedAttention(nn.Module):
    """A timm attention that attends through :func:`pm_kernels.fused_merge_attention`; :func:`fuse` makes one.

    It takes over the given attention's modules (they are shared, not copied), so parameter names stay timm's.

    Args:
        attention: the attention to take over.
        key_bias: (N,), added to the logits of every query and head.
        token_gate: (N,), multiplies the columns of the attention matrix; its gradient is the tokens' score.

    Raises:
        ValueError: the attention drops attention weights at random, which no fused kernel does.
    """

    def __init__(
        self, attention: nn.Module, *, key_bias: Tensor | None = None, token_gate: Tensor | None = None
    ) -> None:
        if attention.attn_drop.p > 0:
            raise ValueError(f"attention dropout must be 0 (attn_drop_rate of the model), got {attention.attn_drop.p}")
        nn.Module.__init__(self)
        self.__dict__.update(attention.__dict__)
        # Buffers are kept in containers of its own, so that the given attention does not see the one added here.
        self._buffers = dict(attention._buffers)
        self._non_persistent_buffers_set = set(attention._non_persistent_buffers_set)
        key_bias = None if key_bias is None else key_bias.to(self.proj.weight)
        self.register_buffer("key_bias", key_bias, persistent=False)
        self.token_gate = token_gate

    @property
    def options(self) -> dict[str, object]:
        """For the kernel."""
        return {"gate": self.token_gate, "key_bias": self.key_bias, "scale": self.scale}

    @property
    def takes_rows(self) -> bool:
        """Whether it can be given the rows to compute and, apart from them, what they attend to."""
        return True

    def _finish(self, out: Tensor, output_gate: Tensor | None) -> Tensor:
        """(B, H, N, d) to (B, N, D)."""
        out = self.norm(out.transpose(1, 2).flatten(2))
        return self.proj_drop(self.proj(out if output_gate is None else out * output_gate))


class PMAttention(FusedAttention, Attention):
    """timm's :class:`~timm.layers.Attention` on the fused kernel."""

    @property
    def takes_rows(self) -> bool:
        return type(self.qkv) is nn.Linear  # whose weights can be taken apart

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
        if attended is None and isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity):
            qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
            out = fused_merge_attention_qkv(qkv, merge, **self.options)
        else:
            if attended is None:
                q, k, v = self._heads(self.qkv(x))
            else:
                query, key_value = self._split_projection()
                (q,), (k, v) = self._heads(F.linear(x, *query)), self._heads(F.linear(attended, *key_value))
            out = fused_merge_attention(self.q_norm(q), self.k_norm(k), v, merge, **self.options)
        gate = getattr(self, "gate", None)
        return self._finish(out, None if gate is None else torch.sigmoid(gate(x)))

    def _heads(self, packed: Tensor) -> tuple[Tensor, ...]:
        """(B, N, n * H * d) as n views (B, H, N, d)."""
        batch, tokens, _ = packed.shape
        return packed.reshape(batch, tokens, -1, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)

    def _split_projection(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Weight and bias of the queries' projection, and of the keys' and values'."""
        sizes = [self.num_heads * self.head_dim, 2 * self.num_heads * self.head_dim]
        biases = (None, None) if self.qkv.bias is None else self.qkv.bias.split(sizes)
        return zip(self.qkv.weight.split(sizes), biases, strict=True)


class RotaryAttention(FusedAttention):
    """What timm's two attentions with rotary positions have in common, on the fused kernel."""

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        attended: Tensor | None = None,
    ) -> Tensor:
        """(B, N, D) -> (B, N, D); ``rope`` (N - P, 2 * d) or (H, N - P, 2 * d) is of all but P prefix tokens.

        ``attended`` (B, M, D) gives the keys and values where they are not x's: only x's rows, which are prefix tokens,
        are computed.
        """
        refuse_masks(attn_mask, is_causal)
        q, k, v = self._heads(x)
        if attended is not None:
            _, k, v = self._heads(attended)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q = (q if attended is not None else self._rotated(q, rope)).type_as(v)
            k = self._rotated(k, rope).type_as(v)
        groups = getattr(self, "num_kv_groups", 1)
        if groups > 1:  # each head of keys and values serves several of queries
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = fused_merge_attention(q, k, v, **self.options)
        return self._finish(out, None if self.gate is None else torch.sigmoid(self.gate(x)))

    def _heads(self, x: Tensor) -> Iterator[Tensor]:
        """Queries, keys and values (B, H, N, d)."""
        if self.qkv is None:
            projected = [projection(x) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        elif getattr(self, "q_bias", None) is None:
            projected = self.qkv(x).chunk(3, dim=-1)
        else:
            bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
            projected = F.linear(x, self.qkv.weight, bias).chunk(3, dim=-1)
        return (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in projected)

    def _rotated(self, heads: Tensor, rope: Tensor) -> Tensor:
        prefix = heads.shape[2] - rope.shape[-2]
        rotated = apply_rot_embed_cat(heads[:, :, prefix:], rope, half=self.rotate_half)
        return torch.cat([heads[:, :, :prefix], rotated], dim=2) if prefix else rotated


class PMEvaAttention(RotaryAttention, EvaAttention):
    """timm's :class:`~timm.models.eva.EvaAttention` on the fused kernel."""


class PMAttentionRope(RotaryAttention, AttentionRope):
    """timm's :class:`~timm.layers.AttentionRope` on the fused kernel."""


_FUSED: dict[type[nn.Module], type[FusedAttention]] = {
    Attention: PMAttention,
    EvaAttention: PMEvaAttention,
    AttentionRope: PMAttentionRope,
}


def fuse(attention: nn.Module, **options: Tensor | None) -> FusedAttention:
    """One of timm's attentions, or one that is fused already, as :class:`FusedAttention` with ``options``."""
    return _FUSED.get(type(attention), type(attention))(attention, **options)


def runs_rewired(block: nn.Module) -> bool:
    """Whether the block is timm's plain Block or EvaBlock, which :func:`run_block` can take apart, with nothing around.

    Hooks, wrappers and adapters expect to see the block's whole input and output.
    """
    return type(block) in (Block, EvaBlock) and not _has_hooks(block)


def attends_apart(block: nn.Module) -> bool:
    """Whether :func:`run_block` can run some rows of the block: its attention is a fused one."""
    return runs_rewired(block) and isinstance(block.attn, FusedAttention) and block.attn.takes_rows


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
    block: nn.Module,
    x: Tensor,
    *,
    normed: Tensor | None = None,
    rows: int | None = None,
    apart: bool = False,
    **positions: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """``block(x)`` for x (B, N, D), by timm's own forward on rewired attributes.

    Args:
        block: a timm block; with any option, one that :func:`runs_rewired`.
        x: (B, N, D).
        normed: (B, N, D), ``block.norm1(x)`` where it is there already.
        rows: compute the first rows alone, which still attend to all of x; the block :func:`attends_apart`.
        apart: leave the last sum to be done.
        positions: what the block takes beside x, ``rope``.

    Returns:
        The result (B, N or rows, D) and ``None``, or the two terms of its last sum.
    """
    replaced: dict[str, object] = {}
    if rows is not None:
        attended = block.norm1(x) if normed is None else normed

        def attention(queries: Tensor, **given: object) -> Tensor:
            return block.attn(queries, **given, attended=attended)

        replaced["attn"] = attention
        x, normed = x[:, :rows], attended[:, :rows]
    if normed is not None:
        replaced["norm1"] = lambda _: normed
    if apart:
        return _without_last_sum(block, x, replaced, positions)
    if not replaced:
        return block(x, **positions), None
    return type(block).forward(Rewired(block, **replaced), x, **positions), None


class _Term:
    """What a sum with a tensor makes a pair of."""

    def __init__(self, term: Tensor) -> None:
        self.term = term

    def __radd__(self, other: Tensor) -> tuple[Tensor, Tensor]:
        return other, self.term


def _without_last_sum(
    block: Block | EvaBlock, x: Tensor, replaced: dict[str, object], positions: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    forward = type(block).forward
    if not torch.compiler.is_compiling():
        return forward(Rewired(block, **replaced, drop_path2=lambda x: _Term(block.drop_path2(x))), x, **positions)
    # A compiler knows no sums of tensors with other things; it drops the one that nothing reads.
    terms = []

    def norm(x: Tensor) -> Tensor:
        terms.append(x)
        return block.norm2(x)

    def drop_path(x: Tensor) -> Tensor:
        terms.append(block.drop_path2(x))
        return terms[-1]

    forward(Rewired(block, **replaced, norm2=norm, drop_path2=drop_path), x, **positions)
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


def fusable_attentions(block: nn.Module) -> dict[str, nn.Module]:
    """The block's attentions that :func:`fuse` can take over, by module name."""
    return {name: module for name, module in block.named_modules() if type(module) in _FUSED}


def fused_attentions(block: nn.Module) -> dict[str, FusedAttention]:
    """The block's attentions that are taken over already, by module name."""
    return {name: module for name, module in block.named_modules() if isinstance(module, FusedAttention)}


def plain_attention(attention: FusedAttention) -> nn.Module:
    """timm's attention with the same modules, which are shared."""
    plain_class = next(plain for plain, fused in _FUSED.items() if fused is type(attention))
    plain = plain_class.__new__(plain_class)
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
