"""The Triton kernel that matches tokens against the specification, on a GPU or in Triton's interpreter."""

import pytest
import torch
from helpers import ON_KERNELS, skip_without_kernels
from torch.utils.flop_counter import FlopCounterMode

from pm_kernels import ByColumn, backend, match, match_tokens, merge_segments, reference, runtime, transition
from pm_kernels.matching import LONGEST, Match, match_operator
from pm_kernels.runtime import INTERPRETER

skip_without_kernels()

pytestmark = ON_KERNELS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def arguments_for(batch, tokens, width, left, prefix=1, rounds=2, options="norm+update", dtype=torch.float32):
    """Inputs of a match, on the device of the kernels."""
    x, update = torch.randn(2, batch, tokens, width)
    norm = (*torch.randn(2, width).to(DEVICE), 1e-6) if "norm" in options else None
    update = update.to(DEVICE, dtype) if "update" in options else None
    sizes = torch.randint(1, 6, (batch, tokens)).float().to(DEVICE)
    return Match(x.to(DEVICE, dtype), sizes, left, prefix, rounds, update, norm, "roots" in options)


def options_of(call):
    return {name: getattr(call, name) for name in ("update", "norm", "root_sizes")}


def matched(call, name="triton"):
    with backend(name):
        return match(*call[:5], **options_of(call))


def tensors(matching):
    starts, columns, values, by_column = matching.matrix
    return [*matching[:3], starts, columns, values, *(by_column or ())]


def compare(call):
    """The kernel against the specification, and itself, and the matrix by column against what its rows make."""
    ours, again = matched(call), matched(call)
    expected = reference.match(*call[:5], **options_of(call))
    for result, repeated in zip(tensors(ours), tensors(again), strict=True):
        assert torch.equal(result, repeated)
    assert ours.matrix.by_column._fields == ByColumn._fields
    by_column = ByColumn.of(expected.matrix.starts, expected.matrix.columns, call.x.shape[1])
    for result, value in zip(tensors(ours), [*tensors(expected), *by_column], strict=True):
        assert (result.dtype, result.shape) == (value.dtype, value.shape)
        if result.is_floating_point():
            torch.testing.assert_close(result, value, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(result, value)


@pytest.mark.parametrize("options", ["", "norm", "update", "norm+update", "roots", "norm+update+roots"])
@pytest.mark.parametrize(
    ("batch", "tokens", "width", "left", "prefix", "rounds"),
    [(1, 1, 1, 1, 0, 1), (5, 9, 7, 5, 1, 2), (3, 67, 40, 30, 2, 2), (2, 33, 500, 12, 1, 3), (2, 4, 4, 4, 4, 2)],
)
def test_matching(batch, tokens, width, left, prefix, rounds, options):
    torch.manual_seed(tokens)
    compare(arguments_for(batch, tokens, width, left, prefix, rounds, options))


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs the block sizes of its own family")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", [80, 90, 100])
def test_block_sizes_of_every_family(monkeypatch, family, dtype):
    """More sources and targets than a block has, and more images than programs."""
    torch.manual_seed(family)
    monkeypatch.setattr(runtime, "target", lambda tensor: INTERPRETER._replace(family=family))
    compare(arguments_for(3, 281, 70, 150, rounds=1, options="norm", dtype=dtype))


