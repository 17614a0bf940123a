"""token_mix and token_mix_layer_norm against sums written out in float64, and their errors."""

import pytest
import torch

from pm_kernels import SparseRows, token_mix, token_mix_layer_norm


def layer_norm_written_out(x, weight, bias, eps):
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight + bias


SHAPES = [(1, 1, 1, 1), (2, 17, 5, 7), (3, 5, 17, 33), (1, 1, 9, 4), (2, 9, 1, 4)]


@pytest.mark.parametrize(("batch", "tokens", "rows", "width"), SHAPES)
def test_token_mix(batch, tokens, rows, width):
    x = torch.randn(batch, tokens, width, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(rows, tokens, dtype=torch.float64, requires_grad=True)
    out, expected = token_mix(x, matrix), torch.einsum("mn,bnd->bmd", matrix, x)
    torch.testing.assert_close(out, expected)
    assert torch.autograd.gradcheck(token_mix, (x, matrix))


def sparse_and_dense(rows, tokens, entries, dtype=torch.float64):
    """Random entries, with empty rows, and columns that occur twice in a row."""
    row = torch.randint(0, rows, (entries,)).sort().values
    column = torch.randint(0, tokens, (entries,))
    values = torch.randn(entries, dtype=dtype)
    dense = torch.zeros(rows, tokens, dtype=dtype)
    for i, j, value in zip(row, column, values, strict=True):
        dense[i, j] += value
    starts = torch.tensor([int((row < i).sum()) for i in range(rows)])
    return SparseRows(starts.int(), column.int(), values), dense


@pytest.mark.parametrize("entries", [0, 1, 7, 40])
@pytest.mark.parametrize(("batch", "tokens", "rows", "width"), SHAPES)
def test_sparse_rows_are_the_dense_matrix(batch, tokens, rows, width, entries):
    x = torch.randn(batch, tokens, width, dtype=torch.float64, requires_grad=True)
    sparse, dense = sparse_and_dense(rows, tokens, entries)
    dense.requires_grad_()
    torch.testing.assert_close(sparse.to_dense(tokens), dense)
    again = SparseRows.from_dense(dense.detach())
    values = sparse.values.requires_grad_()
    for matrix in (sparse, sparse._replace(starts=sparse.starts.long(), columns=sparse.columns.long()), again):
        torch.testing.assert_close(token_mix(x, matrix), token_mix(x, dense))
    if entries == 0:
        return
    upstream = torch.randn(batch, rows, width, dtype=torch.float64)
    dx, dvalues = torch.autograd.grad(token_mix(x, sparse), (x, values), upstream)
    expected_dx, ddense = torch.autograd.grad(token_mix(x, dense), (x, dense), upstream)
    torch.testing.assert_close(dx, expected_dx)
    row = torch.searchsorted(sparse.starts, torch.arange(entries), right=True) - 1
    torch.testing.assert_close(dvalues, ddense[row, sparse.columns.long()])
    mixed, normed = token_mix_layer_norm(x, sparse, torch.ones(width), torch.zeros(width), 1e-6, rows=1)
    torch.testing.assert_close(mixed, token_mix(x, dense))
    assert normed.shape == (batch, 1, width)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sparse_rows_in_half_precision(dtype):
    sparse, dense = sparse_and_dense(9, 17, 20, torch.float32)
    x = torch.randn(2, 17, 8).to(dtype)
    exact = token_mix(x.double(), dense.to(dtype).double())
    ours = (token_mix(x, sparse.to(dtype)).double() - exact).abs().max()
    theirs = (token_mix(x, dense.to(dtype)).double() - exact).abs().max()
    assert ours <= 2 * theirs
    with torch.autocast("cpu", dtype):
        assert token_mix(x.float(), sparse).dtype == dtype


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"values": torch.ones(3)},
            ValueError,
            r"matrix.values must have the shape of matrix.columns, \(4,\), got \(3,\)",
        ),
        ({"values": torch.ones(4).double()}, TypeError, r"matrix.values must have the dtype of x, torch.float32"),
        (
            {"starts": torch.zeros(2)},
            TypeError,
            r"matrix.starts must be int32 or int64 like matrix.columns, got torch.fl",
        ),
        ({"starts": torch.zeros(2).long()}, TypeError, r"matrix.starts must be int32 or int64 like matrix.columns"),
        ({"starts": torch.zeros(2, 1).int()}, ValueError, r"matrix.starts must have one dimension, got \(2, 1\)"),
    ],
)
def test_bad_sparse_rows_are_named(change, error, message):
    matrix = SparseRows(torch.tensor([0, 2]).int(), torch.tensor([0, 1, 2, 0]).int(), torch.ones(4))
    with pytest.raises(error, match=message):
        token_mix(torch.randn(1, 3, 2), matrix._replace(**change))


