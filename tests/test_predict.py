"""What a prediction counts: bytes, floating-point operations and launches of operators on tensors without numbers."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench import predict, results
from bench.predict import CARDS, GAP, Launch, fused, launches, seconds
from pm_kernels import fused_merge_attention_qkv, runtime

H100 = CARDS["h100"]


def meta(*shape):
    return torch.empty(shape, device="meta", dtype=torch.bfloat16)


def test_products_are_counted_and_views_are_not():
    x, weight = meta(7, 11), meta(13, 11)
    found = launches(lambda: F.gelu(F.linear(x, weight).view(7, 13).T), H100)
    assert found == [
        Launch(2 * (7 * 11 + 13 * 11 + 7 * 13), 2 * 7 * 11 * 13, fuses=False),
        Launch(2 * 2 * 7 * 13, 0, fuses=True),
    ]


def test_what_is_broadcast_counts_once():
    (launch,) = launches(lambda: meta(5, 8) + meta(1, 8).expand(5, 8), H100)
    assert launch.bytes == 2 * (5 * 8 + 8 + 5 * 8)


@pytest.mark.parametrize("tokens", [197, 300])
def test_attention_is_one_launch_for_ours_and_for_pytorchs(tokens):
    qkv = meta(2, tokens, 3, 6, 64)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    rows, flops = 2 * 6 * tokens * 64, 4 * 2 * 6 * tokens**2 * 64
    (theirs,) = launches(lambda: F.scaled_dot_product_attention(q, k, v), H100)
    assert theirs == Launch(2 * 4 * rows, flops, fuses=False)
    gate = torch.empty(tokens, device="meta")
    (ours,) = launches(lambda: fused_merge_attention_qkv(qkv, gate=gate), H100)
    assert ours.flops == flops
    assert ours.bytes == 2 * 4 * rows + 4 * tokens + 4 * 2 * 6 * tokens  # the gate, and what a backward would need
    assert runtime.target(torch.ones(1)) is None  # as it was


def test_a_compiler_fuses_neighbours():
    product, sum_, norm = Launch(100, 10, False), Launch(30, 0, True), Launch(40, 0, True)
    assert fused([sum_, norm, product, norm, sum_]) == [norm, product, norm]


def test_time_is_the_longer_of_two_and_a_gap():
    found = [Launch(int(H100.bandwidth), 1, False), Launch(1, int(3 * H100.rate), False)]
    assert seconds(found, H100) == pytest.approx(1 + 3 + 2 * GAP)


def test_the_prediction_beside_what_was_measured(tmp_path, monkeypatch):
    rows = [
        {"case": "a/b1", "name": "ours", "predicted_ms": 2.0},
        {"case": "a/b1", "name": "tome", "predicted_ms": 4.0},
    ]
    monkeypatch.setattr(predict, "predictions", lambda card: iter(rows))
    path = Path(tmp_path) / "model.json"
    results.write(path, {}, [{"case": "a/b1", "ours_ms": 3.0, "peers": {"tome": 5.0, "evit": 1.0}}])
    header, *lines = predict.beside(path, "h100").splitlines()
    assert header.split()[-1] == "ratio"
    assert [line.split()[-1] for line in lines if "a/b1" in line] == ["1.50", "1.25"]
