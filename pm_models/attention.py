"""timm's attentions on the fused kernel, with the two inputs that compression and scoring need."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pm_kernels import fused_merge_attention, fused_merge_attention_qkv

from .modules import is_touched


class FusedAttention(nn.Module):
    """A timm attention that runs :func:`pm_kernels.fused_merge_attention`; :func:`fuse` makes one.

    It shares the given attention's modules, so parameter names stay timm's.

    Args:
        attention: the attention to take over.
        key_bias: (N,), added to the logits of every query and head.
        token_gate: (N,), multiplies the columns of the attention matrix; its gradient is the tokens' scores.

    Raises:
        ValueError: the attention has dropout on its weights, which no fused kernel supports.
    """

    def __init__(
        self, attention: nn.Module, *, key_bias: Tensor | None = None, token_gate: Tensor | None = None
    ) -> None:
        if attention.attn_drop.p > 0:
            raise ValueError(f"attention dropout must be 0 (attn_drop_rate of the model), got {attention.attn_drop.p}")
        nn.Module.__init__(self)
        self.__dict__.update(attention.__dict__)
        # Its own containers of buffers, so that the given attention does not get the one added here.
        self._buffers = dict(attention._buffers)
        self._non_persistent_buffers_set = set(attention._non_persistent_buffers_set)
        key_bias = None if key_bias is None else key_bias.to(self.proj.weight)
        self.register_buffer("key_bias", key_bias, persistent=False)
        self.token_gate = token_gate

    def options(self, attn_mask: Tensor | None, is_causal: bool) -> dict[str, object]:
        """The kernel's options. A mask that is the same for all queries, (B, 1 or H, 1, keys), becomes a key bias."""
        bias = self.key_bias
        if (
            isinstance(attn_mask, Tensor)
            and attn_mask.dim() == 4
            and attn_mask.shape[2] == 1
            and attn_mask.is_floating_point()
        ):
            bias = attn_mask.squeeze(2) if bias is None else attn_mask.squeeze(2) + bias
            attn_mask = None
        if attn_mask is not None or is_causal:
            refuse_masks(attn_mask, is_causal)
        return {"gate": self.token_gate, "key_bias": bias, "scale": self.scale}

    @property
    def takes_rows(self) -> bool:
        """Whether the rows to compute and the tokens that they attend to can be given separately."""
        return True

    def _finish(self, out: Tensor, output_gate: Tensor | None) -> Tensor:
        """(B, H, N, d) to (B, N, D)."""
        out = self.norm(out.transpose(1, 2).flatten(2))
        return self.proj_drop(self.proj(out if output_gate is None else out * output_gate))


