"""The Triton kernels of the token mixes against float64, on a GPU or in Triton's interpreter."""

import collections

import pytest
import torch
from covering import REST, pairs
from helpers import ON_KERNELS, skip_without_kernels, transition_written_out
from torch.utils.flop_counter import FlopCounterMode

from pm_kernels import (
    ByColumn,
    SparseRows,
    backend,
    reference,
    runtime,
    token_mix,
    token_mix_layer_norm,
    transition,
)
from pm_kernels.mixing import Mix, mix, mix_backward
from pm_kernels.runtime import INTERPRETER, Device

skip_without_kernels()
from pm_kernels import mixing_plan  # noqa: E402  # needs Triton

pytestmark = ON_KERNELS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ("sparse", "sparse-unordered", "dense")
SWITCH = (False, True)
EPS = 1e-6


def matrix_of(kind, rows, tokens):
    """A matrix with empty rows and columns: about two nonzeros a row, or all of them."""
    matrix = torch.randn(rows, tokens) / max(1, tokens) ** 0.5
    if kind.startswith("sparse"):
        matrix *= torch.rand(rows, tokens) < 2 / tokens
    if rows > 4:
        matrix[3] = 0
    return matrix


def structured(kind, dense, values):
    """The matrix as the op takes it, differentiable in ``values``, which stand in it where they stand in ``dense``."""
    if kind == "dense":
        return values
    matrix = SparseRows.from_dense(dense)._replace(values=values[dense != 0])
    return matrix if kind == "sparse" else matrix._replace(by_column=None)


