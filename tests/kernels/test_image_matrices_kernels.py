"""The gathers by sparse rows of each image's own against float64, on a GPU or in Triton's interpreter."""

import pytest
import torch
from helpers import ON_KERNELS, skip_without_kernels, transition_written_out
from torch.utils.flop_counter import FlopCounterMode

from pm_kernels import ByColumn, SparseRows, backend, reference, token_mix, transition
from pm_kernels.mixing import Mix, mix, mix_backward
from pm_kernels.runtime import INTERPRETER

skip_without_kernels()
from pm_kernels import mixing_plan  # noqa: E402  # needs Triton

pytestmark = ON_KERNELS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = ("", "norm", "update", "carried", "norm+update+carried")
STATE = ("x", "update", "carried")
EPS = 1e-6


def matrices_of(batch, rows, tokens, entries, dtype=torch.float32):
    """Matrices with ``entries`` nonzeros at random places of each; rows and columns may be empty, or crowded."""
    places = torch.stack([torch.randperm(rows * tokens)[:entries].sort().values for _ in range(batch)])
    starts = torch.searchsorted(places, torch.arange(rows).expand(batch, -1).contiguous() * tokens)
    return SparseRows(starts.int(), (places % tokens).int(), torch.randn(batch, entries).to(dtype))


def arguments_for(options, batch, tokens, rows, width, entries):
    carried = tokens // 3 if "carried" in options else 0
    arguments = {"x": torch.randn(batch, tokens - carried, width)}
    if carried:
        arguments["carried"] = torch.randn(batch, carried, width)
    if "update" in options:
        arguments["update"] = torch.randn(batch, tokens - carried, width)
    if "norm" in options:
        arguments |= {"weight": torch.randn(width), "bias": torch.randn(width)}
    matrix = matrices_of(batch, rows, tokens, entries)
    return arguments | {"values": matrix.values}, matrix, rows - (rows // 3 if carried else 0)


def leaves(arguments, device="cpu", dtype=None):
    return {name: value.detach().to(device, dtype).requires_grad_() for name, value in arguments.items()}


def exactly(matrix, tokens, kept, values, x, carried=None, update=None, weight=None, bias=None):
    """Image by image, with dense matrices."""
    dense = matrix._replace(values=values).to_dense(tokens)
    parts = []
    for image in range(len(x)):
        state = (None if part is None else part[image : image + 1] for part in (carried, update))
        parts.append(transition_written_out(x[image : image + 1], dense[image], kept, *state, weight, bias, EPS))
    return [torch.cat(images) for images in zip(*parts, strict=True)]


def kernel(matrix, kept, values, x, carried=None, update=None, weight=None, bias=None, name="triton"):
    matrix = SparseRows(matrix.starts.to(x.device), matrix.columns.to(x.device), values, matrix.by_column)
    norm = None if weight is None else (weight, bias, EPS)
    with backend(name):
        return [y for y in transition(x, carried, matrix, kept, update=update, norm=norm) if y is not None]


def run(function, arguments, upstreams):
    results = [result for result in function(**arguments) if result.numel()]
    upstreams = [upstream.to(result) for result, upstream in zip(results, upstreams, strict=True)]
    return results + list(torch.autograd.grad(results, list(arguments.values()), upstreams))


def compare(arguments, matrix, kept, tokens):
    exact = leaves(arguments, dtype=torch.float64)
    upstreams = [torch.randn(y.shape) for y in exactly(matrix, tokens, kept, **exact) if y.numel()]
    expected = run(lambda **a: exactly(matrix, tokens, kept, **a), exact, upstreams)
    ours = leaves(arguments, DEVICE)
    results, again = (run(lambda **a: kernel(matrix, kept, **a), ours, upstreams) for _ in range(2))
    for result, repeated, value in zip(results, again, expected, strict=True):
        assert torch.equal(result, repeated)
        torch.testing.assert_close(result.cpu().double(), value, rtol=1e-4, atol=1e-4)


SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 17, 5, 7, 20),
    (3, 5, 17, 33, 19),
    (2, 1, 9, 4, 3),
    (3, 9, 1, 20, 4),
    (2, 67, 41, 48, 67),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("batch", "tokens", "rows", "width", "entries"), SHAPES)
def test_transition(batch, tokens, rows, width, entries, options):
    compare(*arguments_for(options, batch, tokens, rows, width, entries), tokens)


@pytest.mark.parametrize("width", [384, 500, 1152])
def test_widths(width):
    compare(*arguments_for("norm+update+carried", 2, 9, 7, width, 12), 9)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_entries_by_column_are_used_as_given(dtype):
    """Given or worked out in the backward, in either integer type."""
    arguments, matrix, kept = arguments_for("norm", 3, 12, 8, 10, 17)
    matrix = SparseRows(matrix.starts.to(dtype), matrix.columns.to(dtype), matrix.values)
    by_column = ByColumn(*(part.to(DEVICE) for part in ByColumn.of(matrix.starts, matrix.columns, 12)))
    compare(arguments, matrix._replace(by_column=by_column), kept, 12)
    compare(arguments, matrix, kept, 12)


