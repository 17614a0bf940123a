"""fused_merge_attention against softmax attention written out in float64, and its errors."""

import pytest
import torch
from helpers import attention_written_out, packed_qkv

from pm_kernels import fused_merge_attention, fused_merge_attention_qkv


@pytest.mark.parametrize("merge_queries", [True, False])
@pytest.mark.parametrize("options", ["", "gate", "key_bias", "gate+key_bias+scale"])
@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "merged"),
    [(1, 1, 1, None), (2, 3, 17, None), (3, 1, 17, 7), (1, 3, 7, 17), (2, 2, 33, 1), (2, 2, 1, 1)],
)
def test_output_and_gradients(batch, heads, tokens, merged, options, merge_queries):
    (q, k, v), qkv = packed_qkv(batch, heads, tokens, 16)
    keys = tokens if merged is None else merged
    arguments = {"merge_queries": merge_queries}
    if merged is not None:
        arguments["merge"] = torch.randn(merged, tokens, dtype=torch.float64, requires_grad=True)
    if "gate" in options:
        arguments["gate"] = torch.randn(heads, keys, dtype=torch.float64, requires_grad=True)
    if "key_bias" in options:
        arguments["key_bias"] = torch.randn(keys, dtype=torch.float64, requires_grad=True)
    if "scale" in options:
        arguments["scale"] = 0.37
    out = fused_merge_attention(q, k, v, **arguments)
    expected = attention_written_out(q, k, v, **arguments)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)

    inputs = [qkv] + [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(out, inputs, upstream)
    expected_gradients = torch.autograd.grad(expected, inputs, upstream)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10)


def test_fewer_queries_than_keys():
    (q, k, v), _ = packed_qkv(2, 3, 9, 4)
    gate, bias = torch.randn(2, 9, dtype=torch.float64)
    out = fused_merge_attention(q[:, :, :2], k, v, gate=gate, key_bias=bias)
    torch.testing.assert_close(out, attention_written_out(q, k, v, gate=gate, key_bias=bias)[:, :, :2])


def test_gate_gradient_is_gradient_weighted_attention():
    """The first identity: the gradient of a gate of ones is the column sum of A * dLoss/dA."""
    (q, k, v), _ = packed_qkv(2, 3, 19, 8)
    gate = torch.ones(19, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 3, 19, 8, dtype=torch.float64)
    out = fused_merge_attention(q, k, v, gate=gate)
    (score,) = torch.autograd.grad((out - target).pow(3).sum(), gate)

    weights = torch.softmax(q @ k.transpose(-1, -2) * 8**-0.5, dim=-1).detach().requires_grad_()
    (weights_gradient,) = torch.autograd.grad((weights @ v.detach() - target).pow(3).sum(), weights)
    torch.testing.assert_close(score, (weights * weights_gradient).sum(dim=(0, 1, 2)), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("shape", [(9,), (1,), (3, 9), (2, 1, 9), (2, 3, 1), (1, 3, 9)])
def test_gate_and_bias_broadcast(shape):
    (q, k, v), _ = packed_qkv(2, 3, 9, 4)
    gate, bias = torch.randn(2, *shape, dtype=torch.float64)
    torch.testing.assert_close(
        fused_merge_attention(q, k, v, gate=gate, key_bias=bias),
        attention_written_out(q, k, v, gate=gate, key_bias=bias),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_error_is_that_of_pytorch(dtype):
    (q, k, v), _ = packed_qkv(2, 3, 65, 32, dtype=torch.float32)
    half = [tensor.detach().to(dtype) for tensor in (q, k, v)]
    exact = attention_written_out(*(tensor.double() for tensor in half))
    ours = (fused_merge_attention(*half, gate=torch.ones(65)).double() - exact).abs().max()
    theirs = (torch.nn.functional.scaled_dot_product_attention(*half).double() - exact).abs().max()
    assert ours <= 2 * theirs


def test_autocast_takes_mixed_dtypes_like_a_matmul():
    (q, k, v), _ = packed_qkv(1, 2, 9, 8, dtype=torch.float32)
    merge = torch.randn(4, 9)
    with torch.autocast("cpu", torch.bfloat16):
        out = fused_merge_attention(q, k, v.bfloat16(), merge, gate=torch.ones(4), key_bias=torch.zeros(4))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), attention_written_out(q, k, v, merge), rtol=0.1, atol=0.1)


