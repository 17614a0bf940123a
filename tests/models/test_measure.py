"""Counting multiply-accumulates and taking turns."""

import pytest
import timm
import torch
from helpers import images_for, plan_for, small_vit
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pm_models import AdaptivePlan, Segmenter, compress, measure
from pm_models.measure import alternate, count_gmacs, speed_beside_dense, throughput
from pm_models.models import compressed, encoder_of


def test_gmacs_of_deit_small_are_the_published_ones():
    model = timm.create_model("deit_small_patch16_224")
    tokens, width, patches = 197, 384, 196
    block = tokens * width * width * 12 + 2 * tokens * tokens * width
    expected = 12 * block + patches * width * 3 * 256 + width * 1000
    assert count_gmacs(model, (3, 224, 224)) == expected / 1e9
    assert round(expected / 1e9, 1) == 4.6
    assert model.training


def test_gmacs_of_a_compressed_model():
    """Blocks by their own tokens; of the last, keys and values of all tokens and one token's way through the rest."""
    model = small_vit(depth=3)
    compressed = compress(model, plan_for(model, keep_rate=0.4, prune_rate=0.0)).eval()
    *before, last = compressed.plan.tokens
    blocks = sum(tokens * 32 * 32 * 12 + 2 * tokens * tokens * 32 for tokens in before)
    blocks += last * 32 * 32 * 2 + 1 * 32 * 32 * 10 + 2 * last * 32
    expected = blocks + 35 * 32 * 3 * 16 + 32 * 7
    assert count_gmacs(compressed, (3, 28, 20)) == expected / 1e9


def test_alternation_takes_turns():
    calls = []
    seconds = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, synchronize=False)
    rounds = ["".join(calls[start : start + 2]) for start in range(0, len(calls), 2)]
    assert len(rounds) == 5
    assert set(rounds) == {"ab", "ba"}
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_throughput_names_every_model():
    model = small_vit()
    speeds = throughput({"dense": model, "again": model}, images_for(model, 4), rounds=2)
    assert speeds.keys() == {"dense", "again"}
    assert all(speed > 0 for speed in speeds.values())


@pytest.mark.parametrize("kind", ["static", "adaptive", "segmenter"])
def test_the_ideal_has_the_tokens_and_no_more_to_do(monkeypatch, kind):
    """Its blocks are the dense model's on the plan's tokens; what is around them runs once."""
    dense = small_vit()
    plan = plan_for(dense) if kind == "static" else AdaptivePlan.for_model(dense, gmacs=0.6)
    dense = Segmenter(dense, 3) if kind == "segmenter" else dense
    model, seen, encoder = compressed(dense, plan), [], encoder_of(dense)
    for name, module in {
        "embed": encoder.patch_embed,
        "norm": encoder.norm,
        **dict(encoder.blocks.named_children()),
    }.items():
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.append((name, tuple(inputs[0].shape))))
    runs = {}

    def alternate(calls, rounds, synchronize):
        for name, call in calls.items():
            seen.clear()
            call()
            runs[name] = seen.copy()
        return {"dense": [2.0, 4.0, 3.0], "compressed": [2.0] * 3, "ideal": [1.0] * 3}

    monkeypatch.setattr(measure, "alternate", alternate)
    assert speed_beside_dense(model, dense, 6) == {"dense": 2, "compressed": 3, "ideal": 6}
    around = [("embed", (6, 3, 28, 20)), ("norm", (6, 36, 32))]
    assert runs["ideal"] == around + [(str(block), (6, count, 32)) for block, count in enumerate(plan.tokens)]
    assert runs["dense"] == around[:1] + [(str(block), (6, 36, 32)) for block in range(5)] + around[1:]
    assert runs["compressed"] == []
    assert len(encoder.blocks) == 5


def test_folding_is_not_counted_for_an_image():
    """Nor where a readout is folded at its first call: there are the products of the blocks, and no others."""
    model = small_vit(depth=3)
    compressed = compress(model, plan_for(model), shortcut="all").eval()
    segmenter = Segmenter(compressed, 4, decoder="linear").eval()
    tokens, width = compressed.plan.tokens, 32
    blocks = sum(12 * width * width * count + 2 * count * count * width for count in tokens)
    embedded, decoded = 35 * 3 * 16 * width, 35 * width * 4
    assert count_gmacs(segmenter, (3, 28, 20)) == pytest.approx(1e-9 * (blocks + embedded + decoded), rel=1e-6)


def test_a_flop_counter_counts_what_runs():
    """Its hooks follow the modules, and change nothing; the class token alone is computed in the last block."""
    model = small_vit(depth=3)
    compressed = compress(model, plan_for(model)).eval()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        compressed(images_for(model, 1))
    assert counter.get_total_flops() == 2e9 * count_gmacs(compressed, (3, 28, 20))
