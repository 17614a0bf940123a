"""Random kernels' inputs against float64: shapes, layouts, optional inputs, upstream gradients."""

import pytest
import torch
from helpers import ON_KERNELS, skip_without_kernels
from hypothesis import given
from hypothesis import strategies as st
from trust.cases import LAYOUTS, laid_out, ugly_sizes
from trust.exactness import DEVICE, DTYPES, check_attention, check_transition, structure_of

skip_without_kernels()
pytestmark = [pytest.mark.fuzz, *ON_KERNELS]


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
    check_attention(*case)


@st.composite
def mix_inputs(draw):
    torch.manual_seed(draw(st.integers(0, 2**31)))
    batch, tokens, total = draw(st.integers(1, 2)), draw(ugly_sizes(70)), draw(ugly_sizes(40))
    width, dtype = draw(st.one_of(ugly_sizes(70), st.sampled_from([129, 192]))), draw(st.sampled_from(DTYPES))
    carried = draw(st.integers(0, tokens - 1))
    rows = draw(st.integers(1, total))
    matrix = torch.randn(total, tokens, device=DEVICE) / tokens**0.5
    kind = draw(st.sampled_from(["dense", "sparse"]))
    if kind == "sparse":
        matrix *= torch.rand(matrix.shape, device=DEVICE) < draw(st.sampled_from([0.0, 0.03, 0.2]))

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
    return arguments, upstreams, structure_of(matrix, kind)


@given(mix_inputs())
def test_mixes(case):
    check_transition(*case)
