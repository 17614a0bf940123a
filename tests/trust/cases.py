"""What the property tests draw: tensors in ugly memory, plans, and a count of what was tried."""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from pm_models import CompressionPlan

LAYOUTS = ("contiguous", "transposed", "sliced", "offset")
SIDES = st.integers(1, 9)


def ugly_sizes(most: int) -> st.SearchStrategy[int]:
    """Mostly small, and those at which tiles end: primes, powers of two and one past them."""
    edges = [size for size in (1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 65, 127, 129) if size <= most]
    return st.one_of(st.integers(1, most), st.sampled_from(edges))


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The values in memory of another layout, the last dimension contiguous, amid NaN that nothing may read."""
    shape = list(values.shape)
    if layout == "transposed" and values.ndim > 2:  # the first two dimensions
        shape[0], shape[1] = shape[1], shape[0]
    if layout == "sliced":
        shape[-1] += 3
        shape[-2 if values.ndim > 1 else -1] += 2
    count = math.prod(shape)
    guard = 64 + (1 if layout == "offset" else 0)  # also off the alignment of vector loads
    memory = torch.full((count + 2 * guard,), torch.nan, dtype=values.dtype, device=values.device)
    view = memory[guard : guard + count].view(shape)
    if layout == "transposed" and values.ndim > 2:
        view = view.transpose(0, 1)
    elif layout == "sliced":
        view = view[..., : values.shape[-1]]
        if values.ndim > 1:
            view = view.narrow(-2, 1, values.shape[-2])
    view.copy_(values)
    return view


@st.composite
def plans(draw: st.DrawFn, *, most_blocks: int = 4, most_side: int = 9) -> CompressionPlan:
    """A plan by any options, from scores with ties and zeros; never one whose every patch is pruned."""
    grid = draw(st.integers(1, most_side)), draw(st.integers(1, most_side))
    depth = draw(st.integers(1, most_blocks))
    return CompressionPlan.from_scores(draw(scores(depth, grid)), grid, **draw(plan_options(depth)))


def scores(depth: int, grid: tuple[int, int]) -> st.SearchStrategy[Tensor]:
    """(depth, patches): random, few different values, all equal, with zeros, or with layers of zeros."""

    def make(seed: int, kind: str) -> Tensor:
        found = torch.rand(depth, grid[0] * grid[1], generator=torch.Generator().manual_seed(seed))
        if kind == "ties":
            found = (3 * found).ceil()
        elif kind == "equal":
            found = torch.ones_like(found)
        elif kind == "zeros":
            found = found * (found > 0.5)
        elif kind == "layers of zeros":
            found[::2] = 0
        return found

    return st.builds(
        make, st.integers(0, 2**31), st.sampled_from(["random", "ties", "equal", "zeros", "layers of zeros"])
    )


@st.composite
def plan_options(draw: st.DrawFn, depth: int) -> dict[str, object]:
    """Arguments of ``from_scores``."""
    keep_rate = draw(st.floats(0.01, 1))
    options: dict[str, object] = {
        "keep_rate": keep_rate,
        "prune_rate": draw(st.floats(0, max(0.0, 1 - keep_rate - 1e-6))),
        "num_prefix_tokens": draw(st.integers(0, 3)),
        "allocation": draw(st.sampled_from(["global", "layer"])),
        "row_weights": draw(st.sampled_from(["sum", "average"])),
        "segments": draw(st.sampled_from(["raster", "nearest"])),
    }
    if draw(st.booleans()):
        bounds = sorted(draw(st.sets(st.integers(0, depth - 1), min_size=1)))
        options["stages"] = [
            (first, draw(st.integers(first, following - 1)))
            for first, following in zip(bounds, [*bounds[1:], depth], strict=True)
        ]
    return options
