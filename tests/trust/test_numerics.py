"""Inputs at the edge of what numbers can hold: kernels and reference against the equations in float64."""

import pytest
import torch
from helpers import ON_KERNELS, attention_written_out, skip_without_kernels

from pm_kernels import SparseRows, backend, fused_merge_attention, token_mix, token_mix_layer_norm

skip_without_kernels()
pytestmark = [pytest.mark.fuzz, *ON_KERNELS]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["triton", "reference"]


def inputs(tokens=33, width=16):
    return tuple(torch.randn(2, 2, tokens, width, device=DEVICE) for _ in "qkv")


def both(name, qkv, **options):
    """Outputs and gradients of q, k, v, ours and by the equations with a softmax that does not overflow."""
    found = []
    for function, dtype in ((fused_merge_attention, torch.float32), (stable, torch.float64)):
        given = [x.detach().to(dtype).requires_grad_() for x in qkv]
        more = {key: x.to(dtype) if isinstance(x, torch.Tensor) else x for key, x in options.items()}
        with backend(name if function is fused_merge_attention else "reference"):
            out = function(*given, **more)
            found.append([out, *torch.autograd.grad(out.square().sum(), given)])
    return found


def stable(q, k, v, merge=None, gate=None, key_bias=None, scale=None):
    if merge is not None:
        q, k, v = (merge @ x for x in (q, k, v))
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = (logits if key_bias is None else logits + key_bias).softmax(-1)
    return (weights if gate is None else weights * gate) @ v


def assert_close(found, tolerance=1e-4):
    for ours, expected in zip(*found, strict=True):
        scale = max(expected.abs().max().item(), 1.0)
        assert ours.isfinite().all()
        assert ((ours.double() - expected).abs().max() / scale).item() <= tolerance


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("size", [30.0, 1e3])
def test_extreme_logits_are_one_hot_rows(name, size):
    q, k, v = inputs()
    assert_close(both(name, (size * q, k, v)), 1e-3)


@pytest.mark.parametrize("name", BACKENDS)
def test_keys_that_are_all_equal_give_the_mean(name):
    q, k, v = inputs()
    found = both(name, (q, k[:, :, :1].expand_as(k).contiguous(), v))
    assert_close(found)
    torch.testing.assert_close(found[0][0], v.mean(2, keepdim=True).expand_as(v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("value", [0.0, -2.0, 1e4])
def test_gates_of_any_sign_and_size(name, value):
    qkv = inputs()
    gate = torch.randn(33, device=DEVICE)
    gate[::3] = value
    assert_close(both(name, qkv, gate=gate))


@pytest.mark.parametrize("name", BACKENDS)
def test_keys_that_are_left_out(name):
    qkv = inputs()
    bias = torch.zeros(33, device=DEVICE)
    bias[4:30] = -torch.inf
    found = both(name, qkv, key_bias=bias)
    assert_close(found)
    assert (found[0][2][:, :, 4:30] == 0).all()
    assert (found[0][3][:, :, 4:30] == 0).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_an_image_whose_keys_are_all_left_out_gives_zeros(name):
    q, k, v = (x.requires_grad_() for x in inputs())
    bias = torch.zeros(2, 1, 33, device=DEVICE)
    bias[1] = -torch.inf
    with backend(name):
        out = fused_merge_attention(q, k, v, key_bias=bias)
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert out[0].isfinite().all()
    for found in (out, *gradients):
        assert (found[1] == 0).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_rows_of_zeros_in_the_merge_matrix(name):
    qkv = inputs()
    merge = torch.rand(11, 33, device=DEVICE)
    merge[::4] = 0
    assert_close(both(name, qkv, merge=merge))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_what_is_not_finite_comes_out_where_pytorch_gives_it(name, value, index):
    qkv = inputs()
    qkv[index][1, 0, 5, 3] = value
    expected = torch.nn.functional.scaled_dot_product_attention(*qkv)
    with backend(name):
        out = fused_merge_attention(*qkv)
    clean = torch.ones_like(out, dtype=torch.bool)
    clean[1, 0] = False
    torch.testing.assert_close(out[clean], expected[clean], rtol=1e-4, atol=1e-5)
    assert torch.equal(out.isnan(), expected.isnan())


def test_the_equations_agree_with_themselves():
    qkv = tuple(x.double() for x in inputs())
    torch.testing.assert_close(stable(*qkv), attention_written_out(*qkv))


STRUCTURES = {"dense": lambda matrix: matrix, "sparse": SparseRows.from_dense}


def mix_inputs():
    """x (2, 37, 45), and a matrix (11, 37) of two blocks, with one row of zeros."""
    matrix = torch.rand(11, 37, device=DEVICE) + 0.1
    matrix[:6, 17:] = 0
    matrix[6:, :17] = 0
    matrix[4] = 0
    return torch.randn(2, 37, 45, device=DEVICE), matrix


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", STRUCTURES)
def test_a_mix_of_what_is_not_finite(name, value, kind):
    """A row that takes it has it. Where the matrix is 0, a dense one gives NaN, as PyTorch's product does, and a sparse
    one does not look."""
    x, matrix = mix_inputs()
    expected = matrix @ x
    x[1, 5, 3] = value
    taking = matrix[:, 5] != 0
    with backend(name):
        found = token_mix(x, STRUCTURES[kind](matrix))
    expected[1, taking, 3] = value
    if kind == "dense":
        expected[1, ~taking, 3] = torch.nan
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", STRUCTURES)
def test_the_norm_of_rows_that_are_all_equal_is_the_bias(name, kind):
    """Zeros, and a row of one number whatever its size: no direction, no division by 0, in gradients neither."""
    x, matrix = mix_inputs()
    x[0] = 1000.0
    x.requires_grad_()
    weight, bias = torch.randn(45, device=DEVICE), torch.randn(45, device=DEVICE)
    with backend(name):
        mixed, normed = token_mix_layer_norm(x, STRUCTURES[kind](matrix), weight, bias, 1e-6)
    torch.testing.assert_close(normed[1, 4], bias)
    exact = torch.nn.functional.layer_norm(mixed.double(), (45,), weight.double(), bias.double(), 1e-6)
    torch.testing.assert_close(normed.double(), exact, rtol=1e-4, atol=1e-4)
    assert torch.autograd.grad(normed.square().sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", STRUCTURES)
def test_sums_pass_the_range_of_the_dtype_only_where_their_result_does(name, kind):
    """float16 ends at 65504: terms that cancel beyond it, and a row whose sum is."""
    x = torch.full((1, 40, 16), 6e4, dtype=torch.float16, device=DEVICE)
    matrix = torch.zeros(3, 40, dtype=torch.float16, device=DEVICE)
    matrix[0, :8], matrix[0, 8:15] = 1, -1
    matrix[1, 20:] = 1 / 20
    matrix[2, 30:] = 1
    with backend(name):
        found = token_mix(x, STRUCTURES[kind](matrix))[0]
    torch.testing.assert_close(found[:2].float(), torch.full((2, 16), 6e4, device=DEVICE), rtol=1e-3, atol=0)
    assert (found[2] == torch.inf).all()
