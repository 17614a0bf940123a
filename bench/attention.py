"""fused_merge_attention beside PyTorch's: forward, with its backward and scores, with a merge, with a bias per key.

On a GPU at batch 256 in bfloat16, against every backend of PyTorch's attention and FlexAttention. On a CPU at batch 8
in float32, against PyTorch's attention. Everywhere against attention with the attention matrix in memory.
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
    "sdpa_math": SDPBackend.MATH,
}


class Case(NamedTuple):
    """One measurement: ``kind`` forward, backward (both passes, with scores), merge or bias (forward)."""

    kind: str
    tokens: int
    merged: int | None = None

    def __str__(self) -> str:
        kind = "merge_attention" if self.kind == "merge" else f"attention_{self.kind}"
        return f"{kind}/n{self.tokens}" + (f"-c{self.merged}" if self.merged else "")


CASES = (
    *(Case("forward", tokens) for tokens in (118, 137, 197, 577, 1121, 1601, 4096)),
    *(Case("backward", tokens) for tokens in (118, 137, 197, 577, 1121, 1601)),
    Case("merge", 197, 118),
    Case("merge", 197, 137),
    Case("bias", 197),
)


def unpacked(qkv: Tensor) -> tuple[Tensor, ...]:
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


class Extras(NamedTuple):
    """The optional inputs, None where a case is without."""

    merge: Tensor | None = None
    gate: Tensor | None = None
    bias: Tensor | None = None  # (keys,)


def ours(qkv: Tensor, extras: Extras) -> Tensor:
    return fused_merge_attention_qkv(qkv, extras.merge, gate=extras.gate, key_bias=extras.bias)


def pytorch(attend: Callable[..., Tensor], qkv: Tensor, extras: Extras) -> Tensor:
    """Merge first, gate the values, attend by ``attend``."""
    q, k, v = unpacked(qkv)
    if extras.merge is not None:
        q, k, v = extras.merge @ q, extras.merge @ k, extras.merge @ v
    if extras.gate is not None:
        v = (extras.gate.unsqueeze(-1) * v).to(v.dtype)
    return attend(q, k, v, extras.bias)


def with_matrix(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """The attention matrix in memory, as scoring by hooks needs it."""
    logits = q @ k.mT * q.shape[-1] ** -0.5
    return torch.softmax(logits if bias is None else logits + bias, dim=-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    mask = None if bias is None else bias.expand(q.shape[0], q.shape[1], q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def by_backend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa(q, k, v, bias)


def flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[key]

    return flex_attention(q, k, v, score_mod=None if bias is None else biased)


def peers(device: str) -> dict[str, Callable[..., Tensor]]:
    attends = {"eager_matrix": with_matrix}
    if device == "cpu":
        attends["sdpa"] = sdpa
    else:
        attends |= {name: partial(by_backend, backend) for name, backend in BACKENDS.items()}
        attends["flex"] = torch.compile(flex, dynamic=False)
    return {name: partial(pytorch, attend) for name, attend in attends.items()}


def work(
    case: Case, function: Callable[..., Tensor], qkv: Tensor, extras: Extras, upstream: Tensor
) -> Callable[[], object]:
    """What is timed: one call, with its backward and the gradient of a gate of ones where the case says so."""
    if case.kind != "backward":
        return lambda: function(qkv, extras)
    gate = torch.ones(case.tokens, device=qkv.device, requires_grad=True)
    qkv = qkv.detach().requires_grad_()
    return lambda: torch.autograd.grad(function(qkv, extras._replace(gate=gate)), (qkv, gate), upstream)


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
    extras = Extras()
    if case.merged:
        extras = Extras(merge=(torch.rand(case.merged, case.tokens, device=device) / case.tokens).to(dtype))
    if case.kind == "bias":
        extras = Extras(bias=torch.rand(case.tokens, device=device).mul(3).to(dtype))
    upstream = torch.randn(batch, case.tokens, HEADS, WIDTH, device=device, dtype=dtype).transpose(1, 2)
    wide = Extras(*(None if x is None else x.double() for x in extras))
    exact = work(case, partial(pytorch, with_matrix), qkv[:2].double(), wide, upstream[:2].double())()
    exact = exact if isinstance(exact, tuple) else (exact,)
    functions = {"ours": ours, **peers(device)}
    small = {name: work(case, function, qkv[:2], extras, upstream[:2]) for name, function in functions.items()}
    calls = {name: work(case, function, qkv, extras, upstream) for name, function in functions.items()}
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
