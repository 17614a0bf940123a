"""Adaptive merging on whole models, against timm's own blocks run on tokens that were matched one by one."""

import copy
import math

import onnx
import pytest
import timm
import torch
import torch.nn.functional as F
from families import FAMILIES
from helpers import images_for, matched_one_by_one, plan_for, small_vit
from timm.models.vision_transformer import ParallelScalingBlock
from torch import nn

from pm_models import (
    AdaptivePlan,
    CompressionPlan,
    Segmenter,
    compress,
    export_model,
    load_pretrained,
    save_pretrained,
    score_tokens,
)
from pm_models.measure import count_gmacs
from pm_models.models import input_size, tokens_of


def adaptive_plan(model, shares=(0.7, 0.6), **options):
    """Merges in the first third and before the last block."""
    grid, depth, prefix = tuple(model.patch_embed.grid_size), len(model.blocks), model.num_prefix_tokens
    patches, merges = grid[0] * grid[1], {}
    for block, share in zip((depth // 3, depth - 1), shares, strict=True):
        patches = math.ceil(patches * share)
        merges[block] = prefix + patches
    return AdaptivePlan(grid, depth, prefix, merges, **options)


class MergingByHand(nn.Module):
    """timm's blocks on merged tokens, image by image; what merges is what the loop over tokens finds."""

    def __init__(self, blocks, plan, turns=None, mixed=False):
        super().__init__()
        self.blocks, self.plan, self.turns, self.mixed = nn.ModuleList(blocks), plan, turns, mixed
        self.clusters = {}

    def forward(self, x, rope=None, **_):
        self.clusters = {number: [] for number in self.plan.merges}
        return torch.cat([self.of_image(image[None], rope) for image in x])

    def of_image(self, x, rope):
        prefix = self.plan.num_prefix_tokens
        members = torch.eye(x.shape[1], dtype=x.dtype)
        for number, block in enumerate(self.blocks):
            sizes = members.sum(dim=1)
            if number in self.plan.merges:
                tokens = self.plan.merges[number]
                with torch.no_grad():
                    segments, _ = matched_one_by_one(
                        block.norm1(x), sizes[None], tokens, prefix, self.plan.rounds, self.plan.root_sizes
                    )
                step = torch.zeros(tokens, x.shape[1], dtype=x.dtype)
                step[segments[0].long(), torch.arange(x.shape[1])] = 1
                x = (step * sizes) @ x / (step @ sizes)[:, None]
                members = step @ members
                self.clusters[number].append(members[prefix:, prefix:].argmax(dim=0))
            given = {"attn_mask": members.sum(dim=1).log()[None, None, None].expand(1, 1, len(members), -1)}
            if rope is not None:
                table, turns = (rope[number], self.turns[number]) if self.mixed else (rope, self.turns)
                given["rope"] = rotary_means(table, members[prefix:, prefix:], self.plan.grid, turns)
            x = block(x, **given)
        return members.T @ x


def rotary_means(table, members, grid, more):
    """The table at the mean of the members' angles, unwrapped along the columns and then along the rows.

    A coarse grid may step over half a turn: ``more`` (..., 2, d) turns, which the table does not show.
    """
    sine, cosine = table.chunk(2, dim=-1)
    angles = torch.atan2(sine, cosine).unflatten(-2, grid)
    for dim in (-2, -3):
        turns = torch.diff(angles, dim=dim, prepend=angles.narrow(dim, 0, 1)).div(2 * math.pi).round().cumsum(dim)
        angles = angles - 2 * math.pi * turns
    for side, part in zip(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), more.unbind(-2), strict=True):
        angles = angles + 2 * math.pi * side[..., None] * part[..., None, None, :]
    merged = members @ angles.flatten(-3, -2) / members.sum(dim=1, keepdim=True)
    return torch.cat([merged.sin(), merged.cos()], dim=-1)


def check_clusters(model, oracle, images):
    """Every merge's are those of the oracle's last forward, and as many as the plan says."""
    found, expected = model.clusters(images), oracle.blocks[0].clusters
    plan = oracle.blocks[0].plan
    assert found.keys() == expected.keys() == plan.merges.keys()
    for block, clusters in found.items():
        assert clusters.dtype == torch.int64
        assert torch.equal(clusters, torch.stack(expected[block]))
        for image in clusters:
            assert len(image.unique()) == plan.merges[block] - plan.num_prefix_tokens


def by_hand(dense, plan):
    model = copy.deepcopy(dense)
    own = plan.resize(tuple(dense.patch_embed.grid_size))
    turns = None if getattr(model, "rope", None) is None else compress(dense, own).stages.positions.turns
    model.blocks = nn.Sequential(MergingByHand(model.blocks, plan, turns, getattr(model, "rope_mixed", False)))
    model.rope_mixed = False
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family, tmp_path):
    """What a user does with a model, in order; everything that is asserted holds for every family."""
    dense = FAMILIES[family]().double()
    images, targets = images_for(dense), torch.randint(0, max(dense.num_classes, 2), (3,))
    plan = adaptive_plan(dense, rounds=3, root_sizes=True)  # as a model's own plan
    model, oracle = compress(dense, plan), by_hand(dense, plan)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), oracle(images), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            model.forward_features(images), oracle.forward_features(images), rtol=1e-6, atol=1e-6
        )
        check_clusters(model, oracle, images)
        torch.testing.assert_close(model.uncompressed()(images), dense(images))
        maps = model.forward_intermediates(images, intermediates_only=True)
        assert all(found.shape[2:] == plan.grid for found in maps)
        torch.testing.assert_close(model(images[1:2]), model(images)[1:2])
        assert Segmenter(model, 5)(images).shape == (3, 5, *images.shape[2:])

    save_pretrained(model.float(), tmp_path / "model")
    loaded = load_pretrained(tmp_path / "model")
    assert loaded.plan == plan
    with torch.inference_mode():
        assert torch.equal(loaded(images.float()), model(images.float()))
    model.double().train()
    for parameter in (*model.parameters(), *oracle.parameters()):
        parameter.grad = None
    F.cross_entropy(model(images), targets).backward()
    F.cross_entropy(oracle.train()(images), targets).backward()
    expected = dict(oracle.named_parameters())
    for name, parameter in model.named_parameters():
        name = name.replace("blocks.", "blocks.0.blocks.")
        if expected[name].grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-5, atol=1e-6, msg=name)


