"""Model families people use, with random weights: each is compressed, trained, folded, saved, loaded and exported.

docs/families.md's table is what these tests found.
"""

import copy
import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from covering import REST
from families import FAMILIES, randomised, transformers_model
from helpers import images_for, plan_for, small_vit
from torch import nn
from torchvision.models import VisionTransformer as TorchvisionTransformer

from pm_models import (
    CompressionPlan,
    Segmenter,
    compress,
    export_model,
    load_pretrained,
    save_pretrained,
    score_tokens,
    to_timm,
)
from pm_models.reductions.rotary import RotaryPositions

OF_LIBRARIES = [name for name in FAMILIES if name.startswith(("torchvision", "Hugging"))]


# A pt2 file is a step on the way to an ONNX file: those of each library and kind of positions stand for the rest.
EXPORTS = [
    *(pytest.param(family, "onnx", id=family) for family in FAMILIES),
    *(
        pytest.param(
            family, "pt2", id=f"{family}, pt2", marks=() if family in ("DeiT", *OF_LIBRARIES, "EVA-02") else REST
        )
        for family in FAMILIES
    ),
]


@pytest.mark.parametrize(("family", "format"), EXPORTS)
def test_a_family(family, format, tmp_path):
    """What a user does with a model, in order; everything that is asserted holds for every family."""
    dense = FAMILIES[family]()
    images, targets = images_for(dense), torch.randint(0, max(dense.num_classes, 2), (3,))
    scores = score_tokens(dense, [(images, targets)], batches=1)
    assert (scores > 0).all()
    plan = CompressionPlan.from_scores(
        scores, tuple(dense.patch_embed.grid_size), 0.5, 0.2, num_prefix_tokens=dense.num_prefix_tokens
    )
    model = compress(dense, plan)
    with torch.inference_mode():
        torch.testing.assert_close(model.uncompressed()(images), dense(images))

    exact = copy.deepcopy(model).double()
    with torch.inference_mode():
        folded = exact(images.double())
        exact.execution = "literal"
        torch.testing.assert_close(folded, exact(images.double()), rtol=1e-10, atol=1e-10)

    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = F.cross_entropy(model(images), targets)
    loss.backward()
    moved = {name: parameter.detach().clone() for name, parameter in model.stages.named_parameters()}
    optimizer.step()
    model.eval()
    assert any((parameter != moved[name]).any() for name, parameter in model.stages.named_parameters())
    with torch.inference_mode():
        assert F.cross_entropy(model(images), targets) < loss

    save_pretrained(model, tmp_path / "model")
    loaded = load_pretrained(tmp_path / "model")
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))
        maps = model.forward_intermediates(images, intermediates_only=True)
        assert all(found.shape[2:] == plan.grid for found in maps)
        assert Segmenter(model, 5)(images).shape == (3, 5, *images.shape[2:])
    assert export_model(loaded, tmp_path / f"model.{format}", format).max_error < 1e-4


def test_the_guide_names_the_families():
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    rows = []
    for family, make in FAMILIES.items():
        model = make()
        plan = plan_for(model)
        try:
            compress(model, plan, merge_site="attention")
            inside = "yes"
        except ValueError:
            inside = "no"
        prefix, rotary = model.num_prefix_tokens, "rotary" if getattr(model, "rope", None) is not None else "added"
        rows.append(f"| {family} | {type(model).__name__} | {prefix} | {rotary} | {inside} |")
    table = "\n".join(rows)
    assert table in text, table


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("eva02_tiny_patch14_224", {}),
        ("eva_giant_patch14_clip_224", {}),
        ("eva02_enormous_patch14_clip_224", {}),
        ("vit_small_patch16_dinov3", {}),
        ("vit_base_patch16_dinov3_qkvb", {}),
        ("vit_small_patch16_rope_mixed_ape_224", {}),
        ("vit_medium_patch16_rope_reg1_gap_256", {}),
        ("vit_pe_core_tiny_patch16_384", {}),
        ("vit_base_patch16_sapiens2", {"num_kv_heads": (2, 1, 2)}),
    ],
)
@pytest.mark.parametrize("stages", [None, [(0, 1)], [(1, 2)]])
def test_rotary_models_fold_exactly(name, arguments, stages):
    model = small_vit(name, depth=3, **arguments).double()
    compressed = compress(model, plan_for(model, stages=stages), size_bias=stages is not None)
    images = images_for(model).double().requires_grad_()
    found = []
    for execution in ("folded", "literal"):
        compressed.execution = execution
        out = compressed(images)
        found.append((out, *torch.autograd.grad(out.square().sum(), [images, *compressed.stages.parameters()])))
    for folded, literal in zip(*found, strict=True):
        torch.testing.assert_close(folded, literal, rtol=1e-9, atol=1e-9)
    maps = []
    for execution in ("folded", "literal"):
        compressed.execution = execution
        maps.append(compressed.forward_intermediates(images, intermediates_only=True))
    for folded, literal in zip(*maps, strict=True):
        torch.testing.assert_close(folded, literal, rtol=1e-9, atol=1e-9)


