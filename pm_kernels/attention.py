"""Attention over merged tokens, with a gate and a bias per key: contract, checks, autograd, registration."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from . import reference, runtime
from .runtime import Known, check_tensor


class Sizes(NamedTuple):
    """The sizes of a call: tokens of q as ``rows`` and of k as ``tokens``, and what both are after merging."""

    batch: int
    heads: int
    width: int
    rows: int
    tokens: int
    queries: int
    keys: int


class Attention(NamedTuple):
    """The arguments of the op, as :func:`fused_merge_attention` takes them.

    Where k and v are None, q is a packed projection (B, N, 3, H, d).
    """

    q: Tensor
    k: Tensor | None
    v: Tensor | None
    merge: Tensor | None = None
    gate: Tensor | None = None
    key_bias: Tensor | None = None
    scale: float | None = None
    merge_queries: bool = True

    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, H, N, d)."""
        return self.q.permute(2, 0, 3, 1, 4).unbind(0) if self.k is None else (self.q, self.k, self.v)

    def sizes(self) -> Sizes:
        """The sizes of arguments that fit together."""
        if self.k is None:
            batch, rows, _, heads, width = self.q.shape
            tokens = rows
        else:
            (batch, heads, rows, width), tokens = self.q.shape, self.k.shape[2]
        keys = tokens if self.merge is None else self.merge.shape[0]
        return Sizes(
            batch, heads, width, rows, tokens, rows if self.merge is None or not self.merge_queries else keys, keys
        )

    def check(self, op: str) -> None:
        """Raise what :func:`fused_merge_attention` does where the arguments do not fit together."""
        name = "q" if op == "fused_merge_attention" else "qkv"
        self._check_unpacked() if name == "q" else self._check_packed()
        if self.merge is not None:
            check_tensor("merge", self.merge, self.q, name)
            tokens = self.sizes().tokens
            if self.merge.dim() != 2 or self.merge.shape[1] != tokens:
                raise ValueError(
                    f"merge must have shape (C, N) with N = {tokens} (the tokens of {name}), got "
                    f"{tuple(self.merge.shape)}"
                )
        sizes = self.sizes()
        shape = (sizes.batch, sizes.heads, sizes.keys)
        for option, value in (("gate", self.gate), ("key_bias", self.key_bias)):
            if value is not None:
                check_tensor(option, value, self.q, name, dtype=False)
                aligned = zip(reversed(value.shape), reversed(shape), strict=False)
                if value.dim() > 3 or any(size not in (1, expected) for size, expected in aligned):
                    raise ValueError(f"{option} must broadcast to (B, H, keys) = {shape}, got {tuple(value.shape)}")

    def _check_packed(self) -> None:
        check_tensor("qkv", self.q)
        if self.q.dim() != 5 or self.q.shape[2] != 3:
            raise ValueError(f"qkv must have shape (B, N, 3, H, d), got {tuple(self.q.shape)}")
        _check_last_dimension("qkv", self.q)

    def _check_unpacked(self) -> None:
        q, k, v = named = self[:3]
        for name, tensor in zip("qkv", named, strict=True):
            check_tensor(name, tensor)
        if q.dim() != 4:
            raise ValueError(f"q must have shape (B, H, N, d), got {tuple(q.shape)}")
        sizes = (0, 1, 3) if self.merge is None else (0, 1, 2, 3)
        if k.dim() != 4 or any(k.shape[index] != q.shape[index] for index in sizes):
            but = ", but for the number of tokens" if self.merge is None else ""
            raise ValueError(f"k must have the shape of q, {tuple(q.shape)}{but}, got {tuple(k.shape)}")
        if v.shape != k.shape:
            raise ValueError(f"v must have the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
        for name, tensor in zip("qkv", named, strict=True):
            check_tensor(name, tensor, q, "q")
            _check_last_dimension(name, tensor)

    def cast(self, dtype: torch.dtype) -> "Attention":
        """The call under autocast: the gate and the bias keep their dtype."""
        return self._replace(**{name: runtime.cast(getattr(self, name), dtype) for name in ("q", "k", "v", "merge")})

    def supported(self) -> bool:
        """Whether there are kernels for q's dtype and head width."""
        return self.q.dtype in (torch.float16, torch.bfloat16, torch.float32) and 1 <= self.q.shape[-1] <= 128

    def faster(self) -> bool:
        """Whether the kernels are faster on a GPU than PyTorch's own attention.

        They are not for long sequences without merge, gate or bias, for which it has kernels of its own, nor for
        float32 at full precision, which takes no matrix unit.
        """
        if self.q.dtype == torch.float32 and runtime.full_precision():
            return False
        sizes = self.sizes()
        plain = self.merge is None and self.gate is None and self.key_bias is None
        return not plain or max(sizes.rows, sizes.tokens) <= 256

    def results(self) -> tuple[Tensor, Tensor]:
        """Memory for the output, in which the projection that follows finds its rows contiguous, and for lse."""
        batch, heads, width, _, _, queries, _ = self.sizes()
        out = self.q.new_empty(batch, queries, heads, width).transpose(1, 2)
        return out, self.q.new_empty(batch, heads, queries, dtype=torch.float32)

    def flops(self) -> tuple[int, int]:
        """Floating-point operations of one product of the attention, and of all that merge."""
        batch, heads, width, _, tokens, queries, keys = self.sizes()
        product = 2 * batch * heads * keys * width
        return product * queries, 0 if self.merge is None else product * tokens * (3 if self.merge_queries else 2)


def _check_last_dimension(name: str, tensor: Tensor) -> None:
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(
            f"{name} must have a contiguous last dimension (stride 1), got strides {tuple(tensor.stride())}"
        )


def fused_merge_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    merge: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    merge_queries: bool = True,
) -> Tensor:
    """Merge tokens, attend and gate: ``softmax(q k^T * scale + key_bias) * gate @ v`` over merged q, k, v.

    Every tensor argument is differentiable. The gradient of a gate of ones is the gradient-weighted attention
    score of Prune and Merge (arXiv 2503.23455), ``sum_i A[i, j] * dLoss/dA[i, j]`` for key ``j``, since
    ``dLoss/dgate_j = <v_j, sum_i A[i, j] * dout_i>``: scoring needs no attention matrix.

    Args:
        q, k, v: (B, H, N, d), one floating dtype, any strides with a contiguous last dimension (views of a packed
            qkv projection are not copied). Without ``merge``, q may have another number of tokens than k and v.
        merge: (C, N), the merge matrix: the op attends over ``merge @ q``, ``merge @ k``, ``merge @ v``.
            ``None`` merges nothing.
        gate: broadcastable to (B, H, keys), multiplies the columns of the attention matrix after the softmax.
            ``keys`` is C with ``merge`` and the tokens of k without.
        key_bias: broadcastable to (B, H, keys), added to the logits before the softmax; the logarithm of the
            number of tokens that each key stands for gives proportional attention.
        scale: factor on ``q k^T``; ``None`` is ``d ** -0.5``.
        merge_queries: ``False`` leaves the queries unmerged: N queries attend over C keys.

    Returns:
        (B, H, C, d), or (B, H, N, d) where the queries are not merged.

    Raises:
        ValueError: a shape or a device does not fit; the message names the argument.
        TypeError: an argument is no floating-point tensor, or the dtypes differ outside autocast.
        RuntimeError: the backend is ``"triton"``, which has no kernel for this dtype, head width (up to 128) or
            device; or a second derivative is taken on the kernels.
    """
    return _attend(Attention(q, k, v, merge, gate, key_bias, scale, merge_queries), "fused_merge_attention")