def test_rounds_and_weights_of_a_plan():
    dense = small_vit(depth=6).double().eval()
    images = images_for(dense)
    for options in ({}, {"rounds": 1}, {"rounds": 3, "root_sizes": True}):
        plan = adaptive_plan(dense, (0.6, 0.55), **options)
        with torch.inference_mode():
            expected = by_hand(dense, plan).forward_features(images)
            torch.testing.assert_close(compress(dense, plan).forward_features(images), expected, rtol=1e-8, atol=1e-8)


def test_blocks_of_other_kinds():
    """They run whole, on PyTorch's attention, which takes the sizes as a mask."""
    dense = small_vit(block_fn=ParallelScalingBlock, depth=3)
    images, model = images_for(dense), compress(dense, adaptive_plan(dense))
    with torch.inference_mode():
        features, alone = model.forward_features(images), model.forward_features(images[1:2])
        assert features.shape == dense.forward_features(images).shape
        torch.testing.assert_close(alone, features[1:2], rtol=1e-4, atol=1e-5)


def test_clusters_are_asked_for_at_any_time():
    """In training, with checkpointing, of a model that is cut; nothing is left on the model."""
    dense = small_vit()
    model, images = compress(dense, adaptive_plan(dense)), images_for(dense)
    before, expected = set(vars(model)), model.clusters(images)
    assert list(expected) == [1, 4]
    model.train().set_grad_checkpointing()
    found = model.clusters(images)
    assert all(torch.equal(found[block], expected[block]) for block in expected)
    assert set(vars(model)) == before
    model.prune_intermediate_layers([2])
    found = model.clusters(images)
    assert list(found) == [1]
    assert torch.equal(found[1], expected[1])
    with pytest.raises(ValueError, match=r"clusters need a model with an AdaptivePlan.*plan\.stage_of"):
        compress(dense, plan_for(dense)).clusters(images)