@pytest.mark.parametrize("kept", [None, 0, 1, "all"])
@pytest.mark.parametrize(("batch", "tokens", "rows", "width"), SHAPES)
def test_token_mix_layer_norm(batch, tokens, rows, width, kept):
    x = torch.randn(batch, tokens, width, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(rows, tokens, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(2, width, dtype=torch.float64).unbind(0)
    kept = rows if kept == "all" else kept
    mixed, normed = token_mix_layer_norm(x, matrix, weight, bias, 1e-6, rows=kept)
    expected = torch.einsum("mn,bnd->bmd", matrix, x)
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(normed, layer_norm_written_out(expected[:, :kept], weight, bias, 1e-6))
    assert normed.shape == (batch, rows if kept is None else kept, width)


def test_layer_norm_gradients():
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *inputs: token_mix_layer_norm(*inputs, 1e-6, 3), (x, matrix, weight, bias))


def test_half_precision_statistics_are_float32():
    """Rows with a mean far from zero: variance taken in bfloat16 would lose it."""
    x = (torch.randn(2, 5, 64) + 30).bfloat16()
    matrix = torch.eye(5).bfloat16()
    _, normed = token_mix_layer_norm(x, matrix, torch.ones(64), torch.zeros(64), 1e-6)
    expected = layer_norm_written_out(x.double(), 1, 0, 1e-6)
    assert normed.dtype == torch.bfloat16
    torch.testing.assert_close(normed.double(), expected, rtol=2**-8, atol=2**-8)


def test_autocast_takes_mixed_dtypes_like_a_matmul():
    x, matrix = torch.randn(2, 5, 6), torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert token_mix(x, matrix).dtype == torch.bfloat16
        mixed, normed = token_mix_layer_norm(x.bfloat16(), matrix, torch.ones(6), torch.zeros(6), 1e-6)
        assert mixed.dtype == normed.dtype == torch.bfloat16
        assert token_mix(x.double(), matrix.double()).dtype == torch.float64


def test_empty_batch():
    assert token_mix(torch.randn(0, 5, 6), torch.randn(4, 5)).shape == (0, 4, 6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(5, 6)}, ValueError, r"x must have shape \(B, N, D\), got \(5, 6\)"),
        (
            {"matrix": torch.randn(4, 6)},
            ValueError,
            r"matrix must have shape \(M, N\) with N = 5 \(the tokens of x\), got \(4, 6\)",
        ),
        ({"matrix": torch.randn(4, 5).double()}, TypeError, r"matrix must have the dtype of x, torch.float32"),
        ({"matrix": torch.randn(4, 5, device="meta")}, ValueError, r"matrix must be on cpu"),
        ({"weight": torch.randn(5)}, ValueError, r"weight must have shape \(D,\) = \(6,\), the width of x, got \(5,\)"),
        ({"bias": torch.ones(6).int()}, TypeError, r"bias must be floating point, got torch.int32"),
        ({"rows": 5}, ValueError, r"rows must be between 0 and 4, the rows of matrix, got 5"),
        ({"rows": -1}, ValueError, r"rows must be between 0 and 4"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {
        "x": torch.randn(2, 5, 6),
        "matrix": torch.randn(4, 5),
        "weight": torch.ones(6),
        "bias": torch.zeros(6),
        "eps": 1e-6,
    }
    with pytest.raises(error, match=message):
        token_mix_layer_norm(**(arguments | change))