def test_empty_batch():
    q = torch.randn(0, 2, 5, 4)
    assert fused_merge_attention(q, q, q, torch.randn(3, 5)).shape == (0, 2, 3, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.randn(2, 9, 4)}, ValueError, r"q must have shape \(B, H, N, d\), got \(2, 9, 4\)"),
        (
            {"k": torch.randn(2, 2, 9, 4)},
            ValueError,
            r"k must have the shape of q, \(2, 3, 9, 4\), but for the number of tokens, got \(2, 2, 9, 4\)",
        ),
        (
            {"k": torch.randn(2, 3, 8, 4), "merge": torch.randn(6, 9)},
            ValueError,
            r"k must have the shape of q, \(2, 3, 9, 4\), got \(2, 3, 8, 4\)",
        ),
        ({"v": torch.randn(2, 3, 8, 4)}, ValueError, r"v must have the shape of k, \(2, 3, 9, 4\), got \(2, 3, 8, 4\)"),
        ({"v": torch.randn(2, 3, 4, 9).mT}, ValueError, r"v must have a contiguous last dimension"),
        (
            {"v": torch.randn(2, 3, 9, 4).half()},
            TypeError,
            r"v must have the dtype of q, torch.float32, got torch.float",
        ),
        ({"v": torch.ones(2, 3, 9, 4).long()}, TypeError, r"v must be floating point, got torch.int64"),
        ({"merge": [[1.0]]}, TypeError, r"merge must be a torch.Tensor, got list"),
        (
            {"merge": torch.randn(6, 8)},
            ValueError,
            r"merge must have shape \(C, N\) with N = 9 \(the tokens of q\), got \(6, 8\)",
        ),
        ({"gate": torch.randn(8)}, ValueError, r"gate must broadcast to \(B, H, keys\) = \(2, 3, 9\), got \(8,\)"),
        ({"key_bias": torch.randn(2, 2, 9)}, ValueError, r"key_bias must broadcast to .*got \(2, 2, 9\)"),
        ({"gate": torch.randn(1, 2, 3, 9)}, ValueError, r"gate must broadcast to"),
        ({"gate": torch.randn(9, device="meta")}, ValueError, r"gate must be on cpu, the device of q, got meta"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    q, k, v = torch.randn(3, 2, 3, 9, 4)
    arguments = {"q": q, "k": k, "v": v} | change
    with pytest.raises(error, match=message):
        fused_merge_attention(**arguments)


def test_packed_projection():
    (q, k, v), qkv = packed_qkv(2, 3, 9, 4)
    merge = torch.randn(5, 9, dtype=torch.float64)
    torch.testing.assert_close(fused_merge_attention_qkv(qkv, merge), fused_merge_attention(q, k, v, merge))
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_merge_attention_qkv(qkv.float(), merge.float()).dtype == torch.bfloat16
    for wrong in (qkv[:, :, :2], qkv[0], qkv[..., 0]):
        with pytest.raises(ValueError, match=r"qkv must have shape \(B, N, 3, H, d\), got"):
            fused_merge_attention_qkv(wrong)
    with pytest.raises(ValueError, match="qkv must have a contiguous last dimension"):
        fused_merge_attention_qkv(qkv[..., ::2])
    with pytest.raises(ValueError, match=r"merge must have shape \(C, N\) with N = 9"):
        fused_merge_attention_qkv(qkv, merge[:, :8])
    with pytest.raises(TypeError, match="qkv must be a torch.Tensor, got list"):
        fused_merge_attention_qkv([1.0])
