"""The token mixes as registered operators, one a direction, so that compilers, export and graphs see one node.

``pm_kernels::mix`` mixes ``[x + update; carried]`` by a matrix and returns the first ``split`` rows of the result, the
others, and the LayerNorm of the first ``normed``, where normed is 0, split, or split is all rows. ``structure`` tells
what kind of matrix it is given: none, a dense one (M, N); ``starts, chunks``, one with a list of blocks as
:class:`~pm_kernels.BlockRows` has it; ``starts, columns``, and after them the three of a
:class:`~pm_kernels.sparse.ByColumn` or nothing, the values (nonzeros,) of :class:`~pm_kernels.SparseRows`.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import reference
from .backend import kernel_device, on_device
from .namespace import NAMESPACE, OPERATORS
from .sparse import ByColumn, SparseRows

WIDEST = 4096

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_LIBRARY.define(
    "mix(Tensor x, Tensor? update, Tensor? carried, Tensor matrix, Tensor[] structure, Tensor? weight, Tensor? bias, "
    "float eps, SymInt split, SymInt normed) -> (Tensor y, Tensor rest, Tensor normed_rows)"
)
_LIBRARY.define(
    "mix_backward(Tensor? dy, Tensor? drest, Tensor? dnormed, Tensor? x, Tensor? update, Tensor? carried, Tensor? y, "
    "Tensor matrix, Tensor[] structure, Tensor? weight, float eps, SymInt first, SymInt tokens, SymInt split, "
    "SymInt normed, bool[3] wanted) -> (Tensor dx, Tensor dcarried, Tensor dmatrix, Tensor dweight, Tensor dbias)"
)
mix = OPERATORS.mix.default
mix_backward = OPERATORS.mix_backward.default


def supported(x: Tensor) -> bool:
    """Whether there are kernels for x's dtype and width."""
    return x.dtype in (torch.float16, torch.bfloat16, torch.float32) and 1 <= x.shape[-1] <= WIDEST


