"""fused_merge_attention as registered operators, one a direction, so that compilers, export and graphs see one node.

``pm_kernels::attention`` also returns ``lse`` (B, H, queries) in float32 or wider, the base-2 logarithm of each query's
softmax denominator, from which ``pm_kernels::attention_backward`` takes up the attention matrix again.
"""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import reference
from .backend import kernel_device, on_device
from .namespace import NAMESPACE, OPERATORS

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_ARGUMENTS = "Tensor? merge, Tensor? gate, Tensor? key_bias, float scale, bool merge_queries"
_LIBRARY.define(f"attention(Tensor q, Tensor k, Tensor v, {_ARGUMENTS}) -> (Tensor out, Tensor lse)")
_LIBRARY.define(
    f"attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_ARGUMENTS}, "
    "bool[3] wanted) -> (Tensor dqkv, Tensor dmerge, Tensor dgate, Tensor dkey_bias)"
)
attention = OPERATORS.attention.default
attention_backward = OPERATORS.attention_backward.default


def supported(q: Tensor) -> bool:
    """Whether there are kernels for q's dtype and head width."""
    return q.dtype in (torch.float16, torch.bfloat16, torch.float32) and 1 <= q.shape[-1] <= 128


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    merge: Tensor | None,
    gate: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    merge_queries: bool,
) -> tuple[Tensor, Tensor]:
    device = kernel_device(q) if supported(q) else None
    if device is None:
        out = reference.fused_merge_attention(
            q, k, v, merge, gate=gate, key_bias=key_bias, scale=scale, merge_queries=merge_queries
        )
        logits = _logits(*_merged(q, k, merge, merge_queries), key_bias, scale)
        lse = torch.logsumexp(logits, dim=-1) / math.log(2)
        return _heads_inside(out), lse.masked_fill(lse == -math.inf, math.inf)
    from . import attention_launch

    with on_device(q):
        return attention_launch.run_forward(device, q, k, v, merge, gate, key_bias, scale, merge_queries)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    merge: Tensor | None,
    gate: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    merge_queries: bool,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    device = kernel_device(q) if supported(q) else None
    if device is None:
        dqkv, dmerge, dgate, dbias = _backward_written_out(
            dout, q, k, v, out, lse, merge, gate, key_bias, scale, merge_queries
        )
    else:
        from . import attention_launch

        with on_device(q):
            plan = attention_launch.plan_backward(
                device, dout, q, k, v, out, lse, merge, gate, key_bias, scale, merge_queries, wanted
            )
            for launch in plan.launches:
                launch.run()
        dqkv, dgate, dbias = plan.dqkv, plan.dgate, plan.dbias
        dmerge = sum(partial.sum(0) for partial in plan.partial_dmerges)
    return (
        dqkv,
        _like(merge, dmerge if wanted[0] else None, q),
        _like(gate, dgate if wanted[1] else None, q),
        _like(key_bias, dbias if wanted[2] else None, q),
    )


def _like(tensor: Tensor | None, gradient: Tensor | None, q: Tensor) -> Tensor:
    """The gradient summed over what was broadcast, in the tensor's dtype; an empty tensor where there is none."""
    if gradient is None:
        return q.new_empty(0)
    return gradient.sum_to_size(tensor.shape).to(tensor.dtype)


