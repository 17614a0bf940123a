"""Random kernels' inputs against float64: shapes, layouts, optional inputs, upstream gradients."""

import pytest
import torch
from helpers import ON_KERNELS, attention_written_out, skip_without_kernels, transition_written_out
from hypothesis import given
from hypothesis import strategies as st
from trust.cases import LAYOUTS, laid_out, ugly_sizes

from pm_kernels import BlockRows, SparseRows, backend, fused_merge_attention, reference, transition

skip_without_kernels()
pytestmark = [pytest.mark.fuzz, *ON_KERNELS]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
EPS = 1e-6


def check(function, same_in_pytorch, specification, arguments, upstreams, rounding=8):
    """Results and gradients: their error against float64 at most twice PyTorch's own in the same dtype.

    ``rounding`` is let pass in any case, in the dtype's resolution of the greatest value, or of 1.
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
    for found, repeated, other, exact in zip(ours, again, theirs, expected, strict=True):
        assert found.shape == exact.shape
        assert torch.equal(found, repeated)
        scale = max(exact.abs().max().item(), 1.0)
        error, allowed = ((value.double() - exact).abs().max().item() / scale for value in (found, other))
        floor = rounding * torch.finfo(dtype).eps + 64 * torch.finfo(torch.float32).eps
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


@st.composite
def upstream_for(draw, shape, dtype):
    """A gradient that came from somewhere: contiguous, transposed, sliced, or one number expanded."""
    kind = draw(st.sampled_from([*LAYOUTS, "expanded"]))
    if kind == "expanded":
        return torch.randn((), device=DEVICE).to(dtype).expand(shape)
    return laid_out(torch.randn(shape, device=DEVICE).to(dtype), kind)


@st.composite
def attention_inputs(draw):
    torch.manual_seed(draw(st.integers(0, 2**31)))
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    tokens, width = draw(ugly_sizes(70)), draw(st.sampled_from([1, 8, 16, 24, 32, 64]))
    dtype = draw(st.sampled_from(DTYPES))
    merged = draw(st.one_of(st.none(), ugly_sizes(40)))
    keys = tokens if merged is None else merged
    layout = draw(st.sampled_from([*LAYOUTS, "packed"]))
    if layout == "packed":  # views of one projection, as a ViT makes them
        packed = laid_out(torch.randn(batch, tokens, 3 * heads * width, device=DEVICE).to(dtype), "offset")
        q, k, v = packed.unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        q, k, v = (laid_out(torch.randn(batch, heads, tokens, width, device=DEVICE).to(dtype), layout) for _ in "qkv")
    arguments = {"q": q, "k": k, "v": v}
    if merged is not None:
        merge = torch.randn(merged, tokens, device=DEVICE) / tokens**0.5
        merge[torch.rand(merged) < 0.1] = 0
        arguments["merge"] = laid_out(merge.to(dtype), draw(st.sampled_from(LAYOUTS)))
        arguments["merge_queries"] = draw(st.booleans())
    shapes = [(keys,), (1, keys), (heads, keys), (batch, 1, keys), (batch, heads, keys)]
    for name in ("gate", "key_bias"):
        if draw(st.booleans()):
            arguments[name] = torch.randn(draw(st.sampled_from(shapes)), device=DEVICE).to(dtype)
    if draw(st.booleans()):
        arguments["scale"] = draw(st.floats(0.01, 0.5))
    rows = merged if merged is not None and arguments["merge_queries"] else tokens
    return arguments, [draw(upstream_for((batch, heads, rows, width), dtype))]


@given(attention_inputs())
def test_attention(case):
    arguments, upstreams = case
    check(
        lambda **given: [fused_merge_attention(**given)],
        lambda **given: [reference.fused_merge_attention(**given)],
        lambda **given: [attention_written_out(**given)],
        arguments,
        upstreams,
        # The softmax of one or two keys has next to no gradient: what is left of it are the roundings of large terms,
        # and PyTorch, which holds the attention matrix, may have none.
        rounding=64 if (arguments["merge"] if "merge" in arguments else arguments["k"][0, 0]).shape[0] <= 2 else 8,
    )


def mixed(x, matrix, rows, carried=None, update=None, weight=None, bias=None, structure=None, function=transition):
    if structure is not None:
        matrix = structure(matrix * (matrix != 0))  # what is not there has no gradient
    return function(x, carried, matrix, rows, update=update, norm=None if weight is None else (weight, bias, EPS))


def mix_written_out(matrix, structure=None, **arguments):
    return transition_written_out(matrix=matrix if structure is None else matrix * (matrix != 0), **arguments)


@st.composite
def mix_inputs(draw):
    torch.manual_seed(draw(st.integers(0, 2**31)))
    batch, tokens, total = draw(st.integers(1, 2)), draw(ugly_sizes(129)), draw(ugly_sizes(70))
    width, dtype = draw(st.one_of(ugly_sizes(70), st.sampled_from([192, 257]))), draw(st.sampled_from(DTYPES))
    carried = draw(st.integers(0, tokens - 1))
    rows = draw(st.integers(1, total))
    matrix = torch.randn(total, tokens, device=DEVICE) / tokens**0.5
    kind = draw(st.sampled_from(["dense", "sparse", "blocks"]))
    structure = None
    if kind == "sparse":
        matrix *= torch.rand(matrix.shape, device=DEVICE) < draw(st.sampled_from([0.0, 0.03, 0.3]))
        places = matrix != 0

        def structure(values):
            return SparseRows.from_dense(places.to(values))._replace(values=values[places])

    elif kind == "blocks":
        matrix[: total // 2, : tokens // 3] = 0
        matrix[total // 2 :, tokens // 3 :] = 0
        shape = matrix

        def structure(values):
            return BlockRows.from_dense(shape.to(values.dtype))._replace(matrix=values)

    def tensor(*sizes):
        return laid_out(torch.randn(*sizes, device=DEVICE).to(dtype), draw(st.sampled_from(LAYOUTS)))

    arguments = {"x": tensor(batch, tokens - carried, width), "matrix": matrix.to(dtype), "rows": rows}
    if carried:
        arguments["carried"] = tensor(batch, carried, width)
    if draw(st.booleans()):
        arguments["update"] = tensor(batch, tokens - carried, width)
    shapes = [(batch, rows, width), (batch, total - rows, width)]
    # Rows that are all zeros have no direction, and their LayerNorm's gradient is as large as 1 / eps.
    if draw(st.booleans()) and width > 4 and kind == "dense":
        arguments |= {name: torch.randn(width, device=DEVICE).to(dtype) for name in ("weight", "bias")}
        shapes.append(shapes[0])
    upstreams = [draw(upstream_for(shape, dtype)) for shape in shapes if shape[1]]
    return arguments, structure, upstreams


@given(mix_inputs())
def test_mixes(case):
    arguments, structure, upstreams = case
    check(
        lambda **given: mixed(**given, structure=structure),
        lambda **given: mixed(**given, function=reference.transition),
        lambda **given: mix_written_out(**given, structure=structure),
        arguments,
        upstreams,
    )
