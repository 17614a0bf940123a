"""timm's attention on the fused kernel, with the two inputs that compression and scoring need."""

import torch
from timm.layers import Attention
from torch import Tensor, nn

from pm_kernels import fused_merge_attention


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

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, D) -> (B, N, D); masks are refused, as merged tokens have none."""
        refuse_masks(attn_mask, is_causal)
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = fused_merge_attention(
            self.q_norm(q), self.k_norm(k), v, gate=self.token_gate, key_bias=self.key_bias, scale=self.scale
        )
        attended = self.norm(attended.transpose(1, 2).reshape(batch, tokens, -1))
        output_gate = getattr(self, "gate", None)
        if output_gate is not None:
            attended = attended * torch.sigmoid(output_gate(x))
        return self.proj_drop(self.proj(attended))


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


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of ``root``'s submodule ``name`` (dotted)."""
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)
