"""Inputs at the edge of what numbers can hold: kernels and reference against the equations in float64."""

import pytest
import torch
from helpers import ON_KERNELS, attention_written_out, skip_without_kernels

from pm_kernels import backend, fused_merge_attention

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
