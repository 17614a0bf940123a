"""The attention op under pytest-benchmark: ``pytest bench/ --benchmark-only``; device time is ``bench.attention``'s."""

import pytest
import torch

from .attention import CASES, HEADS, WIDTH, ours, peers, work

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", ["ours", *peers(DEVICE)])
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.tokens < 200], ids=lambda case: "-".join(map(str, case))
)
def test_attention(benchmark, case, name):
    batch, dtype = (256, torch.bfloat16) if DEVICE == "cuda" else (8, torch.float32)
    qkv = torch.randn(batch, case.tokens, 3, HEADS, WIDTH, device=DEVICE, dtype=dtype)
    merge = torch.rand(case.merged, case.tokens, device=DEVICE, dtype=dtype) if case.merged else None
    upstream = torch.randn(batch, case.tokens, HEADS, WIDTH, device=DEVICE, dtype=dtype).transpose(1, 2)
    function = work(case, {"ours": ours, **peers(DEVICE)}[name], qkv, merge, upstream)

    def call():
        function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"attention_{case.kind}/n{case.tokens}"
    benchmark.extra_info.update(shape=list(qkv.shape), dtype=str(dtype), device=DEVICE, torch=torch.__version__)
    benchmark.pedantic(call, warmup_rounds=2, rounds=10)
