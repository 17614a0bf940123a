"""One stage of a plan: which patches its blocks keep, merge and prune, and how scores decide that."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class StagePlan:
    """Blocks ``first`` to ``last`` (inclusive), which run on merged tokens.

    ``segments[j]`` is the merged patch token that patch ``j`` goes into, counted from 0 without prefix tokens, or -1
    where the patch is pruned; ``weights[j]`` is the patch's weight in that token, 0 where it is pruned.
    """

    first: int
    last: int
    segments: tuple[int, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        where = f"stage {self.first}..{self.last}"
        if not 0 <= self.first <= self.last:
            raise ValueError(f"{where}: first must be at least 0 and at most last")
        if len(self.segments) != len(self.weights):
            raise ValueError(f"{where}: {len(self.segments)} segments but {len(self.weights)} weights")
        merged = set(self.segments) - {-1}
        if not merged or merged != set(range(len(merged))):
            raise ValueError(f"{where}: segments must use every index from 0 to their largest at least once, or -1")
        for patch, (segment, weight) in enumerate(zip(self.segments, self.weights, strict=True)):
            if not math.isfinite(weight):
                raise ValueError(f"{where}: the weight of patch {patch} must be finite, got {weight}")
            if segment == -1 and weight != 0:
                raise ValueError(f"{where}: patch {patch} is pruned, its weight must be 0, got {weight}")
        energy = [0.0] * len(merged)
        for segment, weight in zip(self.segments, self.weights, strict=True):
            if segment >= 0:
                energy[segment] += weight * weight
        if 0.0 in energy:
            raise ValueError(f"{where}: merged token {energy.index(0.0)} has only zero weights")

    @property
    def merged_patches(self) -> int:
        """How many patch tokens the stage's blocks run on."""
        return max(self.segments) + 1

    @property
    def pruned_patches(self) -> int:
        """How many patches skip the stage's blocks."""
        return self.segments.count(-1)


def kept_and_pruned(scores: Tensor, keep_rate: float, prune_rate: float) -> tuple[Tensor, Tensor]:
    """Which patches are kept and which pruned, (layers, n) bool, where all layers share the rates.

    Every layer keeps at least its best patch.
    """
    layers, patches = scores.shape
    kept, pruned = _ends(scores, int(patches * keep_rate) * layers, int(patches * prune_rate) * layers)
    kept[torch.arange(layers), scores.argmax(dim=1)] = True
    return kept, pruned & ~kept


def _ends(scores: Tensor, highest: int, lowest: int) -> tuple[Tensor, Tensor]:
    """Masks of the ``highest`` and ``lowest`` scores; of equal scores the first counts as the higher."""
    ranking = scores.flatten().argsort(descending=True, stable=True)
    ends = torch.zeros(2, len(ranking), dtype=torch.bool)
    ends[0, ranking[:highest]] = True
    ends[1, ranking[len(ranking) - lowest :]] = True
    return ends[0].view_as(scores), ends[1].view_as(scores)


def plan_stage(
    first: int,
    last: int,
    scores: Tensor,
    kept: Tensor,
    pruned: Tensor,
    grid: tuple[int, int],
    row_weights: str,
    segments: str,
) -> StagePlan:
    centres = kept.nonzero().squeeze(1)
    into = _nearest(centres, grid) if segments == "nearest" else _along_rows(centres, grid)
    of_centres = scores[centres[into]]
    # A layer whose scores are all 0 keeps one patch; the patches merged into it get the same weight.
    weights = torch.where(of_centres > 0, scores / of_centres, 1.0).masked_fill(pruned, 0.0)
    if row_weights == "average":
        weights = weights / torch.zeros_like(scores).index_add(0, into, weights)[into]
    into[pruned] = -1
    return StagePlan(first, last, tuple(into.tolist()), tuple(weights.float().tolist()))


def _along_rows(centres: Tensor, grid: tuple[int, int]) -> Tensor:
    """For each patch the index of the centre that it goes to, by segments of the raster that end with a row."""
    into = torch.empty(grid[0] * grid[1], dtype=torch.long)
    found, left = centres.tolist(), 0
    for index, centre in enumerate(found):
        right = len(into)
        if index + 1 < len(found):
            halfway = -(-(centre + found[index + 1]) // 2)
            right = min(halfway, ((centre + 1) // grid[1] + 1) * grid[1])
        into[left:right] = index
        left = right
    return into


def _nearest(centres: Tensor, grid: tuple[int, int]) -> Tensor:
    """For each patch the index of the nearest centre in the grid, the first of several."""
    rows, columns = centres // grid[1], centres % grid[1]
    across = (torch.arange(grid[1])[:, None] - columns).square()
    # Row by row: a matrix of all distances would have patches times tokens entries.
    return torch.cat([(across + (row - rows).square()).argmin(dim=1) for row in range(grid[0])])


def resize_stage(stage: StagePlan, old: tuple[int, int], new: tuple[int, int], segments: str) -> StagePlan:
    into, weights = torch.tensor(stage.segments), torch.tensor(stage.weights, dtype=torch.float64).abs()
    merged = into >= 0
    largest = torch.zeros(stage.merged_patches, dtype=torch.float64)
    largest = largest.scatter_reduce(0, into[merged], weights[merged], "amax")
    shares = torch.zeros_like(weights)
    shares[merged] = weights[merged] / largest[into[merged]]
    shares = F.interpolate(shares.view(1, 1, *old), new, mode="bilinear", align_corners=False).flatten()
    patches = len(shares)
    keep = max(round(stage.merged_patches * patches / len(into)), 1)
    prune = min(round(stage.pruned_patches * patches / len(into)), patches - keep)
    kept, pruned = _ends(shares, keep, prune)
    sums = torch.zeros_like(largest).index_add(0, into[merged], torch.tensor(stage.weights).double()[merged])
    averaged = merged.sum() > stage.merged_patches and bool(((sums - 1).abs() < 1e-4).all())
    row_weights = "average" if averaged else "sum"
    return plan_stage(stage.first, stage.last, shares, kept, pruned, new, row_weights, segments)
