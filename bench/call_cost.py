"""What a call of fused_merge_attention or transition costs on the CPU, before the GPU has anything to do.

    python -m bench.call_cost [--output FILE]

A ViT of 12 blocks makes 12 such calls of each, one after another, and at batch 1 it waits for them. The kernels are
compiled for sm_90 and launched on a GPU that is not there, so the driver's own share of a launch is not in the figures.
"""

import argparse
import timeit
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from pm_kernels import SparseRows, fused_merge_attention, fused_merge_attention_qkv, match, transition
from pm_models.tables import format_table

from . import results
from .machine import describe
from .stand_in import stand_in


def microseconds(function: Callable[[], object], calls: int = 2000) -> float:
    """The fastest of five rounds, a call."""
    function()
    return 1e6 * min(timeit.repeat(function, number=calls, repeat=5)) / calls


def measure() -> dict[str, float]:
    """Microseconds a call, by case."""
    qkv = torch.randn(1, 118, 3, 6, 64, dtype=torch.bfloat16)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    gate, merge = torch.ones(118), torch.randn(60, 118, dtype=torch.bfloat16)
    # One token, so that PyTorch's own attention has nothing to compute either.
    one = [x[:, :, :1] for x in (q, k, v)]
    trained = qkv.clone().requires_grad_()
    dout = torch.randn(1, 6, 118, 64, dtype=torch.bfloat16)
    images, bias, sizes = (
        torch.randn(4, 118, 3, 6, 64, dtype=torch.bfloat16),
        torch.zeros(4, 1, 118),
        torch.ones(1, 118),
    )
    long, long_merge = torch.randn(1, 300, 3, 6, 64, dtype=torch.bfloat16), torch.randn(280, 300, dtype=torch.bfloat16)
    x, update = torch.randn(2, 1, 118, 384, dtype=torch.bfloat16)
    carried = torch.randn(1, 19, 384, dtype=torch.bfloat16)
    matrix, norm = (
        SparseRows.from_dense(torch.eye(137, dtype=torch.bfloat16)),
        (torch.ones(384), torch.zeros(384), 1e-6),
    )
    trained_x = x.clone().requires_grad_()
    with stand_in(), torch.inference_mode():
        costs = {
            "fused_merge_attention": microseconds(lambda: fused_merge_attention(q, k, v)),
            "fused_merge_attention, gate": microseconds(lambda: fused_merge_attention(q, k, v, gate=gate)),
            "fused_merge_attention, merge": microseconds(lambda: fused_merge_attention(q, k, v, merge)),
            "fused_merge_attention_qkv": microseconds(lambda: fused_merge_attention_qkv(qkv)),
            "fused_merge_attention_qkv, bias of each image": microseconds(
                lambda: fused_merge_attention_qkv(images, key_bias=bias)
            ),
            "fused_merge_attention_qkv, merge of a long sequence": microseconds(
                lambda: fused_merge_attention_qkv(long, long_merge)
            ),
            "transition": microseconds(lambda: transition(x, carried, matrix, 118, update=update, norm=norm)),
            "match": microseconds(lambda: match(x, sizes, 80, update=update, norm=norm)),
        }
    with stand_in(), torch.enable_grad():
        costs["fused_merge_attention_qkv, recorded for backward"] = microseconds(
            lambda: fused_merge_attention_qkv(trained)
        )
        costs["fused_merge_attention_qkv, with its backward"] = microseconds(
            lambda: fused_merge_attention_qkv(trained).backward(dout)
        )
        costs["transition, recorded for backward"] = microseconds(
            lambda: transition(trained_x, carried, matrix, 118, update=update, norm=norm)
        )
    with torch.inference_mode():
        costs["scaled_dot_product_attention of one token, on the CPU"] = microseconds(
            lambda: F.scaled_dot_product_attention(*one)
        )
        costs["layer_norm of one token, on the CPU"] = microseconds(lambda: F.layer_norm(x[:, :1], (384,), *norm[:2]))
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=None, help="write the figures to a JSON file")
    options = parser.parse_args()
    costs = measure()
    print(format_table([("case", "microseconds"), *((name, f"{value:.1f}") for name, value in costs.items())]))
    if options.output is not None:
        records = [
            {"case": f"call_cost/{name}", "op": name.split(",")[0], "ours_us": value} for name, value in costs.items()
        ]
        results.write(options.output, describe(), records)


if __name__ == "__main__":
    main()