def _forward(
    x: Tensor,
    update: Tensor | None,
    carried: Tensor | None,
    matrix: Tensor,
    structure: list[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    split: int,
    normed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    device = kernel_device(x) if supported(x) else None
    if device is None:
        mixed = reference.token_mix(reference.joined(x, update, carried), _structured(matrix, structure))
        rows = None
        if normed:
            rows = reference.layer_norm(mixed[:, :normed], weight, bias, eps)
        parts = (mixed[:, :split].clone(), mixed[:, split:].clone(), rows)
    else:
        from . import token_mix_launch as launch

        with on_device(x):
            parts = launch.run_forward(
                device, launch.State(x, update, carried), matrix, structure, weight, bias, eps, split, normed
            )
    return tuple(x.new_empty(x.shape[0], 0, x.shape[2]) if part is None else part for part in parts)


def _backward(
    dy: Tensor | None,
    drest: Tensor | None,
    dnormed: Tensor | None,
    x: Tensor | None,
    update: Tensor | None,
    carried: Tensor | None,
    y: Tensor | None,
    matrix: Tensor,
    structure: list[Tensor],
    weight: Tensor | None,
    eps: float,
    first: int,
    tokens: int,
    split: int,
    normed: int,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    rows = _rows(matrix, structure)
    given = next(gradient for gradient in (dy, drest, dnormed) if gradient is not None)
    if dy is None:
        dy = given.new_zeros(given.shape[0], split, given.shape[2])
    if split == rows:
        drest = None
    elif drest is None:
        drest = given.new_zeros(given.shape[0], rows - split, given.shape[2])
    device = kernel_device(given) if supported(given) else None
    if device is None:
        dx, dcarried, dmatrix, daffine = _backward_written_out(
            dy, drest, dnormed, (x, update, carried), y, matrix, structure, weight, eps, first, tokens
        )
    else:
        from . import token_mix_launch as launch

        with on_device(given):
            plan = launch.plan_backward(
                device, dy, drest, dnormed, launch.State(x, update, carried), y, matrix, structure, weight, eps,
                first, tokens, wanted,
            )  # fmt: skip
            for each in plan.launches:
                each.run()
        dx, dcarried = plan.dx, plan.dcarried
        dmatrix, daffine = (None if x is None else x.sum(0) for x in (plan.partial_dmatrix, plan.partial_daffine))
    affine = daffine is not None and wanted[2]
    results = (
        dx if wanted[0] else None,
        dcarried if wanted[0] else None,
        dmatrix.to(matrix.dtype) if wanted[1] else None,
        *((x.to(weight.dtype, copy=True) for x in daffine) if affine else (None, None)),
    )
    return tuple(given.new_empty(0) if x is None else x for x in results)


def _backward_written_out(
    dy: Tensor,
    drest: Tensor | None,
    dnormed: Tensor | None,
    state: tuple[Tensor | None, ...],
    y: Tensor | None,
    matrix: Tensor,
    structure: list[Tensor],
    weight: Tensor | None,
    eps: float,
    first: int,
    tokens: int,
) -> tuple[Tensor | None, ...]:
    """The backward by PyTorch's operators, in float32 or wider."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    structured = _structured(matrix.to(wide), structure)
    sparse = isinstance(structured, SparseRows)
    dense = structured.to_dense(tokens) if sparse else structured
    gradient = (dy if drest is None else torch.cat([dy, drest], dim=1)).to(wide)
    mixed = None if state[0] is None else reference.joined(*state).to(wide)
    daffine = None
    if dnormed is not None:
        rows = dnormed.shape[1]
        normed = (y if mixed is None or not sparse else dense @ mixed)[:, :rows].to(wide)
        width = weight.shape
        _, mean, rstd = torch.native_layer_norm(normed, width, None, None, eps)
        dnorm, *daffine = torch.ops.aten.native_layer_norm_backward(
            dnormed.to(wide), normed, width, mean, rstd, weight.to(wide), weight.to(wide), [True, True, True]
        )
        daffine = torch.stack(daffine)
        gradient = torch.cat([gradient[:, :rows] + dnorm, gradient[:, rows:]], dim=1)
    dmixed = (dense.mT @ gradient).to(dy.dtype)
    dmatrix = None
    if mixed is not None:
        dmatrix = torch.einsum("bmd,bnd->mn", gradient, mixed)
        if sparse:
            entries = torch.arange(len(matrix), device=matrix.device, dtype=structure[0].dtype)
            dmatrix = dmatrix[torch.searchsorted(structure[0], entries, right=True) - 1, structure[1].long()]
    dcarried = dmixed[:, first:].clone() if first < tokens else None
    return dmixed[:, :first].clone(), dcarried, dmatrix, daffine


def _structured(matrix: Tensor, structure: list[Tensor]) -> Tensor | SparseRows:
    if matrix.dim() == 2:
        return matrix
    return SparseRows(*structure[:2], matrix, ByColumn(*structure[2:]) if structure[2:] else None)


def _rows(matrix: Tensor, structure: list[Tensor]) -> int:
    return len(structure[0]) if matrix.dim() == 1 else matrix.shape[0]


def _forward_fake(
    x: Tensor,
    update: Tensor | None,
    carried: Tensor | None,
    matrix: Tensor,
    structure: list[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    split: int,
    normed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, width = x.shape
    rows = _rows(matrix, structure)
    return tuple(x.new_empty(batch, count, width) for count in (split, rows - split, normed))


def _backward_fake(
    dy: Tensor | None,
    drest: Tensor | None,
    dnormed: Tensor | None,
    x: Tensor | None,
    update: Tensor | None,
    carried: Tensor | None,
    y: Tensor | None,
    matrix: Tensor,
    structure: list[Tensor],
    weight: Tensor | None,
    eps: float,
    first: int,
    tokens: int,
    split: int,
    normed: int,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    given = next(gradient for gradient in (dy, drest, dnormed) if gradient is not None)
    batch, _, width = given.shape
    return (
        given.new_empty(batch, first, width) if wanted[0] else given.new_empty(0),
        given.new_empty(batch, tokens - first, width) if wanted[0] and first != tokens else given.new_empty(0),
        torch.empty_like(matrix, memory_format=torch.contiguous_format) if wanted[1] else given.new_empty(0),
        *(torch.empty_like(weight) if wanted[2] and dnormed is not None else given.new_empty(0) for _ in range(2)),
    )


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        update: Tensor | None,
        carried: Tensor | None,
        matrix: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        split: int,
        normed: int,
        *structure: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            y, rest, out = mix(x, update, carried, matrix, structure, weight, bias, eps, split, normed)
        ctx.first, ctx.tokens = x.shape[1], x.shape[1] + (0 if carried is None else carried.shape[1])
        ctx.eps, ctx.split, ctx.normed = eps, split, normed
        sparse = matrix.dim() == 1
        # A sparse mix is made again in the backward, which costs less than to keep it.
        read = ctx.needs_input_grad[3] or (sparse and normed)
        state = (x, update, carried) if read else (None, None, None)
        ctx.save_for_backward(*state, y if normed and not sparse else None, matrix, weight, *structure)
        ctx.set_materialize_grads(False)
        return y, rest, out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, update, carried, y, matrix, weight, *structure = ctx.saved_tensors
        needs = ctx.needs_input_grad
        nothing = (None,) * len(needs)
        dy, drest, dnormed = gradients
        if dnormed is not None and not ctx.normed:
            dnormed = None
        if all(gradient is None for gradient in (dy, drest, dnormed)):
            return nothing
        wanted = [any(needs[:3]), needs[3], dnormed is not None and any(needs[4:6])]
        dx, dcarried, dmatrix, dweight, dbias = mix_backward(
            dy, drest, dnormed, x, update, carried, y, matrix, structure, weight, ctx.eps, ctx.first, ctx.tokens,
            ctx.split, ctx.normed, wanted,
        )  # fmt: skip
        results = (
            dx if needs[0] else None,
            dx if needs[1] else None,
            dcarried if needs[2] else None,
            dmatrix if needs[3] else None,
            dweight if wanted[2] and needs[4] else None,
            dbias if wanted[2] and needs[5] else None,
        )
        return results + nothing[len(results) :]


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, *arguments: object) -> tuple[Tensor, ...]:
        *arguments, structure = arguments
        with torch._C._AutoDispatchBelowAutograd():
            return mix_backward(*arguments[:8], list(structure), *arguments[8:])

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *_: Tensor | None) -> None:
        raise RuntimeError(
            "token mixes cannot be differentiated twice on their kernels; "
            'choose pm_kernels.backend("reference") for second derivatives'
        )


def _recorded_forward(
    x: Tensor,
    update: Tensor | None,
    carried: Tensor | None,
    matrix: Tensor,
    structure: list[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    split: int,
    normed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, update, carried, matrix, weight, bias)
    ):
        return _Mix.apply(x, update, carried, matrix, weight, bias, eps, split, normed, *structure)
    with torch._C._AutoDispatchBelowAutograd():
        return mix(x, update, carried, matrix, structure, weight, bias, eps, split, normed)


def _recorded_backward(*arguments: object) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
        return _Gradients.apply(*arguments[:8], *arguments[9:], arguments[8])
    with torch._C._AutoDispatchBelowAutograd():
        return mix_backward(*arguments)


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("mix", _forward, _key)
    _LIBRARY.impl("mix_backward", _backward, _key)
_LIBRARY.impl("mix", _recorded_forward, "Autograd")
_LIBRARY.impl("mix_backward", _recorded_backward, "Autograd")
torch.library.register_fake(mix, _forward_fake, lib=_LIBRARY)
torch.library.register_fake(mix_backward, _backward_fake, lib=_LIBRARY)


@register_flop_formula(OPERATORS.mix)
def _forward_flops(
    x: torch.Size, update: object, carried: object, matrix: torch.Size, *options: object, out_shape: object = None
) -> int:
    return _product(x, matrix)


@register_flop_formula(OPERATORS.mix_backward)
def _backward_flops(
    dy: torch.Size | None,
    drest: torch.Size | None,
    dnormed: torch.Size | None,
    x: object,
    update: object,
    carried: object,
    y: object,
    matrix: torch.Size,
    *options: object,
    out_shape: object = None,
) -> int:
    given = next(gradient for gradient in (dy, drest, dnormed) if gradient is not None)
    return sum(options[-1][:2]) * _product(given, matrix)


def _product(x: torch.Size, matrix: torch.Size) -> int:
    """Floating-point operations of one product with the matrix, or with its nonzeros where it is sparse."""
    return 2 * x[0] * x[2] * matrix.numel()
