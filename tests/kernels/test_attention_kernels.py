"""The Triton kernels of fused_merge_attention against float64, on a GPU or in Triton's interpreter."""

import collections

import pytest
import torch
from covering import pairs
from helpers import ON_KERNELS, attention_written_out, packed_qkv, skip_without_kernels
from torch.utils.flop_counter import FlopCounterMode

from pm_kernels import backend, fused_merge_attention, fused_merge_attention_qkv, reference, runtime
from pm_kernels.attention import Attention, attention, attention_backward
from pm_kernels.launches import Launch
from pm_kernels.runtime import INTERPRETER, Device

skip_without_kernels()
from pm_kernels import attention_plan  # noqa: E402  # needs Triton

pytestmark = ON_KERNELS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (1, 7, 16, 17, 118, 129, 197, 257)
SWITCH = (False, True)
Lengths = collections.namedtuple("Lengths", "tokens merged", defaults=[None])
HOPPER = Device(family=90, multiprocessors=132, shared=227 * 1024)


def arguments_for(batch, heads, tokens, merged, gate=False, key_bias=False, merge_queries=True):
    """Optional inputs in float32, each of another shape that broadcasts; the merge matrix has rows of zeros."""
    keys = tokens if merged is None else merged
    arguments = {"merge_queries": merge_queries}
    if merged is not None:
        merge = torch.randn(merged, tokens) / tokens**0.5
        merge[::5] *= torch.arange(len(merge[::5])).eq(0).logical_not().unsqueeze(1)  # the first row, and no other
        arguments["merge"] = merge
    if gate:
        arguments["gate"] = torch.randn(batch, 1, keys) if keys % 2 else torch.randn(keys)
    if key_bias:
        arguments["key_bias"] = torch.randn(keys) if keys % 2 else torch.randn(heads, keys)
    return arguments