def fused_merge_attention_qkv(
    qkv: Tensor,
    merge: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    merge_queries: bool = True,
) -> Tensor:
    """:func:`fused_merge_attention` of one packed projection, which saves its backward a copy of the gradients.

    The gradients of three views of one tensor are stacked by autograd, which reads and writes all of them once more;
    the kernels write the packed gradient at once.

    Args:
        qkv: (B, N, 3, H, d), queries, keys and values of all heads, as a ViT projects them.
        merge, gate, key_bias, scale, merge_queries: as in :func:`fused_merge_attention`.

    Returns:
        (B, H, C, d), or (B, H, N, d) where the queries are not merged.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`fused_merge_attention` does.
    """
    return _attend(Attention(qkv, None, None, merge, gate, key_bias, scale, merge_queries), "fused_merge_attention_qkv")


def _attend(call: Attention, op: str) -> Tensor:
    call, known, how = runtime.settle(call, op)
    if known.device is None:
        q, k, v = call.heads()
        _, _, _, merge, gate, key_bias, scale, merge_queries = call
        return reference.fused_merge_attention(
            q, k, v, merge, gate=gate, key_bias=key_bias, scale=scale, merge_queries=merge_queries
        )
    if how == "launch":
        return _run(call, known)[0]
    return (_Recorded.apply(known, *call) if how == "record" else attention(*call))[0]


def _run(call: Attention, known: Known) -> Sequence[Tensor]:
    """The output and ``lse`` (B, H, queries) in float32, the base-2 logarithm of each query's softmax denominator."""
    if call.merge is not None:
        call = call._replace(merge=runtime.padded(call.merge))
    with runtime.on_device(call.q):
        results = known.repeat(call[:6])
        if results is None:
            from .attention_plan import plan_forward

            results = known.run(plan_forward(known.device, call), call[:6])
    return results


