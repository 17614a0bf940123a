"""fused_merge_attention beside PyTorch's attention: forward, with its backward and scores, and with a merge.

    python -m bench.attention [--output FILE]

On a GPU: device time at batch 256 in bfloat16, the cache flushed before each call, against the flash, memory-efficient
and cuDNN backends and FlexAttention. On a CPU: batch 8 in float32, calls alternated, against PyTorch's attention and
attention with the attention matrix in memory. Every output is compared with float64 before anything is timed.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pm_kernels import fused_merge_attention_qkv
from pm_models.files import write_atomically
from pm_models.measure import alternate
from pm_models.report import format_table

from .machine import describe

HEADS, WIDTH = 6, 64
BACKENDS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
}


class Case(NamedTuple):
    """One measurement: ``kind`` forward, backward (both passes, with scores), or merge (forward)."""

    kind: str
    tokens: int
    merged: int | None = None


CASES = (
    *(Case("forward", tokens) for tokens in (118, 137, 197, 577, 1601, 4096)),
    *(Case("backward", tokens) for tokens in (118, 137, 197, 577, 1601)),
    Case("merge", 197, 118),
    Case("merge", 197, 137),
)


def unpacked(qkv: Tensor) -> tuple[Tensor, ...]:
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def ours(qkv: Tensor, merge: Tensor | None, gate: Tensor | None) -> Tensor:
    return fused_merge_attention_qkv(qkv, merge, gate=gate)


def pytorch(attend: Callable[..., Tensor], qkv: Tensor, merge: Tensor | None, gate: Tensor | None) -> Tensor:
    """Merge first, gate the values, attend by ``attend``."""
    q, k, v = unpacked(qkv)
    if merge is not None:
        q, k, v = merge @ q, merge @ k, merge @ v
    if gate is not None:
        v = (gate.unsqueeze(-1) * v).to(v.dtype)
    return attend(q, k, v)


def with_matrix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The attention matrix in memory, as scoring by hooks needs it."""
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v


def by_backend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def peers(device: str) -> dict[str, Callable[..., Tensor]]:
    attends = {"eager_matrix": with_matrix}
    if device == "cpu":
        attends["sdpa"] = F.scaled_dot_product_attention
    else:
        from torch.nn.attention.flex_attention import flex_attention

        attends |= {name: partial(by_backend, backend) for name, backend in BACKENDS.items()}
        attends["flex"] = torch.compile(flex_attention, dynamic=False)
    return {name: partial(pytorch, attend) for name, attend in attends.items()}


def work(
    case: Case, function: Callable[..., Tensor], qkv: Tensor, merge: Tensor | None, upstream: Tensor
) -> Callable[[], object]:
    """What is timed: one call, with its backward and the gradient of a gate of ones where the case says so."""
    if case.kind != "backward":
        return lambda: function(qkv, merge, None)
    gate = torch.ones(case.tokens, device=qkv.device, requires_grad=True)
    qkv = qkv.detach().requires_grad_()
    return lambda: torch.autograd.grad(function(qkv, merge, gate), (qkv, gate), upstream)


def counted(case: Case, batch: int, size: int) -> tuple[int, int]:
    """Bytes that must move and floating-point operations that must be done."""
    rows = case.merged or case.tokens
    read, product = 3 * case.tokens + rows, 2 * rows * rows * WIDTH
    flops = 2 * product + (3 * 2 * rows * case.tokens * WIDTH if case.merged else 0)
    if case.kind == "backward":
        # The backward reads q, k, v, the output and its gradient, and writes three gradients.
        read, flops = read + 8 * case.tokens, flops + 5 * product
    return batch * HEADS * WIDTH * read * size, batch * HEADS * flops


def error(function: Callable[[], object], exact: tuple[Tensor, ...]) -> float:
    """The largest relative error of any result."""
    results = function()
    results = results if isinstance(results, tuple) else (results,)
    return max(
        ((result.double() - value).norm() / value.norm()).item() for result, value in zip(results, exact, strict=True)
    )


def measure(case: Case, device: str, machine: dict) -> dict:
    """One record."""
    batch, dtype = (256, torch.bfloat16) if device == "cuda" else (8, torch.float32)
    if case.tokens > 1000:
        batch = max(1, batch // 8)
    qkv = torch.randn(batch, case.tokens, 3, HEADS, WIDTH, device=device, dtype=dtype)
    merge = None
    if case.merged:
        merge = (torch.rand(case.merged, case.tokens, device=device) / case.tokens).to(dtype)
    upstream = torch.randn(batch, case.tokens, HEADS, WIDTH, device=device, dtype=dtype).transpose(1, 2)
    wide = [None if x is None else x.double() for x in (qkv[:2], merge, upstream[:2])]
    exact = work(case, partial(pytorch, with_matrix), *wide)()
    exact = exact if isinstance(exact, tuple) else (exact,)
    functions, errors = {}, {}
    for name, function in {"ours": ours, **peers(device)}.items():
        try:
            errors[name] = error(work(case, function, qkv[:2], merge, upstream[:2]), exact)
            functions[name] = work(case, function, qkv, merge, upstream)
            functions[name]()
        except (RuntimeError, torch.OutOfMemoryError) as problem:
            print(f"{case}: {name} cannot run: {str(problem).splitlines()[0]}")
            functions.pop(name, None)
    seconds = timed(functions, device)
    milliseconds = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
    moved, flops = counted(case, batch, qkv.element_size())
    precision = str(dtype).removeprefix("torch.")
    rate = machine["matmul_tflops"][precision]
    name = "merge_attention" if case.kind == "merge" else f"attention_{case.kind}"
    return {
        "case": "-".join([f"{name}/n{case.tokens}", *([f"c{case.merged}"] if case.merged else []), precision]),
        "op": "attention",
        "shape": list(qkv.shape),
        "dtype": precision,
        "ours_ms": milliseconds.pop("ours"),
        "peers": milliseconds,
        "spread_ms": {peer: 1e3 * (max(times) - min(times)) for peer, times in seconds.items()},
        "errors": errors,
        "bytes": moved,
        "flops": flops,
        "roofline_ms": max(moved / machine["copy_gbps"] / 1e6, flops / rate / 1e9),
    }


def timed(functions: dict[str, Callable[[], object]], device: str) -> dict[str, list[float]]:
    """Seconds of each call."""
    if device == "cpu":
        return alternate(functions, 10, synchronize=False)
    from triton.testing import do_bench

    return {
        name: [1e-3 * time for time in do_bench(function, warmup=50, rep=200, return_mode="all")]
        for name, function in functions.items()
    }


def rows(records: list[dict]) -> Iterator[tuple[str, ...]]:
    yield "case", "ms", "of the floor", "fastest peer", "x it", "error x its"
    for record in records:
        ours_ms, others = record["ours_ms"], record["peers"]
        best = min(others, key=others.get)
        yield (
            record["case"],
            f"{ours_ms:.3f}",
            f"{record['roofline_ms'] / ours_ms:.0%}",
            best,
            f"{others[best] / ours_ms:.2f}",
            f"{record['errors']['ours'] / record['errors'][best]:.2f}",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=None, help="write the records to a JSON file")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = describe(device)
    records = []
    for case in CASES:
        if device == "cpu" and case.tokens > 1000:
            continue
        records.append(measure(case, device, machine))
        print(format_table(list(rows(records))).splitlines()[-1], flush=True)
        if options.output is not None:
            content = json.dumps({**machine, "records": records}, indent=2) + "\n"
            write_atomically(options.output, content.encode())
    print("\n" + format_table(list(rows(records))))


if __name__ == "__main__":
    main()