def table_of(angles):
    return torch.cat([angles.sin(), angles.cos()], -1)


def angles_at(model, places):
    """The rotary angles (places, head dim) at places (y, x) in patches, written out from how each family says it."""
    rope, (rows, columns) = model.rope, model.patch_embed.grid_size
    y, x = places.double().unbind(1)
    if type(rope).__name__ == "RotaryEmbeddingCat":  # EVA-02: bands of 1 / 10000^(i / bands), places scaled to 16 x 16
        per_axis = rope.bands.double()
        y, x = y / rows * rope.ref_feat_shape[0], x / columns * rope.ref_feat_shape[1]
        return torch.cat([y[:, None] * per_axis, x[:, None] * per_axis], 1).repeat_interleave(2, 1)
    periods = rope.periods.double()  # DINOv3: coordinates from -1 to 1 at the patches' centres
    y, x = 2 * (y + 0.5) / rows - 1, 2 * (x + 0.5) / columns - 1
    return torch.cat([math.tau * y[:, None] / periods, math.tau * x[:, None] / periods], 1).repeat(1, 2)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3"])
def test_a_merged_token_stands_at_the_mean_of_its_members(name):
    """The model against timm's own blocks, given tables computed at mean positions."""
    model = small_vit(name, depth=3).double()
    grid, prefix = tuple(model.patch_embed.grid_size), model.num_prefix_tokens
    places = torch.cartesian_prod(*(torch.arange(side) for side in grid))
    table = table_of(angles_at(model, places))
    torch.testing.assert_close(table, model.rope.get_embed(shape=grid).double(), rtol=1e-5, atol=1e-5)
    plan = plan_for(model)
    compressed = compress(model, plan)
    images = images_for(model).double()
    with torch.inference_mode():
        x, _ = model._pos_embed(model.patch_embed(images))
        x = model.norm_pre(x)
        for index, block in enumerate(model.blocks):
            merge, reconstruct = plan.merge_matrix(index).double(), plan.reconstruct_matrix(index).double()
            shares = merge[prefix:, prefix:] / merge[prefix:, prefix:].sum(1, keepdim=True)
            mean = table_of(angles_at(model, shares @ places.double()))
            y = block(merge @ x, rope=mean)
            x = reconstruct @ y + (1 - plan.token_mask(index).double())[:, None] * x
        expected = model.forward_head(model.norm(x))
        torch.testing.assert_close(compressed(images), expected, rtol=1e-5, atol=1e-5)


class _Rope(nn.Module):
    """Angles by a function of places, which are patches or, scaled, shares of the image."""

    def __init__(self, function, scaled):
        super().__init__()
        self.function, self.scaled = function, scaled

    def get_embed(self, shape):
        grid = torch.meshgrid(*(torch.arange(float(side)) for side in shape), indexing="ij")
        y, x = (line.flatten() / (side / 7 if self.scaled else 1) for line, side in zip(grid, shape, strict=True))
        return table_of(self.function(y, x))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("slopes", [(2.9, -1.7), (-3.1, 0.3)])
@pytest.mark.parametrize("grid", [(7, 5), (3, 7), (1, 4), (5, 1)])
def test_slopes_are_read_off_the_table(grid, slopes, scaled):
    """Also where a step, scaled to a small grid, is more than half a turn."""

    def angles(y, x):
        return (slopes[0] * y + slopes[1] * x + 5)[:, None]

    rope = _Rope(angles, scaled)
    scores = torch.rand(1, grid[0] * grid[1])
    plan = CompressionPlan.from_scores(scores, grid, 0.4, 0.1, num_prefix_tokens=2)
    found = RotaryPositions(rope, plan, mixed=False)(rope.get_embed(grid), [(0, 0, True)])[0]
    merge = plan.merge_matrix(0)[2:, 2:]
    places = torch.cartesian_prod(*(torch.arange(float(side)) for side in grid))
    y, x = (merge / merge.sum(1, keepdim=True) @ places).unbind(1)
    y, x = (7 * place / side if scaled else place for place, side in zip((y, x), grid, strict=True))
    torch.testing.assert_close(found, table_of(angles(y, x)), rtol=1e-4, atol=1e-4)


