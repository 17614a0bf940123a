"""Pictures of a plan: which patches each block keeps, merges and prunes, and of what merges in an image."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from .files import atomic_path
from .models import Model, encoder_of
from .plan import CompressionPlan, StagePlan

_KEPT, _MERGED, _PRUNED = "#2a9d8f", "#e9c46a", "#3d405b"
# (256, 3) from 0 to 1, the colours of classes: twenty distinct ones, then a scale; white for 255.
_CLASS_COLOURS = np.concatenate(
    [colormaps["tab20"](range(20))[:, :3], colormaps["nipy_spectral"](np.linspace(0, 1, 235))[:, :3], np.ones((1, 3))]
)


def plan_figure(plan: CompressionPlan, image: np.ndarray | None = None) -> Figure:
    """Draw one panel per stage: kept and merged patches tinted, segments outlined, pruned patches dark.

    Args:
        plan: what to draw.
        image: (height, width) or (height, width, 3), values from 0 to 1, drawn below the patches.

    Returns:
        A matplotlib figure, not attached to any window.
    """
    figure, panels = _panels(len(plan.stages), legend=0.8)
    for panel, stage in zip(panels, plan.stages, strict=False):
        _draw_stage(panel, plan, stage, image)
    figure.legend(
        handles=[
            Patch(facecolor=_KEPT, label="kept"),
            Patch(facecolor=_MERGED, label="merged into the kept patch of its outline"),
            Patch(facecolor=_PRUNED, label="pruned (skips the block)"),
        ],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=8,
    )
    return figure


def save_plan_picture(plan: CompressionPlan, path: str | os.PathLike, image: np.ndarray | None = None) -> None:
    """Write :func:`plan_figure` to a PNG file, which is replaced as a whole or not at all."""
    _save(plan_figure(plan, image), path)


def cluster_figure(model: Model, image: Tensor, picture: np.ndarray) -> Figure:
    """Draw an image and, for each merge, the image with the patches of every token outlined.

    Merged patches have their mean colour; patches that are still tokens of their own show the image.

    Args:
        model: a model with an AdaptivePlan, in evaluation mode.
        image: (C, H, W), the model's input.
        picture: (H, W) or (H, W, 3), the same image as it is displayed, values from 0 to 1.

    Returns:
        A matplotlib figure, not attached to any window.

    Raises:
        ValueError: the model has another plan.
    """
    encoder = encoder_of(model)
    images = image[None].to(encoder.patch_embed.proj.weight)
    clusters, plan = encoder.clusters(images), encoder.plan.resize(encoder.grid_of(images))
    (rows, columns), (height, width) = plan.grid, encoder.patch_embed.patch_size
    picture = picture[: rows * height, : columns * width]  # the patches may cover less or more than the image
    extent = (0, picture.shape[1] / width, picture.shape[0] / height, 0)
    figure, panels = _panels(1 + len(clusters))
    _draw_picture(panels[0], picture, extent)
    panels[0].set_title(f"{plan.num_tokens} tokens", fontsize=8)
    for panel, block in zip(panels[1:], clusters, strict=False):
        tokens = clusters[block].view(plan.grid).cpu().numpy()
        _draw_picture(panel, _painted(picture, tokens, (height, width)), extent)
        _draw_outlines(panel, tokens, linewidths=0.5)
        panel.set_title(f"before block {block}: {plan.tokens[block]} tokens", fontsize=8)
    return figure


def save_cluster_picture(model: Model, path: str | os.PathLike, image: Tensor, picture: np.ndarray) -> None:
    """Write :func:`cluster_figure` to a PNG file, which is replaced as a whole or not at all."""
    _save(cluster_figure(model, image, picture), path)


class Layer(NamedTuple):
    """How some blocks see an image of H x W pixels.

    Args:
        first, last: the blocks.
        paint: (H, W, 4), from 0 to 1, over the image from its top left, as far as there are patches: merged ones in the
            mean colour of their token, pruned ones striped, those that are tokens of their own transparent.
        outlines: the edges between patches of different tokens, ((x, y), (x, y)) in patches; none where all are tokens.
    """

    first: int
    last: int
    paint: np.ndarray
    outlines: list[tuple[tuple[int, int], tuple[int, int]]]


def token_layers(model: Model, image: Tensor, picture: np.ndarray) -> list[Layer]:
    """What the tokens of every block stand for, a layer for blocks in which it is the same.

    Args:
        model: compressed by either kind of plan, in evaluation mode.
        image: (C, H, W), what the model is given.
        picture: (H, W, 3), the same to be seen, values from 0 to 1.
    """
    encoder = encoder_of(model)
    images = image[None].to(encoder.patch_embed.proj.weight)
    grid, depth, (height, width) = encoder.grid_of(images), len(encoder.blocks), encoder.patch_embed.patch_size
    patches = np.arange(grid[0] * grid[1]).reshape(grid)
    if encoder.compression.adaptive:
        clusters = {block: tokens.view(grid).cpu().numpy() for block, tokens in encoder.clusters(images).items()}
        starts = {0: patches} | clusters
    else:
        stages = {block: encoder.plan.stage_of(block) for block in range(depth)}
        starts = {
            block: patches if stage is None else np.array(stage.segments).reshape(grid)
            for block, stage in stages.items()
            if block == 0 or stage is not stages[block - 1]
        }
    picture = picture[: grid[0] * height, : grid[1] * width]  # the last patches may end before the image does
    layers = []
    for (first, tokens), following in zip(starts.items(), [*[*starts][1:], depth], strict=True):
        paint = _paint(picture, tokens, (height, width))
        layers.append(Layer(first, following - 1, paint, _outlines(tokens) if paint.any() else []))
    return layers


def save_accuracy_picture(
    points: Mapping[str, tuple[float, float]], path: str | os.PathLike, *, quality: str = "top-1 accuracy"
) -> None:
    """Write a PNG file with models by name, each at its throughput (images/s) and ``quality`` (percent)."""
    figure, axes = _chart("images per second", f"{quality} (%)")
    for name, (speed, percent) in points.items():
        axes.plot(speed, percent, "o", color=_KEPT)
        axes.annotate(name, (speed, percent), xytext=(0, 7), textcoords="offset points", ha="center")
    axes.margins(0.2)
    _save(figure, path)


def save_latency_picture(
    lines: Mapping[int, tuple[Sequence[int], Sequence[float]]],
    path: str | os.PathLike,
    measured: Mapping[int, tuple[float, float]],
) -> None:
    """Write a PNG file of speed against tokens in every block, with a line for each batch size.

    Args:
        lines: for each batch size, numbers of tokens and the speed of each as a multiple of that on all tokens.
        path: the file to write.
        measured: for each batch size, a compressed model's mean number of tokens and its speed; may be empty.
    """
    figure, axes = _chart("tokens in every block", "times as fast as all tokens")
    for index, (batch, (tokens, speeds)) in enumerate(lines.items()):
        axes.plot(tokens, speeds, "o-", color=f"C{index}", markersize=3, label=f"batch {batch}")
        if batch in measured:
            axes.plot(*measured[batch], "*", color=f"C{index}", markersize=12, label=f"the compressed model, {batch}")
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def segmentation_figure(images: Sequence[np.ndarray], maps: Mapping[str, Sequence[np.ndarray]]) -> Figure:
    """Draw a row for each image: the image, and its classes in a column for each of ``maps``.

    Args:
        images: (height, width, 3) each, values from 0 to 1.
        maps: by column title, the classes (height, width) of each image, in any size; 255 is drawn white.

    Returns:
        A matplotlib figure, not attached to any window.
    """
    columns = {"image": images, **{name: [_CLASS_COLOURS[classes] for classes in maps[name]] for name in maps}}
    figure = Figure(figsize=(2.8 * len(columns), 2.2 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    for column, (name, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(name, fontsize=9)
        for panel, picture in zip(axes[:, column], pictures, strict=True):
            panel.imshow(picture, interpolation="nearest")
            panel.set_axis_off()
    return figure


def save_segmentation_picture(
    images: Sequence[np.ndarray], maps: Mapping[str, Sequence[np.ndarray]], path: str | os.PathLike
) -> None:
    """Write :func:`segmentation_figure` to a PNG file, which is replaced as a whole or not at all."""
    _save(segmentation_figure(images, maps), path, dpi=110)


def _panels(count: int, legend: float = 0) -> tuple[Figure, list[Axes]]:
    """A figure with at least ``count`` panels in rows of four or five, and ``legend`` inches below for a legend."""
    columns = min(max(count, 1), 5 if count == 5 else 4)
    rows = max(math.ceil(count / columns), 1)
    figure = Figure(figsize=(2.6 * columns, 2.8 * rows + legend), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels:
        panel.set_axis_off()
    return figure, panels


def _chart(x: str, y: str) -> tuple[Figure, Axes]:
    """An empty figure with one panel and labelled axes."""
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Figure, path: str | os.PathLike, dpi: int = 150) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)


def _draw_stage(panel: Axes, plan: CompressionPlan, stage: StagePlan, image: np.ndarray | None) -> None:
    height, width = plan.grid
    segments = np.array(stage.segments).reshape(height, width)
    extent = (0, width, height, 0)
    if image is not None:
        _draw_picture(panel, image, extent)
    tint = np.zeros((height, width, 4))
    opacity = 1.0 if image is None else 0.4
    tint[segments >= 0] = to_rgba(_MERGED, opacity)
    for patch in _kept_patches(stage):
        tint[divmod(patch, width)] = to_rgba(_KEPT, opacity)
    tint[segments < 0] = to_rgba(_PRUNED, 1.0 if image is None else 0.85)
    panel.imshow(tint, extent=extent, interpolation="nearest")
    _draw_outlines(panel, segments, linewidths=0.8)
    blocks = f"block {stage.first}" if stage.first == stage.last else f"blocks {stage.first} to {stage.last}"
    panel.set_title(f"{blocks}: {plan.tokens[stage.first]} of {plan.num_tokens} tokens", fontsize=8)


def _kept_patches(stage: StagePlan) -> list[int]:
    """The patch with the largest weight in each segment."""
    best: dict[int, int] = {}
    for patch in sorted(range(len(stage.segments)), key=stage.weights.__getitem__):
        best[stage.segments[patch]] = patch
    return [patch for segment, patch in best.items() if segment >= 0]


def _draw_picture(panel: Axes, picture: np.ndarray, extent: tuple[float, float, float, float]) -> None:
    panel.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=extent)


def _painted(picture: np.ndarray, tokens: np.ndarray, patch_size: tuple[int, int]) -> np.ndarray:
    """The picture with the mean colour in the patches of every token that has several."""
    places = _of_pixels(tokens, picture, patch_size)
    painted = picture.copy()
    for token in np.flatnonzero(np.bincount(tokens.ravel()) > 1):
        painted[places == token] = picture[places == token].mean(axis=0)
    return painted


def _paint(picture: np.ndarray, segments: np.ndarray, patch_size: tuple[int, int]) -> np.ndarray:
    """What :class:`Layer` has of segments, which are -1 where a patch is pruned."""
    patches = np.arange(segments.size).reshape(segments.shape)
    tokens = np.where(segments < 0, segments.size + patches, segments)  # a pruned patch is in none but its own
    merged = _of_pixels(np.bincount(tokens.ravel())[tokens] > 1, picture, patch_size)
    paint = np.dstack([_painted(picture, tokens, patch_size), merged]) * merged[..., None]
    pruned = _of_pixels(segments < 0, picture, patch_size)
    striped = np.add.outer(*map(np.arange, pruned.shape)) % 6 < 1
    paint[pruned] = to_rgba(_PRUNED, 0.85)
    paint[pruned & striped] = to_rgba("white", 0.6)
    return paint


def _of_pixels(values: np.ndarray, picture: np.ndarray, patch_size: tuple[int, int]) -> np.ndarray:
    """What there is for each patch, for each pixel of a picture; the last patches may end beyond it."""
    return values.repeat(patch_size[0], axis=0).repeat(patch_size[1], axis=1)[: picture.shape[0], : picture.shape[1]]


def _draw_outlines(panel: Axes, segments: np.ndarray, linewidths: float) -> None:
    panel.add_collection(LineCollection(_outlines(segments), colors="white", linewidths=linewidths))


def _outlines(segments: np.ndarray) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The edges between patches of different segments, ((x, y), (x, y)) in patches."""
    right = np.argwhere(segments[:, :-1] != segments[:, 1:]).tolist()
    below = np.argwhere(segments[:-1] != segments[1:]).tolist()
    return [((x + 1, y), (x + 1, y + 1)) for y, x in right] + [((x, y + 1), (x + 1, y + 1)) for y, x in below]
