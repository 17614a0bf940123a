"""Pictures of plans: one panel per stage, the right colours at the right patches."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import plan_for, small_vit
from matplotlib.colors import to_rgb

from pm_models import AdaptivePlan, CompressionPlan, Segmenter, StagePlan, compress
from pm_models.visualize import cluster_figure, plan_figure, token_layers

KEPT, MERGED, PRUNED = (to_rgb(colour) for colour in ("#2a9d8f", "#e9c46a", "#3d405b"))


def test_colours_and_outlines():
    #  kept, merged, pruned / merged, kept, kept: three segments
    stage = StagePlan(1, 2, (0, 0, -1, 1, 1, 2), (1.0, 0.5, 0.0, 0.2, 1.0, 1.0))
    figure = plan_figure(CompressionPlan((2, 3), 4, 1, (stage,)))
    (panel,) = figure.axes
    assert panel.get_title() == "blocks 1 to 2: 4 of 7 tokens"
    tint = panel.images[0].get_array()[..., :3]
    expected = np.array([[KEPT, MERGED, PRUNED], [MERGED, KEPT, KEPT]])
    np.testing.assert_allclose(tint, expected, atol=1e-6)
    outlines = {tuple(map(tuple, segment)) for segment in panel.collections[0].get_segments()}
    assert outlines == {
        ((2, 0), (2, 1)),  # merged | pruned
        ((2, 1), (2, 2)),  # kept | kept below
        ((0, 1), (1, 1)),
        ((1, 1), (2, 1)),
        ((2, 1), (3, 1)),
    }


def test_layers_of_a_plan():
    """Blocks in no stage see the image; pruned patches are striped, merged ones in the mean colour of their segment."""
    dense = small_vit(img_size=(8, 12), depth=6)
    segments = (0, 0, -1, 1, 1, 2)
    stages = (
        StagePlan(1, 2, segments, (1.0, 0.5, 0.0, 0.2, 1.0, 1.0)),
        StagePlan(3, 3, (0, 1, 2, 3, 4, -1), (1.0, 1.0, 1.0, 1.0, 1.0, 0.0)),
    )
    model = compress(dense, CompressionPlan((2, 3), 6, 1, stages))
    picture = np.random.default_rng(0).random((8, 12, 3))
    plain, merged, pruned, after = token_layers(model, torch.randn(3, 8, 12), picture)
    assert [(layer.first, layer.last) for layer in (plain, merged, pruned, after)] == [(0, 0), (1, 2), (3, 3), (4, 5)]
    for layer in (plain, after):
        assert not layer.paint.any()
        assert not layer.outlines
    places = [np.s_[4 * y : 4 * y + 4, 4 * x : 4 * x + 4] for y in range(2) for x in range(3)]
    for segment in range(3):
        of_segment = [places[patch] for patch in range(6) if segments[patch] == segment]
        mean = np.mean([picture[place] for place in of_segment], axis=(0, 1, 2))
        for place in of_segment:
            expected = (*mean, 1) if len(of_segment) > 1 else (0, 0, 0, 0)
            np.testing.assert_allclose(merged.paint[place], np.broadcast_to(expected, (4, 4, 4)))
    for layer, patch in ((merged, 2), (pruned, 5)):
        colours = {tuple(pixel) for pixel in layer.paint[places[patch]].reshape(-1, 4)}
        assert colours == {(*PRUNED, 0.85), (1, 1, 1, 0.6)}
    assert not any(pruned.paint[place].any() for place in places[:5])
    assert set(pruned.outlines) == {
        ((1, 0), (1, 1)), ((2, 0), (2, 1)), ((1, 1), (1, 2)), ((2, 1), (2, 2)),
        ((0, 1), (1, 1)), ((1, 1), (2, 1)), ((2, 1), (3, 1)),
    }  # fmt: skip


@pytest.mark.parametrize("image", [None, np.random.default_rng(0).random((28, 20, 3)), np.zeros((28, 20))])
def test_saves_as_a_picture(tmp_path, image):
    plan = CompressionPlan.from_scores(torch.rand(5, 35), (7, 5), 0.5, 0.2)
    figure = plan_figure(plan, image)
    figure.savefig(tmp_path / "plan.png", dpi=50)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert sum(bool(panel.images) for panel in figure.axes) == 5


def test_a_plan_without_stages_is_an_empty_picture(tmp_path):
    plan_figure(CompressionPlan((2, 3), 4, 1, ())).savefig(tmp_path / "plan.png", dpi=20)


CLUSTERED = {  # models, the sizes of their images, and the grids
    "a class token": (lambda: small_vit(), (28, 20), (7, 5)),
    "registers and rotary positions": (lambda: small_vit("vit_small_patch16_dinov3"), (28, 20), (7, 5)),
    "no prefix tokens": (lambda: small_vit("vit_base_patch16_siglip_224"), (28, 20), (7, 5)),
    "images of another size": (lambda: small_vit(dynamic_img_size=True), (20, 32), (5, 8)),
    "patches that are no squares": (lambda: small_vit(patch_size=(4, 5)), (28, 20), (7, 4)),
    "padded images": (lambda: small_vit(dynamic_img_size=True, dynamic_img_pad=True), (26, 19), (7, 5)),
    "grey images": (lambda: small_vit(in_chans=1), (28, 20), (7, 5)),
}


def in_rgb(picture):
    return np.dstack([picture] * 3) if picture.ndim == 2 else picture


@pytest.mark.parametrize("case", CLUSTERED)
def test_what_has_merged(case):
    make, size, grid = CLUSTERED[case]
    dense = make()
    model = compress(dense, AdaptivePlan.for_model(dense, gmacs=0.6))
    image, picture = torch.randn(dense.in_chans, *size), np.random.default_rng(0).random((*size, 3))
    if dense.in_chans == 1:
        picture = picture[..., 0]
    clusters = model.clusters(image[None])
    figure = cluster_figure(model, image, picture)
    in_colours = in_rgb(picture)
    layers = token_layers(model, image, in_colours)
    starts = sorted({0, *clusters})
    assert [(layer.first, layer.last + 1) for layer in layers] == [*pairwise([*starts, model.plan.depth])]
    assert not layers[0].paint.any()
    assert not layers[0].outlines
    first, *panels = [panel for panel in figure.axes if panel.images]
    np.testing.assert_array_equal(first.images[0].get_array(), picture)
    assert len(panels) == len(clusters) == len(model.plan.merges)
    rows, columns = dense.patch_embed.patch_size
    for panel, (block, tokens) in zip(panels, clusters.items(), strict=True):
        left = len(tokens.unique()) + model.num_prefix_tokens
        assert panel.get_title() == f"before block {block}: {left} tokens"
        of_patch = tokens.view(grid).tolist()
        pixels = {}
        for y, x in np.ndindex(size):
            pixels.setdefault(of_patch[y // rows][x // columns], []).append((y, x))
        expected = picture.copy()
        for token, places in pixels.items():
            if (tokens == token).sum() > 1:
                for place in places:
                    expected[place] = np.mean([picture[other] for other in places], axis=0)
        np.testing.assert_allclose(panel.images[0].get_array(), expected)
        assert panel.images[0].get_extent() == [0, size[1] / columns, size[0] / rows, 0]
        outlines = {tuple(map(tuple, line)) for line in panel.collections[0].get_segments()}
        apart = {
            ((x + 1, y), (x + 1, y + 1))
            for y, x in np.ndindex(grid[0], grid[1] - 1)
            if of_patch[y][x] != of_patch[y][x + 1]
        } | {
            ((x, y + 1), (x + 1, y + 1))
            for y, x in np.ndindex(grid[0] - 1, grid[1])
            if of_patch[y][x] != of_patch[y + 1][x]
        }
        assert outlines == apart
        layer = next(layer for layer in layers if layer.first == block)
        colours, opacity = np.split(layer.paint, [3], axis=-1)
        seen = in_colours[: len(opacity), : opacity.shape[1]] * (1 - opacity) + colours * opacity
        np.testing.assert_allclose(seen, in_rgb(expected)[: len(seen), : seen.shape[1]])
        assert set(layer.outlines) == outlines


def test_what_has_merged_in_a_segmenter():
    encoder = small_vit()
    plan = AdaptivePlan.for_model(encoder, gmacs=0.6)
    image, picture = torch.randn(3, 28, 20), np.random.default_rng(0).random((28, 20, 3))
    alone, within = (
        cluster_figure(model, image, picture).axes
        for model in (compress(encoder, plan), Segmenter(encoder, 3).compressed(plan))
    )
    for panel, other in zip(alone, within, strict=True):
        assert panel.get_title() == other.get_title()
        for drawn, again in zip(panel.images, other.images, strict=True):
            np.testing.assert_array_equal(drawn.get_array(), again.get_array())
    with pytest.raises(ValueError, match="clusters need a model with an AdaptivePlan"):
        cluster_figure(compress(encoder, plan_for(encoder)), image, picture)