def test_the_same_matrix_for_every_image_gives_the_bits_of_a_shared_one():
    """Also where its tensors are expanded, not copied."""
    arguments, matrix, kept = arguments_for("norm+update", 1, 12, 8, 10, 17)
    del arguments["values"]
    shared = SparseRows(*(part[0].to(DEVICE) for part in matrix[:3]))
    own = SparseRows(*(part.expand(3, -1) for part in shared[:3]))
    results = []
    for taken in (shared, own):
        inputs = {name: x.repeat(3, 1, 1) if x.dim() == 3 else x for name, x in leaves(arguments, DEVICE).items()}
        results.append(run(lambda taken=taken, **a: kernel(taken, kept, taken.values, **a), inputs,
                           [torch.ones(3, 8, 10)] * 2))  # fmt: skip
    for result, value in zip(*results, strict=True):
        assert torch.equal(result, value)


def test_entries_that_do_not_lie_side_by_side():
    matrix = matrices_of(2, 5, 7, 6)
    apart = SparseRows(*(torch.stack([part, part], dim=2).to(DEVICE)[..., 0] for part in matrix[:3]))
    x = torch.randn(2, 7, 8, device=DEVICE)
    for image in (None, 0):
        given = apart if image is None else SparseRows(*(part[image] for part in apart[:3]))
        with backend("triton"):
            out = token_mix(x, given)
        torch.testing.assert_close(out, reference.token_mix(x, given), rtol=1e-5, atol=1e-5)


def test_an_image_does_not_depend_on_its_batch():
    arguments, matrix, kept = arguments_for("norm+update+carried", 5, 33, 29, 24, 33)
    values = leaves(arguments, DEVICE)
    together = kernel(matrix, kept, **values)
    alone = {name: value[3:4] if value.dim() > 1 else value for name, value in values.items()}
    alone = kernel(SparseRows(*(part[3:4] for part in matrix[:3])), kept, **alone)
    for result, value in zip(alone, together, strict=True):
        assert torch.equal(result, value[3:4])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_error_is_that_of_pytorch(dtype):
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    arguments, matrix, kept = arguments_for("norm+carried", 2, 80, 70, 96, 120)
    half = {name: x if name in ("weight", "bias") else x.to(dtype) for name, x in arguments.items()}
    exact = leaves(half, dtype=torch.float64)
    upstreams = [torch.randn(y.shape).to(dtype) for y in exactly(matrix, 80, kept, **exact)]
    expected = run(lambda **a: exactly(matrix, 80, kept, **a), exact, upstreams)
    errors = []
    for name in ("triton", "reference"):
        results = run(lambda name=name, **a: kernel(matrix, kept, **a, name=name), leaves(half, DEVICE), upstreams)
        errors.append([(x.cpu().double() - y).abs().mean() for x, y in zip(results, expected, strict=True)])
    for ours, theirs, value in zip(*errors, expected, strict=True):
        assert ours <= max(2 * theirs, 1e-7 * value.abs().mean())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize("options", ["", "norm+update+carried"])
def test_operators_are_registered_soundly(options):
    arguments, matrix, kept = arguments_for(options, 2, 12, 9, 16, 14)
    tensors = leaves(arguments)
    norm = (tensors["weight"], tensors["bias"], EPS) if "norm" in options else None
    call = Mix(*(tensors.get(name) for name in STATE), matrix._replace(values=tensors["values"]), norm, kept, kept)
    inputs = call.operands()
    torch.library.opcheck(mix, inputs)
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    y, rest, out = mix(*plain)
    gradients = (torch.randn_like(y), torch.randn_like(rest) if "carried" in options else None,
                 torch.randn_like(out) if norm else None)  # fmt: skip
    wanted = [True, True, norm is not None]
    torch.library.opcheck(mix_backward, (*gradients, None, plain[0].shape[1], 12, *plain, wanted))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch 2.11 in its own tracing
def test_compiles_without_breaks():
    arguments, matrix, kept = arguments_for("norm+update+carried", 2, 12, 9, 8, 14)
    tensors, matrix = leaves(arguments, DEVICE), SparseRows(*(part.to(DEVICE) for part in matrix[:3]))
    upstreams = [torch.randn(2, rows, 8) for rows in (kept, 9 - kept, kept)]
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    results = (run(lambda take=take, **a: take(matrix, kept, **a), tensors, upstreams) for take in (compiled, kernel))
    for result, value in zip(*results, strict=True):
        torch.testing.assert_close(result, value)


def test_flops_are_those_of_every_image():
    x, matrix = torch.randn(2, 9, 8, requires_grad=True), matrices_of(2, 7, 9, 11)
    with FlopCounterMode(display=False) as counter, backend("triton"):
        token_mix(x, matrix).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 2 * 11 * 8


@pytest.mark.parametrize(("batch", "wide"), [(2**20, torch.int64), (2**10, torch.int32)])
def test_entries_of_all_images_are_numbered_in_a_type_that_reaches(batch, wide):
    """More than 2^31 of them take 64 bits."""

    def integers(count):
        return torch.empty(batch, count, dtype=torch.int32, device="meta")

    by_column = ByColumn(integers(9), integers(2**12), integers(2**12))
    matrix = SparseRows(integers(5), integers(2**12), torch.empty(batch, 2**12, device="meta"), by_column)
    x, dy = (torch.empty(batch, count, 8, device="meta") for count in (9, 5))
    plan = mixing_plan.plan_backward(
        INTERPRETER, Mix(x, None, None, matrix), (dy, None, None), None, 9, 9, (True, False, False)
    )
    assert plan.launches[0].arguments["p_starts"].dtype == wide