@pytest.mark.fuzz
@pytest.mark.exhaustive
def test_a_long_sequence():
    torch.manual_seed(0)
    compare(arguments_for(1, 1601, 8, 900, options="norm"))


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.mT.contiguous().mT,
        lambda x: x[:1].expand_as(x),
        lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],
        lambda x: torch.nn.functional.pad(x, (0, 0, 2, 3))[:, 2:-3],
    ],
    ids=["tokens-first", "width-first", "one-image-for-all", "unaligned", "part-of-more"],
)
def test_layouts(layout):
    torch.manual_seed(0)
    call = arguments_for(3, 20, 16, 11)
    x, update, sizes = layout(call.x), layout(call.update), call.sizes.T.contiguous().T
    shaped = call._replace(x=x, update=update, sizes=sizes)
    plain = call._replace(x=x.contiguous(), update=update.contiguous())
    for result, value in zip(tensors(matched(shaped)), tensors(matched(plain)), strict=True):
        assert torch.equal(result, value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_sizes_of_other_types(dtype):
    call = arguments_for(2, 20, 16, 11)
    cast = call._replace(sizes=call.sizes.to(dtype))
    for result, value in zip(tensors(matched(cast)), tensors(matched(call)), strict=True):
        assert torch.equal(result, value)


def together(segments):
    """(B, N, N), which tokens go into the same one."""
    return segments[:, :, None] == segments[:, None, :]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_decides_as_well_as_pytorch(dtype):
    """Against float64, of as many inputs that are alike as images have: which pairs of tokens are in one cluster."""
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    torch.manual_seed(0)
    call = arguments_for(6, 99, 64, 50, dtype=dtype)
    shares = torch.rand(6, 99, 5, device=DEVICE) ** 4 @ torch.randn(6, 5, 64, device=DEVICE)
    call = call._replace(x=(shares + 0.3 * call.x).to(dtype), update=0.1 * call.update)
    weight, bias, eps = call.norm
    wide = Match(call.x.double(), call.sizes.double(), *call[2:5], call.update.double(),
                 (weight.double(), bias.double(), eps))  # fmt: skip
    exact = together(matched(wide, "reference").segments)
    ours, theirs = ((together(matched(call, name).segments) != exact).sum().item() for name in ("triton", "reference"))
    assert ours <= max(2 * theirs, 0.001 * exact.sum().item())


def test_more_images_than_programs_leave_nothing_behind():
    torch.manual_seed(0)
    call = arguments_for(7, 33, 24, 15)
    whole = tensors(matched(call))
    for image in range(7):
        part = slice(image, image + 1)
        alone = call._replace(x=call.x[part], sizes=call.sizes[part], update=call.update[part])
        for result, value in zip(tensors(matched(alone)), whole, strict=True):
            assert torch.equal(result, value[part])


def test_a_merge_and_its_gradient():
    """The matrix goes into a transition as it is, and by its columns into the backward."""
    torch.manual_seed(0)
    call = arguments_for(2, 41, 24, 20)
    gradients = []
    for name in ("triton", "reference"):
        x = call.x.clone().requires_grad_()
        matching = matched(call._replace(x=x), name)
        assert not any(result.requires_grad for result in tensors(matching))
        with backend(name):
            y, _, normed = transition(x, None, matching.matrix, update=call.update, norm=call.norm)
        expected = merge_segments(x + call.update, matching.segments, call.sizes, 20)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        gradients += torch.autograd.grad(y.square().sum() + normed.square().sum(), x)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_an_empty_batch():
    matching = matched(arguments_for(0, 9, 4, 5))
    assert matching.segments.shape == (0, 9)
    assert matching.sizes.shape == (0, 5)


def test_autocast_leaves_the_features_as_they_are():
    torch.manual_seed(0)
    call = arguments_for(2, 20, 16, 11)
    with torch.autocast(DEVICE, torch.float16):
        inside = matched(call)
    for result, value in zip(tensors(inside), tensors(matched(call)), strict=True):
        assert torch.equal(result, value)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("options", ["", "norm+update"])
def test_the_operator_is_registered_soundly(options, dtype):
    call = arguments_for(2, 12, 16, 7, options=options, dtype=dtype)
    torch.library.opcheck(match_operator, call.operands())
    recorded = call._replace(x=call.x.requires_grad_())
    torch.library.opcheck(match_operator, recorded.operands())
    assert not any(result.requires_grad for result in match_operator(*recorded.operands()))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch 2.11 in its own tracing
@pytest.mark.parametrize("recorded", [False, True])
def test_compiles_without_breaks(recorded):
    torch.manual_seed(0)
    call = arguments_for(2, 20, 16, 11)
    x = call.x.requires_grad_(recorded)

    def merge(x, sizes, update, weight, bias):
        with backend("triton"):
            matching = match(x, sizes, 11, update=update, norm=(weight, bias, 1e-6))
            y, _, normed = transition(x, None, matching.matrix, update=update, norm=(weight, bias, 1e-6))
        return matching.segments, matching.log_sizes, y, normed

    arguments = (x, call.sizes, call.update, *call.norm[:2])
    compiled = torch.compile(merge, fullgraph=True, backend="aot_eager")
    results = [compiled(*arguments), merge(*arguments)]
    if recorded:
        results = [[*parts, *torch.autograd.grad(parts[2].square().sum(), x)] for parts in results]
    for result, value in zip(*results, strict=True):
        torch.testing.assert_close(result, value)


def test_exports_as_one_node():
    torch.manual_seed(0)

    class Matches(torch.nn.Module):
        def forward(self, x, sizes):
            with backend("triton"):
                return match_tokens(x, sizes, 5)

    batch = torch.export.Dim("batch", min=2, max=64)
    example = (torch.randn(2, 9, 8, device=DEVICE), torch.ones(2, 9, device=DEVICE))
    program = torch.export.export(Matches(), example, dynamic_shapes=({0: batch}, {0: batch}))
    assert [node.target for node in program.graph.nodes].count(match_operator) == 1
    more = (torch.randn(5, 9, 8, device=DEVICE), torch.ones(5, 9, device=DEVICE))
    for result, value in zip(program.module()(*more), Matches()(*more), strict=True):
        assert torch.equal(result, value)


def test_flops_are_those_of_sources_with_targets():
    call = arguments_for(3, 12, 8, 7)
    with FlopCounterMode(display=False) as counter:
        matched(call)
    # Of 11 patches, 3 go in the first round and 2 of the 8 that are left in the second.
    assert reference.merges_by_round(11, 6, 2) == [3, 2]
    assert counter.get_total_flops() == 2 * 3 * 8 * (6 * 5 + 4 * 4)


@pytest.mark.skipif(DEVICE == "cuda", reason="what is refused on a CPU")
def test_what_there_is_no_kernel_for():
    """It is refused where kernels are insisted on, and PyTorch's otherwise."""
    long = torch.randn(1, LONGEST + 1, 2)
    for features in (torch.randn(1, 9, 4).double(), torch.randn(1, 9, 5000), long):
        count = features.shape[1]
        with backend("triton"), pytest.raises(RuntimeError, match="kernel of match_tokens: there is none for"):
            match_tokens(features, torch.ones(1, count), count - 3)
    segments, _ = match_tokens(long, torch.ones(1, LONGEST + 1), LONGEST)
    assert segments.shape == (1, LONGEST + 1)