def arguments_for(options, batch, tokens, width, matrix):
    """Inputs of a transition: about a third of the tokens are carried, and of the rows."""
    carried = tokens // 3 if "carried" in options else 0
    rows = len(matrix) - (len(matrix) // 3 if carried else 0)
    arguments = {"x": torch.randn(batch, tokens - carried, width), "matrix": matrix, "rows": rows}
    if carried:
        arguments["carried"] = torch.randn(batch, carried, width)
    if "update" in options:
        arguments["update"] = torch.randn(batch, tokens - carried, width)
    if "norm" in options:
        arguments |= {"weight": torch.randn(width), "bias": torch.randn(width)}
    return arguments


def on(device, arguments, dtype=None):
    return {
        name: value.detach().to(device, dtype).requires_grad_() if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


def kernel(kind, x, matrix, rows, carried=None, update=None, weight=None, bias=None, name="triton"):
    norm = None if weight is None else (weight, bias, EPS)
    with backend(name):
        results = transition(x, carried, structured(kind, matrix.detach(), matrix), rows, update=update, norm=norm)
    return [result for result in results if result is not None]


def run(function, arguments, upstreams):
    """Every result, and the gradient of every tensor argument."""
    results = [result for result in function(**arguments) if result.numel()]
    inputs = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    upstreams = [upstream.to(result) for result, upstream in zip(results, upstreams, strict=True)]
    return results + list(torch.autograd.grad(results, inputs, upstreams))


def compare(kind, arguments, tolerance=1e-4):
    """The kernels against float64, and against themselves, bit for bit."""
    exact = on("cpu", arguments, torch.float64)
    upstreams = [torch.randn(result.shape) for result in transition_written_out(**exact) if result.numel()]
    expected = run(transition_written_out, exact, upstreams)
    held = matrix_gradient_held(kind, arguments["matrix"])
    ours = on(DEVICE, arguments)
    results, again = (run(lambda **a: kernel(kind, **a), ours, upstreams) for _ in range(2))
    for result, repeated, value in zip(results, again, expected, strict=True):
        assert torch.equal(result, repeated)
        if value.shape == held.shape:
            value = value * held
        torch.testing.assert_close(result.cpu().double(), value, rtol=tolerance, atol=tolerance)


def matrix_gradient_held(kind, matrix):
    """Which entries of the matrix have a gradient: with sparse rows, the nonzeros."""
    return matrix != 0 if kind.startswith("sparse") else torch.ones_like(matrix, dtype=torch.bool)


Shape = collections.namedtuple("Shape", "batch tokens rows width")
SHAPES = [
    Shape(1, 1, 1, 1),
    Shape(2, 17, 5, 7),
    Shape(1, 5, 17, 33),
    Shape(1, 1, 9, 4),
    Shape(3, 9, 1, 20),
    Shape(1, 131, 67, 48),
    Shape(2, 37, 129, 96),
]


@pytest.mark.parametrize(*pairs(shape=SHAPES, kind=KINDS, norm=SWITCH, update=SWITCH, carried=SWITCH))
def test_transition(shape, kind, norm, update, carried):
    options = [name for name, given in {"norm": norm, "update": update, "carried": carried}.items() if given]
    matrix = matrix_of(kind, shape.rows, shape.tokens)
    compare(kind, arguments_for(options, shape.batch, shape.tokens, shape.width, matrix))


@pytest.mark.parametrize(*pairs({"width": (384, 768, 1152)}, width=(192, 500, 1664, 2050), kind=("sparse", "dense")))
def test_widths(width, kind):
    compare(kind, arguments_for("norm+update+carried", 1, 9, width, matrix_of(kind, 7, 9)))


@pytest.mark.parametrize(("tokens", "rows"), [(4097, 3), (3, 700)])
def test_long_sequences(tokens, rows):
    compare("sparse", arguments_for("norm+carried", 1, tokens, 16, matrix_of("sparse", rows, tokens)))


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs the block sizes of its own family")
@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize("family", [pytest.param(80, marks=REST), 90, pytest.param(100, marks=REST)])
def test_block_sizes_of_every_family(monkeypatch, family, kind):
    """A small device with several blocks of rows to each program, where gradients are summed."""
    device = INTERPRETER._replace(family=family, multiprocessors=1)
    monkeypatch.setattr(runtime, "target", lambda tensor: device)
    compare(kind, arguments_for("norm+carried", 5, 70, 40, matrix_of(kind, 66, 70)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [None, 0, 1, 5])
def test_token_mix_layer_norm_of_the_first_rows(kept, kind):
    """Rows that are not normalised have a gradient of their own, and come back in the same tensor."""
    dense = matrix_of(kind, 9, 11)
    values = {"x": torch.randn(2, 11, 12), "matrix": dense, "weight": torch.randn(12), "bias": torch.randn(12)}

    def ours(x, matrix, weight, bias):
        with backend("triton"):
            return token_mix_layer_norm(x, structured(kind, dense.to(DEVICE), matrix), weight, bias, EPS, kept)

    def exact(x, matrix, weight, bias):
        count = 9 if kept is None else kept
        mixed = torch.einsum("mn,bnd->bmd", matrix, x)
        return mixed, transition_written_out(x, matrix[:count], count, weight=weight, bias=bias)[2]

    upstreams = [torch.randn(2, 9, 12)] + ([] if kept == 0 else [torch.randn(2, 9 if kept is None else kept, 12)])
    names = list(values) if kept != 0 else ["x", "matrix"]

    def gradients(function, arguments):
        results = [result for result in function(**arguments) if result.numel()]
        taken = [u.to(result) for result, u in zip(results, upstreams, strict=True)]
        return results + list(torch.autograd.grad(results, [arguments[name] for name in names], taken))

    expected = gradients(exact, on("cpu", values, torch.float64))
    for result, value in zip(gradients(ours, on(DEVICE, values)), expected, strict=True):
        if value.shape == dense.shape:
            value = value * matrix_gradient_held(kind, dense)
        torch.testing.assert_close(result.cpu().double(), value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (1, 2)])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_results_that_nothing_uses(kind, used):
    """Only some of y, rest and LayerNorm(y) have an upstream gradient."""
    arguments = arguments_for("norm+carried", 2, 12, 10, matrix_of(kind, 9, 12))

    def gradients(results, inputs):
        loss = sum((results[index] * (1 + index)).square().sum() for index in used)
        return torch.autograd.grad(loss, [inputs["x"], inputs["matrix"], inputs["carried"]])

    exact, ours = on("cpu", arguments, torch.float64), on(DEVICE, arguments)
    held = matrix_gradient_held(kind, arguments["matrix"])
    expected = gradients(transition_written_out(**exact), exact)
    for result, value in zip(gradients(kernel(kind, **ours), ours), expected, strict=True):
        value = value * held if value.shape == held.shape else value
        torch.testing.assert_close(result.cpu().double(), value, rtol=1e-4, atol=1e-4)


LAYOUTS = {
    "tokens-first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "width-first": lambda x: x.mT.contiguous().mT,
    "one-image-for-all": lambda x: x[:1].expand_as(x),
    "one-row-for-all": lambda x: x[:, :1].expand_as(x),
    "unaligned": lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],
    "part-of-more": lambda x: torch.nn.functional.pad(x, (0, 0, 2, 3))[:, 2:-3],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_layouts_of_inputs_and_upstream_gradients(kind, layout):
    """Every stride gives the same bits as contiguous memory, forward and backward."""
    arguments = on(DEVICE, arguments_for("norm+update+carried", 2, 20, 16, matrix_of(kind, 18, 20)))
    shaped = {
        name: LAYOUTS[layout](value.detach()).requires_grad_() if value is not None and name in STATE else value
        for name, value in arguments.items()
    }
    plain = {
        name: value.detach().contiguous().requires_grad_() if name in STATE else value for name, value in shaped.items()
    }
    upstreams = [LAYOUTS[layout](torch.randn_like(result)) for result in kernel(kind, **plain)]
    ours = run(lambda **a: kernel(kind, **a), shaped, upstreams)
    theirs = run(lambda **a: kernel(kind, **a), plain, [upstream.contiguous() for upstream in upstreams])
    for result, value in zip(ours, theirs, strict=True):
        assert torch.equal(result, value)


STATE = ("x", "update", "carried")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_index_types(dtype):
    dense = matrix_of("sparse", 9, 12)
    matrix = SparseRows.from_dense(dense.to(DEVICE))
    cast = ByColumn(*(indices.to(dtype) for indices in matrix.by_column))
    matrix = SparseRows(matrix.starts.to(dtype), matrix.columns.to(dtype), matrix.values.requires_grad_(), cast)
    x = torch.randn(2, 12, 8, device=DEVICE, requires_grad=True)
    for taken in (matrix, matrix._replace(by_column=None)):
        with backend("triton"):
            out = token_mix(x, taken)
        dx, dvalues = torch.autograd.grad(out.sum(), (x, taken.values))
        torch.testing.assert_close(out.detach().cpu(), torch.einsum("mn,bnd->bmd", dense, x.detach().cpu()))
        torch.testing.assert_close(dx.cpu(), dense.sum(0)[None, :, None].expand(2, 12, 8))
        total = x.detach().cpu().sum((0, 2))
        torch.testing.assert_close(dvalues.cpu(), total.expand(9, 12)[dense != 0])


def test_columns_that_occur_twice_in_a_row():
    rows, columns = torch.tensor([0, 0, 0, 2]), torch.tensor([1, 1, 2, 0])
    values = torch.randn(4)
    dense = torch.zeros(3, 3).index_put((rows, columns), values, accumulate=True)
    matrix = SparseRows(torch.tensor([0, 3, 3]).int(), columns.int(), values)
    x = torch.randn(2, 3, 8, device=DEVICE, requires_grad=True)
    given = SparseRows(*(indices.to(DEVICE) for indices in matrix[:2]), values.to(DEVICE).requires_grad_())
    with backend("triton"):
        out = token_mix(x, given)
    dx, dvalues = torch.autograd.grad(out.square().sum(), (x, given.values))
    expected = torch.einsum("mn,bnd->bmd", dense, x.detach().cpu())
    torch.testing.assert_close(out.detach().cpu(), expected)
    torch.testing.assert_close(dx.cpu(), torch.einsum("mn,bmd->bnd", dense, 2 * expected))
    gradient = torch.einsum("bmd,bnd->mn", 2 * expected, x.detach().cpu())
    torch.testing.assert_close(dvalues.cpu(), gradient[rows, columns], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_half_precision_error_is_that_of_pytorch(dtype, kind):
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    dense = matrix_of(kind, 70, 80).to(dtype)
    arguments = arguments_for("norm+carried", 2, 80, 96, dense)
    half = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and name not in ("weight", "bias") else value
        for name, value in arguments.items()
    }
    exact = on("cpu", half, torch.float64)
    upstreams = [torch.randn(result.shape).to(dtype) for result in transition_written_out(**exact)]
    expected = run(transition_written_out, exact, upstreams)
    held = matrix_gradient_held(kind, dense)
    errors = []
    for name in ("triton", "reference"):
        results = run(lambda name=name, **a: kernel(kind, **a, name=name), on(DEVICE, half), upstreams)
        pairs = zip(results, expected, strict=True)
        errors.append([(x.cpu().double() - (y * held if y.shape == held.shape else y)).abs().mean() for x, y in pairs])
    for ours, theirs, value in zip(*errors, expected, strict=True):
        assert ours <= max(2 * theirs, 1e-7 * value.abs().mean())  # the norm's own gradients are in float32


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_rows_far_from_zero(kind):
    """The variance of rows whose mean is a thousand times their spread."""
    x = torch.randn(2, 9, 64) + 1000
    matrix = torch.eye(9)
    weight, bias = torch.ones(64), torch.zeros(64)
    y, normed = kernel(kind, *(t.to(DEVICE) for t in (x, matrix)), 9, weight=weight.to(DEVICE), bias=bias.to(DEVICE))
    expected = transition_written_out(x.double(), matrix.double(), 9, weight=weight, bias=bias)[2]
    torch.testing.assert_close(y.cpu(), x)
    torch.testing.assert_close(normed.cpu().double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_an_image_does_not_depend_on_its_batch(kind):
    arguments = arguments_for("norm+update+carried", 5, 33, 24, matrix_of(kind, 29, 33))
    together = kernel(kind, **{k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})
    alone = {k: v[3:4] if k in STATE else v for k, v in arguments.items()}
    alone = kernel(kind, **{k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in alone.items()})
    for result, value in zip(alone, together, strict=True):
        assert torch.equal(result, value[3:4])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_nan_and_infinity_come_out_where_pytorch_gives_them(kind, value):
    x, matrix = torch.randn(2, 9, 8), matrix_of(kind, 7, 9)
    x[0, 4, 3] = value
    weight, bias = torch.randn(2, 8)
    options = {"weight": weight.to(DEVICE), "bias": bias.to(DEVICE)}
    ours = kernel(kind, x.to(DEVICE), matrix.to(DEVICE), 7, **options)
    theirs = kernel(kind, x.to(DEVICE), matrix.to(DEVICE), 7, **options, name="reference")
    for result, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch_and_no_rows(kind):
    for batch, rows in ((0, 7), (2, 0)):
        matrix = matrix_of(kind, rows, 9)
        arguments = on(DEVICE, arguments_for("norm+update+carried", batch, 9, 8, matrix))
        results = kernel(kind, **arguments)
        assert [result.shape[0] for result in results] == len(results) * [batch]
        sum(result.sum() for result in results).backward()
        assert not arguments["x"].grad.any()
        assert batch or not arguments["weight"].grad.any()


def test_no_entries():
    x = torch.randn(2, 5, 8, device=DEVICE, requires_grad=True)
    matrix = SparseRows.from_dense(torch.zeros(3, 5, device=DEVICE))
    with backend("triton"):
        out = token_mix(x, matrix)
    assert out.shape == (2, 3, 8)
    assert not out.any()
    out.sum().backward()
    assert not x.grad.any()


def test_autocast_takes_part_like_a_matmul():
    dense = matrix_of("sparse", 7, 9).to(DEVICE)
    x = torch.randn(2, 9, 8, device=DEVICE)
    norm = (torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE), EPS)
    with torch.autocast(DEVICE, torch.float16), backend("triton"):
        results = [transition(x, x[:, :0], m, 5, norm=norm) for m in (dense, SparseRows.from_dense(dense))]
        assert {result.dtype for parts in results for result in parts} == {torch.float16}
    for result, value in zip(*results, strict=True):
        torch.testing.assert_close(result, value, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_double_backward_is_refused(kind):
    x = torch.randn(1, 5, 8, device=DEVICE, requires_grad=True)
    matrix = matrix_of("dense", 4, 5).to(DEVICE).requires_grad_()
    (y,) = kernel(kind, x, matrix, 4)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice on their kernels; choose .*reference"):
        torch.autograd.grad(gradient.sum(), x)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch 2.11 in its own tracing
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_compiles_without_breaks(kind):
    dense = matrix_of(kind, 9, 12).to(DEVICE)
    arguments = on(DEVICE, arguments_for("norm+update+carried", 2, 12, 8, dense.cpu()))
    matrix = SparseRows.from_dense(dense) if kind == "sparse" else dense

    def take(x, matrix, rows, carried, update, weight, bias):
        with backend("triton"):
            return transition(x, carried, matrix, rows, update=update, norm=(weight, bias, EPS))

    arguments["matrix"] = matrix
    compiled = torch.compile(take, fullgraph=True, backend="aot_eager")
    tensors = [arguments[name] for name in ("x", "carried", "update", "weight", "bias")]
    results = []
    for function in (compiled, take):
        out = function(**arguments)
        results.append([*out, *torch.autograd.grad(sum(x.square().sum() for x in out), tensors)])
    for result, value in zip(*results, strict=True):
        torch.testing.assert_close(result, value)


def test_exports_as_one_node():
    matrix = SparseRows.from_dense(matrix_of("sparse", 7, 9).to(DEVICE))

    class Mixes(torch.nn.Module):
        def forward(self, x):
            with backend("triton"):
                return token_mix(x, matrix)

    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Mixes(), (torch.randn(2, 9, 8, device=DEVICE),), dynamic_shapes=({0: batch},))
    assert [node.target for node in program.graph.nodes].count(mix) == 1
    more = torch.randn(5, 9, 8, device=DEVICE)
    torch.testing.assert_close(program.module()(more), reference.token_mix(more, matrix))


def operator_arguments(kind, options, dtype):
    dense = matrix_of(kind, 9, 12).to(dtype)
    arguments = on("cpu", arguments_for(options, 2, 12, 16, dense), dtype)
    matrix = structured(kind, dense, arguments["matrix"].detach())
    norm = (arguments["weight"], arguments["bias"], EPS) if "norm" in options else None
    x, update, carried = (arguments.get(name) for name in STATE)
    update = None if kind == "dense" else update
    inputs = list(Mix(x, update, carried, matrix, norm, arguments["rows"], arguments["rows"]).operands())
    inputs[3] = inputs[3].detach().requires_grad_()
    return tuple(inputs)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize(*pairs(kind=KINDS, extras=SWITCH, dtype=(torch.float32, torch.float16)))
def test_operators_are_registered_soundly(kind, extras, dtype):
    inputs = operator_arguments(kind, "norm+update+carried" if extras else "", dtype)
    torch.library.opcheck(mix, inputs)
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    x, _, carried, values = plain[:4]
    y, rest, out = mix(*plain)
    normed = plain[-1]
    tokens = x.shape[1] + (0 if carried is None else carried.shape[1])
    gradients = (torch.randn_like(y), torch.randn_like(rest) if carried is not None else None,
                 torch.randn_like(out) if normed else None)  # fmt: skip
    saved = y if values.dim() == 2 and normed else None
    wanted = [True, True, bool(normed)]
    torch.library.opcheck(mix_backward, (*gradients, saved, x.shape[1], tokens, *plain, wanted))


def test_flops_are_those_of_the_products():
    x, dense = torch.randn(2, 9, 8, requires_grad=True), torch.randn(7, 9, requires_grad=True)

    def flops(matrix):
        with FlopCounterMode(display=False) as counter, backend("triton"):
            out = token_mix(x, matrix)
            forward = counter.get_total_flops()
            out.sum().backward()
        return forward, counter.get_total_flops()

    product = 2 * 2 * 7 * 9 * 8
    assert flops(dense) == (product, 3 * product)
    sparse = SparseRows.from_dense(dense.detach() * (torch.rand(7, 9) < 0.3))
    entries = 2 * 2 * len(sparse.columns) * 8
    assert flops(sparse) == (entries, 2 * entries)


@pytest.mark.parametrize("width", [*range(1, 70), 192, 384, 500, 768, 1152, 1280, 1408, 1664, 2049, 4096])
def test_pieces_cover_and_only_the_last_reaches_past(width):
    pieces = mixing_plan.column_pieces(width)
    assert sum(pieces[:-1]) < width <= sum(pieces)
    assert len(pieces) <= 3
    assert all(piece >= 16 and piece & (piece - 1) == 0 for piece in pieces)


HOPPER = Device(family=90, multiprocessors=132, shared=227 * 1024)


def test_large_offsets():
    """Rows further apart than 32 bits reach are copied; a grid past what a device takes is refused."""
    matrix, starts = torch.empty(9, device="meta"), torch.empty(9, dtype=torch.int32, device="meta")
    wide = torch.empty(1, device="meta").as_strided((1, 9, 64), (2**35, 2**31, 1))

    def planned(x):
        call = Mix(x, None, None, SparseRows(starts, starts, matrix))
        return mixing_plan.plan_forward(HOPPER, call).launches[0]

    far, near = planned(wide), planned(torch.empty(1, 9, 64, device="meta"))
    assert far.arguments["stride_xn"] == near.arguments["stride_xn"] == 64
    launch = planned(torch.empty(2**31, 9, 64, device="meta"))
    with pytest.raises(ValueError, match="gather_forward would need .* programs, more than 2"):
        launch.run()


@pytest.mark.skipif(DEVICE == "cuda", reason="what is refused on a CPU")
def test_what_there_is_no_kernel_for_is_refused():
    with backend("triton"):
        with pytest.raises(RuntimeError, match="kernel of token_mix: Triton's interpreter computes bfloat16 wrongly"):
            token_mix(torch.randn(1, 3, 4).bfloat16(), torch.randn(2, 3).bfloat16())
        with pytest.raises(RuntimeError, match=r"kernel of transition: there is none for .* \(1, 3, 5000\)"):
            transition(torch.randn(1, 3, 5000), None, torch.randn(2, 3), 2)
