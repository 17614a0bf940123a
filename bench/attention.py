"""fused_merge_attention beside PyTorch's attention: forward, with its backward and scores, and with a merge.

On a GPU at batch 256 in bfloat16, against the flash, memory-efficient and cuDNN backends and FlexAttention. On a CPU at
batch 8 in float32, against PyTorch's attention and attention with the attention matrix in memory.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pm_kernels import fused_merge_attention_qkv

from . import comparison

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

    def __str__(self) -> str:
        kind = "merge_attention" if self.kind == "merge" else f"attention_{self.kind}"
        return f"{kind}/n{self.tokens}" + (f"-c{self.merged}" if self.merged else "")


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
    functions = {"ours": ours, **peers(device)}
    small = {name: work(case, function, qkv[:2], merge, upstream[:2]) for name, function in functions.items()}
    calls = {name: work(case, function, qkv, merge, upstream) for name, function in functions.items()}
    moved, flops = counted(case, batch, qkv.element_size())
    found = comparison.errors(small, exact)
    name = f"{case}-{str(dtype).removeprefix('torch.')}"
    return comparison.record(name, "attention", calls, qkv, moved, flops, machine, errors=found)


def cases(device: str, full: bool) -> list[Case]:
    """Those that every machine runs, or all. A CPU takes minutes for the longest ones."""
    longest = {("cuda", True): 4096, ("cuda", False): 1601, ("cpu", True): 577}.get((device, full), 197)
    return [case for case in CASES if case.tokens <= longest]


def names(case: Case, device: str) -> list[str]:
    """Ours and the peers."""
    return ["ours", *peers(device)]
