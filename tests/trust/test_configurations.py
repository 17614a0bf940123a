"""Every configuration that kernels are launched in, by the shapes that choose it, against float64.

On a GPU, all of them, for compute-sanitizer too; in Triton's interpreter, which has one, the small ones.
"""

import pytest
import torch
from covering import pairs
from helpers import ON_KERNELS, skip_without_kernels
from trust.cases import laid_out
from trust.exactness import DEVICE, DTYPES, check_attention, check_transition, structure_of

from bench.resources import HEAD_WIDTHS, LENGTHS, WIDTHS

skip_without_kernels()
pytestmark = [pytest.mark.fuzz, *ON_KERNELS]

ON_GPU = DEVICE == "cuda"


def guarded(*shape, dtype):
    return laid_out(torch.randn(shape, device=DEVICE).to(dtype), "contiguous")


@pytest.mark.parametrize(
    *pairs(
        dtype=DTYPES,
        width=HEAD_WIDTHS,
        tokens=LENGTHS if ON_GPU else LENGTHS[:1],
        merged=("", "tokens", "keys"),
        extras=(False, True),
    )
)
def test_attention(dtype, width, tokens, merged, extras):
    batch, heads, keys = 2, 2, tokens // 2 + 1 if merged else tokens
    arguments = {name: guarded(batch, heads, tokens, width, dtype=dtype) for name in "qkv"}
    if merged:
        merge = torch.randn(keys, tokens, device=DEVICE) / tokens**0.5
        arguments |= {"merge": merge.to(dtype), "merge_queries": merged == "tokens"}
    if extras:
        arguments |= {name: guarded(batch, heads, keys, dtype=dtype) for name in ("gate", "key_bias")}
    check_attention(arguments, [guarded(batch, heads, keys if merged == "tokens" else tokens, width, dtype=dtype)])


@pytest.mark.parametrize(
    *pairs(
        dtype=DTYPES,
        width=WIDTHS if ON_GPU else WIDTHS[:2],
        kind=("dense", "sparse", "blocks"),
        extras=(False, True),
    )
)
def test_transitions(dtype, width, kind, extras):
    tokens, total, rows = (197, 137, 118) if ON_GPU else (37, 20, 17)
    matrix = torch.randn(total, tokens, device=DEVICE) / tokens**0.5
    if kind == "sparse":
        matrix *= torch.rand(matrix.shape, device=DEVICE) < 0.03
        matrix[:, 0] = 1  # rows that are all zeros have no direction for the LayerNorm
    elif kind == "blocks":
        matrix[: total // 2, tokens // 2 :] = 0
        matrix[total // 2 :, : tokens // 2] = 0
    split = tokens - 20 if extras else tokens
    arguments = {"x": guarded(2, split, width, dtype=dtype), "matrix": matrix.to(dtype), "rows": rows}
    upstreams = [guarded(2, count, width, dtype=dtype) for count in (rows, total - rows)]
    if extras:
        arguments |= {name: guarded(width, dtype=dtype) for name in ("weight", "bias")}
        arguments["carried"] = guarded(2, tokens - split, width, dtype=dtype)
        if kind == "sparse":
            arguments["update"] = guarded(2, split, width, dtype=dtype)
        upstreams.append(guarded(2, rows, width, dtype=dtype))
    check_transition(arguments, upstreams, structure_of(matrix, kind))