def on(device, arguments, dtype=None):
    return {
        name: value.detach().to(device, dtype).requires_grad_() if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


def run(function, qkv, views, arguments, upstream):
    """The output and the gradients of the packed projection and of every optional input."""
    out = function(*views(qkv), **arguments)
    inputs = [qkv] + [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    return [out, *torch.autograd.grad(out, inputs, upstream)]


def kernel(*inputs, **arguments):
    with backend("triton"):
        return fused_merge_attention(*inputs, **arguments)


def unpacked(qkv):
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def compare(qkv, arguments, views=unpacked, specification=attention_written_out, tolerance=1e-4):
    """The kernels against float64, and against themselves, bit for bit."""
    exact = [qkv.detach().double().requires_grad_(), on("cpu", arguments, torch.float64)]
    upstream = torch.randn(specification(*views(exact[0]), **exact[1]).shape)
    expected = run(specification, exact[0], views, exact[1], upstream.double())
    ours = [qkv.detach().to(DEVICE).requires_grad_(), on(DEVICE, arguments)]
    results = run(kernel, ours[0], views, ours[1], upstream.to(DEVICE))
    again = run(kernel, ours[0], views, ours[1], upstream.to(DEVICE))
    for result, repeated, reference_result in zip(results, again, expected, strict=True):
        assert torch.equal(result, repeated)
        torch.testing.assert_close(result.cpu().double(), reference_result, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("merge_queries", [True, False])
def test_heads_of_width_one_in_any_memory(merge_queries):
    """Where heads do not lie side by side, they still can be viewed as if they did; their rows are not contiguous."""
    qkv = torch.randn(3, 2, 3, 9, 1)
    arguments = arguments_for(2, 3, 9, 4, merge_queries=merge_queries)
    compare(qkv, arguments, views=torch.Tensor.unbind)


@pytest.mark.parametrize(*pairs(tokens=LENGTHS, batch=(1, 2), heads=(1, 2), gate=SWITCH, key_bias=SWITCH))
def test_attention(tokens, batch, heads, gate, key_bias):
    _, qkv = packed_qkv(batch, heads, tokens, 16, dtype=torch.float32)
    compare(qkv, arguments_for(batch, heads, tokens, None, gate, key_bias))


@pytest.mark.parametrize("shape", [(), (3, 1), (2, 1, 9), (1, 3, 9), (2, 1, 1)], ids=str)
def test_what_shares_a_gate_and_a_bias(shape):
    _, qkv = packed_qkv(2, 3, 9, 16, dtype=torch.float32)
    compare(qkv, {"gate": torch.rand(shape) + 0.5, "key_bias": torch.randn(shape)})


@pytest.mark.parametrize(
    *pairs(
        {"merged": (7, 16, 129, 197)},
        tokens=LENGTHS,
        merged=(1, 17, 118, 257),
        gate=SWITCH,
        key_bias=SWITCH,
        merge_queries=SWITCH,
    )
)
def test_merged_attention(tokens, merged, gate, key_bias, merge_queries):
    """To fewer tokens and to more."""
    batch, heads = ((1, 1), (3, 3), (1, 3), (3, 1))[tokens // 2 % 4] if max(tokens, merged) < 190 else (2, 1)
    _, qkv = packed_qkv(batch, heads, tokens, 16, dtype=torch.float32)
    compare(qkv, arguments_for(batch, heads, tokens, merged, gate, key_bias, merge_queries))


@pytest.mark.parametrize(
    *pairs(
        {"lengths": (Lengths(150),)},
        width=(1, 20, 32, 64, 80, 96, 128),
        lengths=(Lengths(37), Lengths(37, 70), Lengths(300)),
    )
)
def test_head_widths(width, lengths):
    _, qkv = packed_qkv(1, 2, lengths.tokens, width, dtype=torch.float32)
    compare(qkv, arguments_for(1, 2, *lengths, gate=True, key_bias=True))


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs the block sizes of its own family")
@pytest.mark.parametrize(
    *pairs(
        family=(80, 90, 100),
        lengths=[
            *map(Lengths, (50, 118, 150, 197)),
            *(Lengths(197, 40), Lengths(197, 118), Lengths(130, 150), Lengths(50, 197)),
        ],
        extras=SWITCH,
    )
)
def test_block_sizes_of_every_family(monkeypatch, family, lengths, extras):
    """Heads of 64, which have block sizes of their own on each family of GPUs."""
    monkeypatch.setattr(runtime, "target", lambda tensor: INTERPRETER._replace(family=family))
    _, qkv = packed_qkv(1, 1, lengths.tokens, 64, dtype=torch.float32)
    compare(qkv, arguments_for(1, 1, *lengths, gate=extras, key_bias=extras))


LAYOUTS = {
    "heads-first": lambda qkv: [x.contiguous() for x in unpacked(qkv)],
    "fewer-queries": lambda qkv: [unpacked(qkv)[0][:, :, :3], *unpacked(qkv)[1:]],
    "more-queries": lambda qkv: [unpacked(qkv)[0], *(x[:, :, 5:17] for x in unpacked(qkv)[1:])],
    "one-batch-for-all": lambda qkv: [x[:1].expand(2, -1, -1, -1) for x in unpacked(qkv)],
    "unaligned": lambda qkv: [x[..., 1:14] for x in unpacked(qkv)],
    "tokens-first": lambda qkv: qkv.permute(1, 0, 2, 3, 4).contiguous().permute(2, 1, 3, 0, 4).unbind(0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    _, qkv = packed_qkv(2, 3, 40, 16, dtype=torch.float32)
    keys = LAYOUTS[layout](qkv)[1].shape[2]
    compare(qkv, arguments_for(2, 3, keys, None, gate=True, key_bias=True), LAYOUTS[layout])


@pytest.mark.parametrize(
    *pairs(
        {"lengths": (Lengths(260, 261),)},
        layout=("heads-first", "one-batch-for-all", "unaligned", "tokens-first"),
        lengths=(Lengths(40, 41), Lengths(40, 261)),
    )
)
def test_layouts_merged(layout, lengths):
    heads = 3 if lengths.merged < 190 else 1
    _, qkv = packed_qkv(2, heads, lengths.tokens, 16, dtype=torch.float32)
    compare(qkv, arguments_for(2, heads, *lengths, gate=True), LAYOUTS[layout])


UPSTREAMS = {
    "transposed": lambda shape: torch.randn(*shape[:2], shape[3], shape[2]).mT,
    "sliced": lambda shape: torch.randn(*shape[:3], 2 * shape[3])[..., ::2],
    "expanded": lambda shape: torch.randn(*shape[:2], 1, 1).expand(shape),
    "expanded-rows": lambda shape: torch.randn(*shape[:2], 1, shape[3]).expand(shape),
}


@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_strided_upstream_gradients(upstream):
    _, qkv = packed_qkv(2, 2, 19, 16, dtype=torch.float32)
    qkv = qkv.detach().to(DEVICE).requires_grad_()
    given = UPSTREAMS[upstream]((2, 2, 19, 16)).to(DEVICE)
    results = run(kernel, qkv, unpacked, {}, given)
    for result, expected in zip(results, run(kernel, qkv, unpacked, {}, given.contiguous()), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "width", "merged"), [(118, 64, None), (197, 64, None), (300, 32, None), (65, 64, 33)]
)
def test_half_precision_error_is_that_of_pytorch(dtype, tokens, width, merged):
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    _, qkv = packed_qkv(1, 2, tokens, width, dtype=torch.float32)
    qkv = qkv.detach().to(dtype)
    arguments = arguments_for(1, 2, tokens, merged)
    half = {name: value.to(dtype) if name == "merge" else value for name, value in arguments.items()}
    exact = on("cpu", half, torch.float64)
    upstream = torch.randn(1, 2, merged or tokens, width).to(dtype)
    expected = run(attention_written_out, qkv.double().requires_grad_(), unpacked, exact, upstream.double())
    errors = []
    for function, device in ((kernel, DEVICE), (reference.fused_merge_attention, DEVICE)):
        results = run(function, qkv.to(device).requires_grad_(), unpacked, on(device, half), upstream.to(device))
        errors.append([(x.cpu().double() - y).abs().mean() for x, y in zip(results, expected, strict=True)])
    for ours, theirs in zip(*errors, strict=True):
        assert ours <= 2 * theirs


@pytest.mark.parametrize("tokens", [9, 130, 300])
def test_keys_that_are_masked(tokens):
    """A bias of -inf on some keys takes them out; on all keys, nothing is attended to, and nothing is NaN."""
    _, qkv = packed_qkv(2, 2, tokens, 16, dtype=torch.float32)
    qkv = qkv.detach().to(DEVICE).requires_grad_()
    bias = torch.zeros(2, 1, tokens, device=DEVICE)
    bias[0, :, ::3] = -torch.inf
    bias[1] = -torch.inf
    upstream = torch.randn(2, 2, tokens, 16, device=DEVICE)
    out, dqkv, dbias = run(kernel, qkv, unpacked, {"key_bias": bias.requires_grad_()}, upstream)
    kept = torch.arange(tokens) % 3 != 0
    q, k, v = unpacked(qkv.detach()[:1])
    expected = reference.fused_merge_attention(q, k[:, :, kept], v[:, :, kept])
    torch.testing.assert_close(out[:1], expected, rtol=1e-4, atol=1e-4)
    assert not out[1].any()
    assert not dqkv[1].any()
    assert not dqkv[0, ::3, 1:].any()
    assert dbias.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("tokens", [18, 290])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_nan_and_infinity_come_out_where_pytorch_gives_them(index, tokens, value):
    _, qkv = packed_qkv(1, 2, tokens, 16, dtype=torch.float32)
    qkv = qkv.detach().to(DEVICE)
    qkv[0, 5, index, 1, 3] = value
    out = kernel(*unpacked(qkv))
    expected = attention_written_out(*unpacked(qkv.double()))
    # Where infinite logits of both signs meet, some rows overflow in float32 and not in float64.
    assert torch.equal(out[:, 0].isfinite(), expected[:, 0].isfinite())
    assert not out[:, 1].isfinite().all()
    if value != value:
        assert torch.equal(out.isnan(), expected.isnan())


def test_large_logits():
    _, qkv = packed_qkv(1, 1, 40, 16, dtype=torch.float32)
    compare(30 * qkv.detach(), {}, specification=reference.fused_merge_attention, tolerance=1e-2)
    compare(qkv, {"key_bias": 1e4 + torch.randn(40)}, specification=reference.fused_merge_attention, tolerance=1e-2)
    compare(qkv, {"key_bias": -1e4 + torch.randn(40)}, specification=reference.fused_merge_attention, tolerance=1e-2)


@pytest.mark.parametrize("merged", [None, 3])
def test_empty_batch(merged):
    qkv = torch.randn(0, 5, 3, 2, 16, device=DEVICE, requires_grad=True)
    arguments = on(DEVICE, arguments_for(1, 2, 5, merged))
    out = kernel(*unpacked(qkv), **arguments)
    assert out.shape == (0, 2, merged or 5, 16)
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape
    if merged is not None:
        assert not arguments["merge"].grad.any()


def test_no_keys_and_no_queries():
    q = torch.randn(2, 2, 5, 16, device=DEVICE)
    assert not kernel(q, q[:, :, :0], q[:, :, :0]).any()
    assert kernel(q[:, :, :0], q, q).shape == (2, 2, 0, 16)
    assert kernel(q, q, q, torch.ones(0, 5, device=DEVICE)).shape == (2, 2, 0, 16)


def test_output_memory_needs_no_copy_before_the_projection():
    qkv = torch.randn(2, 9, 3, 4, 16, device=DEVICE)
    for out in (kernel(*unpacked(qkv)), kernel(*unpacked(qkv), torch.ones(5, 9, device=DEVICE))):
        assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("packed", [True, False])
def test_double_backward_is_refused(packed):
    qkv = torch.randn(1, 5, 3, 1, 16, device=DEVICE, requires_grad=True)
    with backend("triton"):
        out = fused_merge_attention_qkv(qkv) if packed else fused_merge_attention(*unpacked(qkv))
    (gradient,) = torch.autograd.grad(out.sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice on its kernels; choose .*reference"):
        torch.autograd.grad(gradient.sum(), qkv)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch 2.11 in its own tracing
@pytest.mark.parametrize("packed", [True, False])
def test_compiles_without_breaks(packed):
    qkv = torch.randn(2, 9, 3, 2, 16, device=DEVICE, requires_grad=True)
    arguments = on(DEVICE, arguments_for(2, 2, 9, 5, gate=True, key_bias=True))
    upstream = torch.randn(2, 2, 5, 16, device=DEVICE)

    def attend(qkv, **arguments):
        with backend("triton"):
            if packed:
                return fused_merge_attention_qkv(qkv, **arguments)
            return fused_merge_attention(*unpacked(qkv), **arguments)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results, expected = (run(function, qkv, lambda qkv: [qkv], arguments, upstream) for function in (compiled, attend))
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value)


def test_exports_as_one_node():
    class Attends(torch.nn.Module):
        def forward(self, qkv):
            return kernel(*unpacked(qkv))

    qkv = torch.randn(2, 9, 3, 2, 16, device=DEVICE)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Attends(), (qkv,), dynamic_shapes=({0: batch},))
    assert [node.target for node in program.graph.nodes].count(attention) == 1
    more = torch.randn(5, 9, 3, 2, 16, device=DEVICE)
    torch.testing.assert_close(program.module()(more), reference.fused_merge_attention(*unpacked(more)))


Call = collections.namedtuple("Call", "queries tokens merged merge_queries", defaults=[None, True])
OPCHECKS = [Call(4, 4), Call(9, 9, 5), Call(9, 9, 5, False), Call(3, 9)]


class Operators(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("merge_queries", [True, False])
@pytest.mark.parametrize("merged", [None, 7])
def test_packed_gradients_are_not_copied(merged, merge_queries):
    _, qkv = packed_qkv(2, 2, 19, 16, dtype=torch.float32)
    qkv = qkv.detach().to(DEVICE).requires_grad_()
    arguments = on(DEVICE, arguments_for(2, 2, 19, merged, True, True, merge_queries))
    expected = run(kernel, qkv, unpacked, arguments, torch.ones((), device=DEVICE).expand(2, 2, 19, 16)
                   if merged is None or not merge_queries else torch.ones(2, 2, 7, 16, device=DEVICE))  # fmt: skip
    with backend("triton"):
        out = fused_merge_attention_qkv(qkv, **arguments)
        inputs = [qkv] + [value for value in arguments.values() if isinstance(value, torch.Tensor)]
        with Operators() as operators:
            gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
    for result, value in zip([out, *gradients], expected, strict=True):
        assert torch.equal(result, value)
    assert "attention_backward" in operators.names
    assert not {"stack", "cat", "copy_", "clone", "add"} & set(operators.names)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize(*pairs(case=OPCHECKS, dtype=(torch.float32, torch.float16), packed=SWITCH))
def test_operators_are_registered_soundly(case, dtype, packed):
    queries, tokens, merged, merge_queries = case
    queries = tokens if packed else queries
    qkv = torch.randn(2, tokens, 3, 2, 16, dtype=dtype, requires_grad=True)
    q, k, v = (x.detach().requires_grad_() for x in unpacked(qkv))
    q = q.detach()[:, :, :queries].requires_grad_()
    options = arguments_for(2, 2, tokens, merged, gate=True, key_bias=True)
    merge = None if merged is None else options["merge"].to(dtype).requires_grad_()
    gate, key_bias = (options[name].requires_grad_() for name in ("gate", "key_bias"))
    heads = (qkv.detach().requires_grad_(), None, None) if packed else (q, k, v)
    inputs = (*heads, merge, gate, key_bias, 0.25, merge_queries)
    torch.library.opcheck(attention, inputs)
    out, lse = attention(*(x.detach() if isinstance(x, torch.Tensor) else x for x in inputs))
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    wanted = [merged is not None, True, True]
    torch.library.opcheck(attention_backward, (torch.randn_like(out), out, lse, *plain, wanted))


def test_flops_are_those_of_the_products():
    q = torch.randn(2, 3, 17, 16, requires_grad=True)
    product = 2 * 2 * 3 * 17 * 17 * 16

    def flops(function):
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    out = attention(q, q, q, None, None, None, 0.25, True)[0]
    assert (
        flops(lambda: attention(q, q, q, None, None, None, 0.25, True)) == flops(lambda: (q @ q.mT) @ q) == 2 * product
    )
    assert flops(lambda: out.sum().backward()) == 5 * product
    merge = torch.randn(5, 17)
    merged = flops(lambda: attention(q.detach(), q.detach(), q.detach(), merge, None, None, 0.25, True))
    assert merged == 2 * 3 * (4 * 5 * 5 * 16 + 3 * 2 * 5 * 17 * 16)


@pytest.mark.parametrize("count", range(1, 257))
def test_pieces_cover_and_only_the_last_reaches_past(count):
    for pieces in (
        attention_plan.pieces(count),
        *(
            tiles.pieces
            for family in (80, 90, 100)
            for merged in (True, False)
            if (tiles := attention_plan.backward_tiles(Device(family, 1, 2**18), 2, 64, count, merged, True))
        ),
    ):
        assert sum(pieces[:-1]) < count <= sum(pieces)


def plan(batch, heads, tokens, width, device=HOPPER, views=unpacked):
    qkv = torch.empty(batch, tokens, 3, heads, width, dtype=torch.float16, device="meta")
    return planned(device, *views(qkv))


def planned(device, q, k, v):
    """The launches of a forward."""
    call = Attention(q, k, v)
    return attention_plan.plan_forward(device, call).launches


def test_large_grids():
    forward = plan(70000, 12, 577, 64)
    assert forward[0].programs == 70000 * 12 * 5
    with pytest.raises(ValueError, match="forward_streaming would need 4200000000 programs, more than 2"):
        plan(70_000_000, 12, 577, 64)[0].run()


def test_rows_past_the_reach_of_32_bits_are_copied():
    packed = plan(4, 1, 64, 64)
    assert packed[0].arguments["Q_STRIDE"] == 3 * 64
    wide = torch.empty(64, 2**26, dtype=torch.float16, device="meta")
    q = wide.as_strided((1, 1, 64, 64), (2**32, 64, 2**26, 1))
    copied = planned(HOPPER, q, q, q)
    assert copied[0].arguments["Q_STRIDE"] == 64


def test_a_head_is_one_program_where_there_are_many():
    assert plan(256, 6, 197, 64)[0].programs == 256 * 6
    assert plan(1, 6, 197, 64)[0].programs == 6 * 4


def test_small_devices_get_programs_that_fit():
    consumer = Device(family=80, multiprocessors=84, shared=99 * 1024)
    assert attention_plan.backward_tiles(consumer, 2, 64, 197, False, True) is None
    assert attention_plan.backward_tiles(consumer, 2, 64, 128, False, True) is not None


def test_a_launch_without_programs_does_nothing():
    Launch(kernel=None, programs=0, arguments={}, warps=4, stages=1).run()


@pytest.mark.skipif(DEVICE == "cuda", reason="what is refused on a CPU")
def test_what_the_interpreter_cannot_do_is_refused(monkeypatch):
    q = torch.randn(1, 1, 5, 16)
    with pytest.raises(RuntimeError, match="interpreter computes bfloat16 wrongly; take float32 or float16"):
        kernel(q.bfloat16(), q.bfloat16(), q.bfloat16())
    with pytest.raises(RuntimeError, match=r"there is none for torch.float64 tensors of shape \(1, 1, 5, 16\)"):
        kernel(q.double(), q.double(), q.double())
    wide = torch.randn(1, 1, 5, 160)
    with pytest.raises(RuntimeError, match="fused_merge_attention: there is none for .* 160"):
        kernel(wide, wide, wide)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="it needs CUDA tensors, got cpu; .* TRITON_INTERPRET=1 set before Python"):
        kernel(q, q, q)