class PMAttention(FusedAttention, Attention):
    """timm's :class:`~timm.layers.Attention` on the fused kernel."""

    @property
    def takes_rows(self) -> bool:
        return type(self.qkv) is nn.Linear  # its weights can be split

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        attended: Tensor | None = None,
        merge: Tensor | None = None,
    ) -> Tensor:
        """(B, N, D) -> (B, N, D). The only mask accepted is one that biases keys: merged tokens have no others.

        ``attended`` (B, M, D) gives the keys and values if they are not x's; only x's rows are computed.
        ``merge`` (C, N) merges queries, keys and values: (B, N, D) -> (B, C, D).
        """
        options = self.options(attn_mask, is_causal)
        unnormed = isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity)
        if attended is None and unnormed and not is_touched(self.q_norm, self.k_norm):
            qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
            out = fused_merge_attention_qkv(qkv, merge, **options)
        else:
            if attended is None:
                q, k, v = self._heads(self.qkv(x))
            else:
                query, key_value = self._split_projection()
                (q,), (k, v) = self._heads(F.linear(x, *query)), self._heads(F.linear(attended, *key_value))
            out = fused_merge_attention(self.q_norm(q), self.k_norm(k), v, merge, **options)
        gate = getattr(self, "gate", None)
        return self._finish(out, None if gate is None else torch.sigmoid(gate(x)))

    def _heads(self, packed: Tensor) -> tuple[Tensor, ...]:
        """(B, N, n * H * d) as n views (B, H, N, d)."""
        return packed.unflatten(-1, (-1, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)

    def _split_projection(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Weight and bias of the projection to queries, then of that to keys and values."""
        sizes = [self.num_heads * self.head_dim, 2 * self.num_heads * self.head_dim]
        biases = (None, None) if self.qkv.bias is None else self.qkv.bias.split(sizes)
        return zip(self.qkv.weight.split(sizes), biases, strict=True)


class RotaryAttention(FusedAttention):
    """Base class of timm's two attentions with rotary positions on the fused kernel."""

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        attended: Tensor | None = None,
    ) -> Tensor:
        """(B, N, D) -> (B, N, D). ``rope`` (N - P, 2 * d), (H, ...) or (B, H, ...) is for all but the P prefix tokens.

        ``attended`` (B, M, D) gives the keys and values if they are not x's; only x's rows, which must be prefix
        tokens, are computed.
        """
        options = self.options(attn_mask, is_causal)
        q, k, v = self._heads(x)
        if attended is not None:
            _, k, v = self._heads(attended)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q = (q if attended is not None else self._rotated(q, rope)).type_as(v)
            k = self._rotated(k, rope).type_as(v)
        groups = getattr(self, "num_kv_groups", 1)
        if groups > 1:  # several query heads share a head of keys and values
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = fused_merge_attention(q, k, v, **options)
        return self._finish(out, None if self.gate is None else torch.sigmoid(self.gate(x)))

    def _heads(self, x: Tensor) -> Iterator[Tensor]:
        """Queries, keys and values (B, H, N, d)."""
        if self.qkv is None:
            projected = [projection(x) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        elif getattr(self, "q_bias", None) is None:
            projected = self.qkv(x).chunk(3, dim=-1)
        else:
            bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
            packed = self.qkv(x) + bias if self.qkv_bias_separate else F.linear(x, self.qkv.weight, bias)
            projected = packed.chunk(3, dim=-1)
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
    """Make a :class:`FusedAttention` with ``options`` from one of timm's attentions or one that is fused already."""
    return _FUSED.get(type(attention), type(attention))(attention, **options)


def merges_inside(block: nn.Module) -> bool:
    """Whether the block can merge inside its attention: it is timm's plain Block with Attention, ungated."""
    attention = getattr(block, "attn", None)
    return type(block) is Block and type(attention) is Attention and getattr(attention, "gate", None) is None


def refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    """Refuse the mask arguments that timm passes everywhere, unless they are unset.

    Raises:
        ValueError: a mask or causality is requested.
        TypeError: the model is traced by ``torch.fx``, which replaces all arguments by symbols.
    """
    if isinstance(attn_mask, torch.fx.Proxy):
        raise TypeError(
            "a compressed model cannot be traced by torch.fx.symbolic_trace; trace it by torch.export.export(model, "
            "(images,)), and take features from forward_intermediates"
        )
    if attn_mask is not None:
        raise ValueError("attn_mask must be None: a mask over tokens has no meaning once tokens are merged")
    if is_causal:
        raise ValueError("is_causal must be False: merged tokens have no causal order")


def fusable_attentions(block: nn.Module) -> dict[str, nn.Module]:
    """The block's attentions that :func:`fuse` can take over, by module name."""
    return {
        name: module
        for name, module in block.named_modules()
        if type(module) in _FUSED
        and "forward" not in vars(module)  # with a replaced forward it is no longer timm's attention
    }


def fused_attentions(block: nn.Module) -> dict[str, FusedAttention]:
    """The block's attentions that are fused already, by module name."""
    return {name: module for name, module in block.named_modules() if isinstance(module, FusedAttention)}


def plain_attention(attention: FusedAttention) -> nn.Module:
    """timm's plain attention with the same modules, which are shared."""
    plain_class = next(plain for plain, fused in _FUSED.items() if fused is type(attention))
    plain = plain_class.__new__(plain_class)
    nn.Module.__init__(plain)
    plain.__dict__.update(attention.__dict__)
    plain._buffers = {name: value for name, value in attention._buffers.items() if name != "key_bias"}
    plain._non_persistent_buffers_set = attention._non_persistent_buffers_set - {"key_bias"}
    del plain.token_gate
    return plain