def test_angles_that_are_not_linear_are_refused():
    plan = CompressionPlan.from_scores(torch.rand(1, 35), (7, 5), 0.4, 0.1)
    with pytest.raises(ValueError, match="not proportional to the place in the grid"):
        RotaryPositions(_Rope(lambda y, x: (0.02 * y.square() + x)[:, None], False), plan, mixed=False)


def test_learned_rotary_frequencies_train():
    model = compress(dense := small_vit("vit_small_patch16_rope_mixed_224", depth=3), plan_for(dense)).train()
    images = images_for(model)
    model(images).square().sum().backward()
    assert (model.rope.freqs.grad != 0).any()
    model.eval()
    with torch.no_grad():
        before = model(images)
        model.rope.freqs.mul_(1.5)
        folded = model(images)
        assert not torch.allclose(folded, before)
        model.execution = "literal"
        torch.testing.assert_close(folded, model(images), rtol=1e-4, atol=1e-4)


def test_rotary_positions_shaken_in_training():
    model = small_vit("vit_small_patch16_dinov3", depth=2, rope_rescale_coords=2.0)
    model = compress(model, plan_for(model))
    images = images_for(model)
    with torch.no_grad():
        assert torch.equal(model(images), model(images))
        model.train()
        assert not torch.allclose(model(images), model(images))


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=REST)])
def test_rotary_models_compile_without_graph_breaks(training):
    model = small_vit("eva02_tiny_patch14_224", depth=2)
    model = compress(model, plan_for(model)).train(training)
    images = images_for(model)
    with torch.set_grad_enabled(training):
        expected = model(images)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(images), expected, rtol=1e-4, atol=1e-4)


def test_positions_move_with_the_model():
    model = compress(dense := small_vit("vit_small_patch16_dinov3", depth=2), plan_for(dense))
    images = images_for(model)
    half = copy.deepcopy(model).bfloat16()
    with torch.inference_mode():
        expected = model(images)
        torch.testing.assert_close(half(images.bfloat16()).float(), expected, rtol=0.1, atol=0.1 * expected.abs().max())
        assert torch.equal(model.float()(images), expected)
    assert not [name for name in model.state_dict() if "position" in name]


@pytest.mark.parametrize("name", ["ViTForImageClassification", "ViTModel", "Dinov2Model", "Dinov2WithRegistersModel"])
def test_models_of_transformers(name):
    given = transformers_model(name).train()
    converted = to_timm(given)
    assert given.training
    images = torch.randn(2, 3, 20, 20)
    with torch.inference_mode():
        out = given.eval()(pixel_values=images)
        if name == "ViTForImageClassification":
            torch.testing.assert_close(converted(images), out.logits, rtol=1e-4, atol=1e-4)
        else:
            assert converted.num_classes == 0
            torch.testing.assert_close(converted.forward_features(images), out.last_hidden_state, rtol=1e-4, atol=1e-4)


def test_a_gated_mlp_and_half_precision_of_transformers():
    converted = to_timm(transformers_model("Dinov2Model", use_swiglu_ffn=True).bfloat16())
    assert next(converted.parameters()).dtype == torch.bfloat16


def test_models_of_torchvision():
    given = randomised(TorchvisionTransformer(20, 4, 2, 2, 32, 100, num_classes=5)).eval()
    images = torch.randn(2, 3, 20, 20)
    with torch.inference_mode():
        torch.testing.assert_close(to_timm(given)(images), given(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: timm.create_model("resnet10t"), TypeError, "must be torchvision's VisionTransformer, .* got ResNet"),
        (
            lambda: TorchvisionTransformer(20, 4, 2, 2, 32, 64, representation_size=8),
            ValueError,
            "head consists of",
        ),
        (
            lambda: transformers_model("Dinov2ForImageClassification"),
            ValueError,
            "classifier also reads .* model.dinov2",
        ),
        (lambda: transformers_model("ViTModel", hidden_act="tanh"), ValueError, "hidden_act 'tanh', expected one of"),
        (lambda: _doubled(transformers_model("ViTModel")), ValueError, "does not compute the same as timm's"),
    ],
)
def test_models_that_cannot_be_taken_over(make, error, message):
    with pytest.raises(error, match=message):
        to_timm(make())


def _doubled(model):
    """A model whose forward does more than its class's does."""
    forward = model.layernorm.forward
    model.layernorm.forward = lambda x: 2 * forward(x)
    return model