def _backward_written_out(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    merge: Tensor | None,
    gate: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    merge_queries: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The backward with the attention matrix in memory, in float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    queries, keys = (x.to(wide) for x in _merged(q, k, merge, merge_queries))
    values = (v if merge is None else merge @ v).to(wide)
    dout = dout.to(wide)
    weights = torch.exp2(_logits(queries, keys, key_bias, scale) / math.log(2) - lse.unsqueeze(-1))
    gates = 1.0 if gate is None else gate.to(wide).expand(keys.shape[:-1]).unsqueeze(-2)
    dweights = dout @ values.mT
    dlogits = weights * (gates * dweights - (dout * out.to(wide)).sum(-1, keepdim=True))
    dq, dk, dv = scale * dlogits @ keys, scale * dlogits.mT @ queries, (gates * weights).mT @ dout
    dmerge = None
    if merge is not None:
        wide_merge = merge.to(wide)
        pairs = [(dk, k), (dv, v)] + ([(dq, q)] if merge_queries else [])
        dmerge = sum(torch.einsum("bhcd,bhnd->cn", gradient, x.to(wide)) for gradient, x in pairs)
        dq = wide_merge.mT @ dq if merge_queries else dq
        dk, dv = wide_merge.mT @ dk, wide_merge.mT @ dv
    dqkv = q.new_zeros(q.shape[0], max(q.shape[2], k.shape[2]), 3, q.shape[1], q.shape[3])
    for index, gradient in enumerate((dq, dk, dv)):
        dqkv[:, : gradient.shape[2], index] = gradient.transpose(1, 2).to(q.dtype)
    return dqkv, dmerge, (weights * dweights).sum(-2), dlogits.sum(-2)


def _merged(q: Tensor, k: Tensor, merge: Tensor | None, merge_queries: bool) -> tuple[Tensor, Tensor]:
    if merge is None:
        return q, k
    return merge @ q if merge_queries else q, merge @ k


def _logits(q: Tensor, k: Tensor, key_bias: Tensor | None, scale: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = scale * q.to(wide) @ k.to(wide).mT
    return logits if key_bias is None else logits + key_bias.to(wide).expand(k.shape[:-1]).unsqueeze(-2)


def _heads_inside(out: Tensor) -> Tensor:
    """(B, H, N, d) in memory (B, N, H, d), where the projection that follows needs no copy."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    merge: Tensor | None,
    gate: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    merge_queries: bool,
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, width = q.shape
    if merge is not None and merge_queries:
        queries = merge.shape[0]
    out = q.new_empty(batch, queries, heads, width).transpose(1, 2)
    return out, q.new_empty(batch, heads, queries, dtype=torch.promote_types(q.dtype, torch.float32))


def _backward_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *options: Tensor | float | list[bool] | None,
) -> tuple[Tensor, ...]:
    batch, heads, queries, width = q.shape
    tokens = queries if queries == k.shape[2] else max(queries, k.shape[2])
    others = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if want else q.new_empty(0)
        for tensor, want in zip(options[:3], options[-1], strict=True)
    )
    return q.new_empty(batch, tokens, 3, heads, width), *others


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, *arguments: Tensor | float | bool | None
    ) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = attention(*arguments)
        *tensors, ctx.scale, ctx.merge_queries = arguments
        ctx.save_for_backward(*tensors, out, lse)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        q, k, v, merge, gate, key_bias, out, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:6]
        dqkv, *others = attention_backward(
            dout, q, k, v, out, lse, merge, gate, key_bias, ctx.scale, ctx.merge_queries, needs
        )
        dq, dk, dv = (
            dqkv[:, : x.shape[2], index].transpose(1, 2) if need else None
            for index, (x, need) in enumerate(zip((q, k, v), ctx.needs_input_grad, strict=False))
        )
        others = (gradient if need else None for gradient, need in zip(others, needs, strict=True))
        return dq, dk, dv, *others, None, None


class _PackedAttention(torch.autograd.Function):
    """Attention of one packed projection, whose gradient is the packed one that the kernels write."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        qkv: Tensor,
        merge: Tensor | None,
        gate: Tensor | None,
        key_bias: Tensor | None,
        scale: float,
        merge_queries: bool,
    ) -> Tensor:
        out, lse = attention(*unpacked(qkv), merge, gate, key_bias, scale, merge_queries)
        ctx.scale, ctx.merge_queries = scale, merge_queries
        ctx.save_for_backward(qkv, merge, gate, key_bias, out, lse)
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, merge, gate, key_bias, out, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:4]
        dqkv, dmerge, dgate, dkey_bias = attention_backward(
            dout, *unpacked(qkv), out, lse, merge, gate, key_bias, ctx.scale, ctx.merge_queries, needs
        )
        return (
            dqkv if ctx.needs_input_grad[0] else None,
            dmerge if needs[0] else None,
            dgate if needs[1] else None,
            dkey_bias if needs[2] else None,
            None,
            None,
        )


def packed_attention(
    qkv: Tensor,
    merge: Tensor | None,
    gate: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    merge_queries: bool,
) -> Tensor:
    """The output of ``attention`` for qkv (B, N, 3, H, d), differentiable without a copy of the gradients."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (qkv, merge, gate, key_bias)):
        return _PackedAttention.apply(qkv, merge, gate, key_bias, scale, merge_queries)
    return attention(*unpacked(qkv), merge, gate, key_bias, scale, merge_queries)[0]


def unpacked(qkv: Tensor) -> tuple[Tensor, ...]:
    """(B, N, 3, H, d) as three views (B, H, N, d)."""
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, *arguments: Tensor | float | bool | list[bool] | None
    ) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return attention_backward(*arguments)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *_: Tensor | None) -> None:
        raise RuntimeError(
            "fused_merge_attention cannot be differentiated twice on its kernels; "
            'choose pm_kernels.backend("reference") for second derivatives'
        )


def _recorded(function: type[torch.autograd.Function], op: torch._ops.OpOverload):  # noqa: ANN202
    """The op under autograd. An own function costs a third of what torch.library.register_autograd does per call."""

    def call(*arguments: object) -> object:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            return function.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    return call


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("attention", _forward, _key)
    _LIBRARY.impl("attention_backward", _backward, _key)
_LIBRARY.impl("attention", _recorded(_Attention, attention), "Autograd")
_LIBRARY.impl("attention_backward", _recorded(_Gradients, attention_backward), "Autograd")
torch.library.register_fake(attention, _forward_fake, lib=_LIBRARY)
torch.library.register_fake(attention_backward, _backward_fake, lib=_LIBRARY)


@register_flop_formula(OPERATORS.attention)
def _forward_flops(
    q: torch.Size,
    k: torch.Size,
    v: torch.Size,
    merge: torch.Size | None,
    gate: torch.Size | None,
    key_bias: torch.Size | None,
    scale: float,
    merge_queries: bool,
    out_shape: object = None,
) -> int:
    attending, merging = _products(q, k, merge, merge_queries)
    return 2 * attending + merging


@register_flop_formula(OPERATORS.attention_backward)
def _backward_flops(
    dout: torch.Size,
    q: torch.Size,
    k: torch.Size,
    v: torch.Size,
    out: torch.Size,
    lse: torch.Size,
    merge: torch.Size | None,
    gate: torch.Size | None,
    key_bias: torch.Size | None,
    scale: float,
    merge_queries: bool,
    wanted: list[bool],
    out_shape: object = None,
) -> int:
    attending, merging = _products(q, k, merge, merge_queries)
    # The logits and the merged tokens once more, then a gradient for each factor of each product.
    return 5 * attending + (3 if wanted[0] else 2) * merging


def _products(q: torch.Size, k: torch.Size, merge: torch.Size | None, merge_queries: bool) -> tuple[int, int]:
    """Floating-point operations of one product of the attention, and of all that merge."""
    batch, heads, queries, width = q
    keys = k[2]
    merging = 0
    if merge is not None:
        keys, tokens = merge
        queries = keys if merge_queries else queries
        merging = 2 * batch * heads * keys * tokens * width * (3 if merge_queries else 2)
    return 2 * batch * heads * queries * keys * width, merging