def _forward(*arguments: Tensor | float | bool | None) -> tuple[Tensor, Tensor]:
    call, known, _ = runtime.settle(Attention(*arguments))
    return tuple(_run(call, known))


def _backward(
    dout: Tensor, out: Tensor, lse: Tensor, *arguments: Tensor | float | bool | list[bool] | None
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, packed (B, N, 3, H, d), and those ``wanted`` of merge, gate and key_bias, or empty."""
    *arguments, wanted = arguments
    call = given = Attention(*arguments)
    known = runtime.settle_backward(dout, out, lse, call, *wanted)
    if call.merge is not None:
        call = call._replace(merge=runtime.padded(call.merge))
    tensors = (dout, out, lse, *call[:6])
    with runtime.on_device(dout):
        results = known.repeat(tensors)
        if results is None:
            from .attention_plan import plan_backward

            results = known.run(plan_backward(known.device, call, dout, out, lse, wanted), tensors)
    dqkv, dgate, dbias, *partial_dmerges = results
    if given.k is not None and given.k.shape[2] != given.q.shape[2]:
        # Where a tensor has fewer tokens than another, its gradient's last rows are nobody's.
        dqkv[:, given.q.shape[2] :, 0].zero_()
        dqkv[:, given.k.shape[2] :, 1:].zero_()
    dmerge = sum(partial.sum(0) for partial in partial_dmerges)
    return dqkv, *(
        # The gradient is summed over what was broadcast.
        gradient.sum_to_size(tensor.shape).to(tensor.dtype) if want else dout.new_empty(0)
        for tensor, gradient, want in zip(given[3:6], (dmerge, dgate, dbias), wanted, strict=True)
    )


def _backward_fake(dout: Tensor, out: Tensor, lse: Tensor, *arguments: object) -> tuple[Tensor, ...]:
    *arguments, wanted = arguments
    call = Attention(*arguments)
    batch, heads, width, rows, tokens, _, _ = call.sizes()
    return dout.new_empty(batch, rows if rows == tokens else max(rows, tokens), 3, heads, width), *(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if want else dout.new_empty(0)
        for tensor, want in zip(call[3:6], wanted, strict=True)
    )


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, known: Known | None, *arguments: Tensor | float | bool | None
    ) -> tuple[Tensor, Tensor]:
        if known is None:
            with torch._C._AutoDispatchBelowAutograd():
                out, lse = attention(*arguments)
        else:
            out, lse = _run(Attention(*arguments), known)
        *tensors, ctx.scale, ctx.merge_queries = arguments
        ctx.save_for_backward(*tensors, out, lse)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: FunctionCtx, dout: Tensor, _: None) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:7]
        dqkv, *others = attention_backward(dout, out, lse, *tensors, ctx.scale, ctx.merge_queries, needs[3:])
        if tensors[1] is None:
            heads = (dqkv, None, None)
        else:
            heads = (dqkv[:, : x.shape[2], index].transpose(1, 2) for index, x in enumerate(tensors[:3]))
        gradients = (gradient if need else None for gradient, need in zip((*heads, *others), needs, strict=True))
        return None, *gradients, None, None


def _forward_flops(*arguments: object) -> int:
    attending, merging = Attention(*arguments).flops()
    return 2 * attending + merging


def _backward_flops(dout: Tensor, out: Tensor, lse: Tensor, *arguments: object) -> int:
    *arguments, wanted = arguments
    attending, merging = Attention(*arguments).flops()
    # The logits and the merged tokens once more, then a gradient for each factor of each product.
    return 5 * attending + (3 if wanted[0] else 2) * merging


_ARGUMENTS = (
    "Tensor q, Tensor? k, Tensor? v, Tensor? merge, Tensor? gate, Tensor? key_bias, float? scale, bool merge_queries"
)
attention = runtime.register(
    f"attention({_ARGUMENTS}) -> (Tensor out, Tensor lse)",
    _forward,
    lambda *arguments: Attention(*arguments).results(),
    _Recorded,
    _forward_flops,
)
attention_backward = runtime.register(
    f"attention_backward(Tensor dout, Tensor out, Tensor lse, {_ARGUMENTS}, bool[3] wanted) "
    "-> (Tensor dqkv, Tensor dmerge, Tensor dgate, Tensor dkey_bias)",
    _backward,
    _backward_fake,
    "fused_merge_attention cannot be differentiated twice on its kernels",
    _backward_flops,
)
