"""Kernels against float64: results and gradients, at most twice as far from it as PyTorch's own."""

import torch
from helpers import attention_written_out, transition_written_out

from pm_kernels import SparseRows, backend, fused_merge_attention, reference, transition

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
EPS = 1e-6


def check_attention(arguments, upstreams):
    """``fused_merge_attention`` of the arguments by name, for the upstream gradient of its result."""
    check(
        lambda **given: [fused_merge_attention(**given)],
        lambda **given: [reference.fused_merge_attention(**given)],
        lambda **given: [attention_written_out(**given)],
        arguments,
        upstreams,
        terms=summed_terms(*upstreams, **arguments),
    )


def summed_terms(upstream, q, k, v, merge=None, gate=None, key_bias=None, scale=None, merge_queries=True):
    """How large what a gradient sums over the queries is, for the key that gets most, whatever cancels in it."""
    upstream, q, k, v = (x.double() for x in (upstream, q, k, v))
    if merge is not None:
        k, v = merge.double() @ k, merge.double() @ v
        q = merge.double() @ q if merge_queries else q
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    terms = upstream.abs() @ v.abs().mT
    if key_bias is not None:
        logits = logits + key_bias.double().unsqueeze(-2)
    if gate is not None:
        terms = terms * gate.double().abs().unsqueeze(-2)
    return (logits.softmax(-1) * terms).sum(-2).max().item()


def structure_of(matrix, kind):
    """What makes a dense matrix one that is stored as ``kind``, with the pattern of zeros of this one.

    Gradients of what is stored reach the dense matrix.
    """
    if kind == "sparse":
        places = matrix != 0
        return lambda values: SparseRows.from_dense(places.to(values))._replace(values=values[places])
    return None


def check_transition(arguments, upstreams, structure=None):
    """``transition`` of the arguments by name, for those of its results that are not empty.

    ``structure``, where there is one, is of :func:`structure_of`.
    """
    check(
        lambda **given: mixed(**given, structure=structure),
        lambda **given: mixed(**given, function=reference.transition),
        lambda **given: mix_written_out(**given, structure=structure),
        arguments,
        upstreams,
    )


def check(function, same_in_pytorch, specification, arguments, upstreams, terms=0.0):
    """Results and gradients: their error against float64 at most twice PyTorch's own in the same dtype.

    Four roundings to it and 8 to float32 are let pass in any case: of the greatest value, of 1, or of the ``terms`` of
    gradients, if larger.
    """

    def run(called, given, dtype):
        given = {
            name: value.detach().to(dtype).requires_grad_() if isinstance(value, torch.Tensor) else value
            for name, value in given.items()
        }
        results = [result for result in called(**given) if result is not None and result.numel()]
        inputs = [value for value in given.values() if isinstance(value, torch.Tensor)]
        gradients = torch.autograd.grad(
            results, inputs, [upstream.to(result.dtype) for result, upstream in zip(results, upstreams, strict=True)]
        )
        return [*results, *gradients]

    dtype = next(value.dtype for value in arguments.values() if isinstance(value, torch.Tensor))
    expected = run(specification, arguments, torch.float64)
    theirs = run(same_in_pytorch, arguments, dtype)
    ours, again = (run_as_given(function, arguments, upstreams) for _ in range(2))
    for index, (found, repeated, other, exact) in enumerate(zip(ours, again, theirs, expected, strict=True)):
        assert found.shape == exact.shape
        assert torch.equal(found, repeated)
        scale = max(exact.abs().max().item(), 1.0, terms if index >= len(upstreams) else 0.0)
        error, allowed = ((value.double() - exact).abs().max().item() / scale for value in (found, other))
        floor = 4 * torch.finfo(dtype).eps + 8 * torch.finfo(torch.float32).eps
        assert error <= 2 * allowed + floor, (error, allowed)


def run_as_given(function, arguments, upstreams):
    """The same on the tensors in their own memory: leaves of autograd that share it."""
    given = {
        name: value.detach().requires_grad_() if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    with backend("triton"):
        results = [result for result in function(**given) if result is not None and result.numel()]
        inputs = [value for value in given.values() if isinstance(value, torch.Tensor)]
        return [*results, *torch.autograd.grad(results, inputs, upstreams)]


def mixed(x, matrix, rows, carried=None, update=None, weight=None, bias=None, structure=None, function=transition):
    if structure is not None:
        matrix = structure(matrix * (matrix != 0))  # what is not there has no gradient
    return function(x, carried, matrix, rows, update=update, norm=None if weight is None else (weight, bias, EPS))


def mix_written_out(matrix, structure=None, **arguments):
    return transition_written_out(matrix=matrix if structure is None else matrix * (matrix != 0), **arguments)