def test_without_merges_nothing_changes():
    dense = small_vit()
    images = images_for(dense)
    model = compress(dense, AdaptivePlan((7, 5), 5, 1, {}))
    with torch.inference_mode():
        torch.testing.assert_close(model(images), dense(images), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_readouts(pool):
    """What the head reads is computed apart from the rest, and is what the full map holds."""
    dense = small_vit(global_pool=pool, fc_norm=True).double()
    images = images_for(dense)
    model = compress(dense, adaptive_plan(dense))
    with torch.inference_mode():
        torch.testing.assert_close(model(images), model.forward_head(model.forward_features(images)))


def test_checkpointing_gives_the_same_gradients():
    dense = small_vit()
    model, images = compress(dense, adaptive_plan(dense)), images_for(dense)
    gradients = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for without, with_ in zip(*gradients, strict=True):
        torch.testing.assert_close(without, with_)


def test_hooks_change_nothing():
    dense = small_vit()
    model, images = compress(dense, adaptive_plan(dense)), images_for(dense)
    with torch.inference_mode():
        expected = model(images)
        for name in ("blocks.1", "blocks.1.norm1", "blocks.4.attn", "blocks.4.attn.qkv", "blocks"):
            seen = []
            hook = model.get_submodule(name).register_forward_hook(lambda *call, seen=seen: seen.append(call[2]))
            torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-6)
            hook.remove()
            assert seen


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_other_grids(name):
    """The number of tokens scales with the grid, whether the images or the model change their size."""
    dense = small_vit(name, img_size=(24, 20), depth=3, dynamic_img_size=True).double()
    plan = adaptive_plan(dense)
    model = compress(dense, plan)
    assert tokens_of(model) == list(plan.tokens)
    images = torch.randn(2, 3, 32, 28, dtype=torch.float64)
    scaled = plan.resize((8, 7))
    assert scaled.num_patches == 56
    assert [round((tokens - 1) * 30 / 56) for tokens in scaled.tokens] != [0] * 3
    with torch.inference_mode():
        features = model.forward_features(images)
        assert features.shape[1] == 56 + dense.num_prefix_tokens
        expected = by_hand(dense, scaled).forward_features(images)
        torch.testing.assert_close(features, expected, rtol=1e-6, atol=1e-6)
        oracle = by_hand(dense, scaled)
        oracle(images)
        check_clusters(model, oracle, images)
    fixed = small_vit(img_size=(24, 20), depth=3)
    model = compress(fixed, adaptive_plan(fixed))
    model.set_input_size((32, 28))
    assert model.plan.grid == (8, 7)
    with torch.inference_mode():
        assert model.forward_features(images.float()).shape[1] == 57


@pytest.mark.parametrize("share", [0.5, 0.62, 0.8])
def test_a_plan_for_a_share_of_the_gmacs(share):
    dense = timm.create_model("vit_tiny_patch16_224", depth=4)
    plan = AdaptivePlan.for_model(dense, gmacs=share)
    counted = count_gmacs(compress(dense, plan), input_size(dense)) / count_gmacs(dense, input_size(dense))
    assert share - 0.01 < counted <= share


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [(1, [0]), (3, [0]), (4, [1]), (6, [1, 2]), (9, [1, 2, 4]), (12, [1, 3, 5, 8]), (24, [2, 6, 10, 16])],
)
def test_where_models_merge(depth, blocks):
    for plan in AdaptivePlan.candidates(small_vit(depth=depth)):
        assert list(plan.merges) == blocks


def test_shares_out_of_reach():
    dense = timm.create_model("vit_tiny_patch16_224", depth=2)
    with pytest.raises(
        ValueError, match=r"gmacs must be at least 0\.\d+, by the strongest merging, and below 1, got 0.01"
    ):
        AdaptivePlan.for_model(dense, gmacs=0.01)
    with pytest.raises(ValueError, match="and below 1, got 1"):
        AdaptivePlan.for_model(dense, gmacs=1)
    with pytest.raises(ValueError, match="model must have at least 2 patches to merge, got 1"):
        AdaptivePlan.for_model(small_vit(img_size=4))
    assert len(AdaptivePlan.candidates(small_vit(img_size=(4, 8)))) == 1


def test_plans_are_saved(tmp_path):
    plan = AdaptivePlan((7, 5), 6, 2, {4: 12, 1: 25}, rounds=3, root_sizes=True)
    plan.save(tmp_path / "plan.json")
    assert AdaptivePlan.load(tmp_path / "plan.json") == plan
    assert plan.tokens == (37, 25, 25, 25, 12, 12)
    assert "7 x 5 patches" in repr(plan)
    assert hash(plan) == hash(AdaptivePlan.from_dict(plan.to_dict()))
    assert plan.resize((4, 5)).rounds == 3
    with pytest.raises(ValueError, match="rounds must be a whole number of at least 1, got 0"):
        AdaptivePlan((7, 5), 6, 2, {}, rounds=0)
    with pytest.raises(ValueError, match="root_sizes must be a bool, got 1"):
        AdaptivePlan((7, 5), 6, 2, {}, root_sizes=1)
    with pytest.raises(ValueError, match="not a compression plan"):
        CompressionPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("merges", "message"),
    [
        ({1: 8}, "merges must leave between 9 and 36 tokens before block 1, got 8"),
        ({1: 20, 2: 21}, "merges must leave between 5 and 20 tokens before block 2, got 21"),
        ({6: 20}, "merges must name blocks from 0 to 5, got 6"),
        ([1, 2], "merges must be a dict"),
    ],
)
def test_impossible_merges(merges, message):
    with pytest.raises(ValueError, match=message):
        AdaptivePlan((7, 5), 6, 1, merges)


def test_the_registry_makes_one(tmp_path):
    plan = AdaptivePlan((14, 14), 12, 1, {3: 120})
    plan.save(tmp_path / "adaptive.json")
    model = timm.create_model("pm_deit_tiny_patch16_224", plan=str(tmp_path / "adaptive.json"))
    assert model.plan == plan
    net = timm.create_model("pm_deit_tiny_patch16_224", plan=plan, features_only=True, out_indices=(2, 5))
    assert [found.shape[2:] for found in net(torch.randn(1, 3, 224, 224))] == [(14, 14), (14, 14)]


def test_what_an_adaptive_model_has_not():
    dense = small_vit()
    plan = adaptive_plan(dense)
    model = compress(dense, plan)
    for ask in (model.merge_matrices, model.reconstruct_matrices, model.transitions):
        with pytest.raises(ValueError, match="the model has an AdaptivePlan"):
            ask()
    with pytest.raises(ValueError, match="execution must be 'folded' with an AdaptivePlan"):
        model.execution = "literal"
    with pytest.raises(ValueError, match="size_bias must be False with an AdaptivePlan"):
        compress(dense, plan, size_bias=True)
    with pytest.raises(ValueError, match="score model.uncompressed"):
        score_tokens(model, [(images_for(dense), torch.zeros(3).long())], batches=1)
    with pytest.raises(ValueError, match="plan was made for depth 4, but the model has depth 5"):
        compress(dense, AdaptivePlan((7, 5), 4, 1, {}))


def test_compiled_without_breaks():
    dense = small_vit(depth=3)
    model, images = compress(dense, adaptive_plan(dense)), images_for(dense)
    compiled = torch.compile(model, fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_files(format, tmp_path):
    """An ONNX file has no scatter, no loop and nothing that depends on the data but numbers."""
    dense = small_vit(depth=3)
    exported = export_model(compress(dense, adaptive_plan(dense)), tmp_path / f"model.{format}", format)
    assert exported.max_error < 1e-4
    if format == "onnx":
        kinds = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
        assert not kinds & {"ScatterElements", "ScatterND", "Loop", "If", "NonZero"}
