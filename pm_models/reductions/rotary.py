"""Rotary positions of merged tokens: a merged token's position is the mean of its members' positions.

A rotary table holds sines and cosines of angles that are linear in a patch's place in the grid. The slopes are read off
the table, so no details of the embedding have to be known.
"""

import copy
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..plan import CompressionPlan, StagePlan

_FINER = 3  # odd, so that centres of patches are centres of finer ones


class MergedPositions(nn.Module):
    """The positions of a stage's merged tokens, each as the nearest patch and the distance from it.

    Args:
        plan: the plan that the stage belongs to.
        stage: the stage.
    """

    def __init__(self, plan: CompressionPlan, stage: StagePlan) -> None:
        super().__init__()
        prefix, (height, width) = plan.num_prefix_tokens, plan.grid
        rows, columns, values = (part[prefix:] for part in plan.support(stage))  # a prefix token has no position
        rows, columns, weights = rows - prefix, columns - prefix, values.abs().unsqueeze(1)
        places = torch.stack([columns // width, columns % width], dim=1).float()
        sums = torch.zeros(int(rows.max()) + 1, 2).index_add(0, rows, weights * places)
        total = torch.zeros(len(sums), 1).index_add(0, rows, weights)
        mean = sums / total
        nearest = mean.round().clamp(max=torch.tensor([height - 1.0, width - 1.0]))
        self.register_buffer("patches", (nearest @ torch.tensor([float(width), 1.0])).long(), persistent=False)
        self.register_buffer("distances", mean - nearest, persistent=False)

    def forward(self, angles: Tensor, slopes: Tensor) -> Tensor:
        """Angles (..., patches, d) and slopes (..., 2, d) to the angles (..., C, d) of merged patch tokens."""
        return angles.index_select(-2, self.patches) + self.distances.to(slopes.dtype) @ slopes


class Rotary(nn.Module):
    """The slopes of a rotary table's angles over the grid.

    Args:
        rope: timm's embedding.
        grid: (h, w) of the patches.
        mixed: whether it has a table for each block and head.

    Raises:
        ValueError: its angles are not linear in the place in the grid.
    """

    def __init__(self, rope: nn.Module, grid: tuple[int, int], mixed: bool) -> None:
        super().__init__()
        self._grid = grid
        self._mixed = mixed
        with torch.no_grad():
            table = rope.get_embed(shape=list(grid))
            self.register_buffer("turns", _turns(rope, _angles(table), grid), persistent=False)
            if not table.is_meta:
                self._check_linear(table)

    def _slopes(self, angles: Tensor) -> Tensor:
        """The angles' steps from a patch to the next one down and to the right, (..., 2, d)."""
        return _slopes(angles, self.turns, self._grid)

    def _check_linear(self, table: Tensor) -> None:
        angles = _angles(table)
        height, width = self._grid
        places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(angles)
        expected = angles[..., :1, :] + places @ self._slopes(angles)
        furthest = max((expected.sin() - angles.sin()).abs().max(), (expected.cos() - angles.cos()).abs().max()).item()
        if furthest > 0.05:
            raise ValueError(
                f"model has rotary embeddings whose angles are not proportional to the place in the grid {self._grid} "
                f"(their sines differ by up to {furthest:.2g}), so that a merged token has no position"
            )


class RotaryPositions(Rotary):
    """Rotary tables for the merged tokens of each block of a static plan.

    Args:
        rope, mixed: as for :class:`Rotary`.
        plan: the model's plan.
    """

    def __init__(self, rope: nn.Module, plan: CompressionPlan, mixed: bool) -> None:
        super().__init__(rope, plan.grid, mixed)
        self._stages = nn.ModuleDict({str(stage.first): MergedPositions(plan, stage) for stage in plan.stages})

    def forward(self, table: Tensor, runs: Iterable[tuple[int, int, bool]]) -> list[Tensor]:
        """Each block's table (tokens, 2 * d), or with heads before, from that of all patches (..., patches, 2 * d).

        ``runs``: first and last of consecutive blocks that run on the same tokens, and whether they are a stage.
        """
        angles = _angles(table)
        slopes = self._slopes(angles)
        tables = []
        for first, last, merges in runs:
            part = slice(first, last + 1) if self._mixed else ...
            found = table[part]
            if merges:
                merged = self._stages[str(first)](angles[part], slopes[part])
                found = torch.cat([merged.sin(), merged.cos()], dim=-1).to(table.dtype)
            tables += found.unbind(0) if self._mixed else [found] * (last - first + 1)
        return tables


class RotaryPlaces(Rotary):
    """Rotary tables for tokens whose positions differ from image to image. Arguments as for :class:`Rotary`."""

    def places(self, grid: tuple[int, int], like: Tensor) -> Tensor:
        """Row and column of each patch of a grid, (h * w, 2), in at least float32."""
        rows, columns = (
            torch.arange(side, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
            for side in grid
        )
        return torch.cartesian_prod(rows, columns)

    def forward(self, table: Tensor, places: Tensor | None, grid: tuple[int, int], block: int) -> Tensor:
        """The block's table (..., patches, 2 * d): as it is, or for places (B, C, 2) as (B, 1 or H, C, 2 * d)."""
        table, turns = (table[block], self.turns[block]) if self._mixed else (table, self.turns)
        if places is None:
            return table
        angles = _angles(table)
        slopes = _slopes(angles, turns, grid)
        merged = angles[..., :1, :] + places.unsqueeze(1).to(slopes.dtype) @ slopes
        return torch.cat([merged.sin(), merged.cos()], dim=-1).to(table.dtype)


def _angles(table: Tensor) -> Tensor:
    """Angles (..., patches, d) between minus and plus half a turn."""
    sine, cosine = table.to(torch.promote_types(table.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.atan2(sine, cosine)


def _slopes(angles: Tensor, turns: Tensor, grid: tuple[int, int]) -> Tensor:
    """The mean steps down and to the right, (..., 2, d), with their whole turns (..., 2, d) added."""
    return torch.stack([step.mean(-2) for step in _steps(angles, grid)], dim=-2) + math.tau * turns


def _steps(angles: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Differences down the first column (..., h - 1, d) and along the first row, between minus and plus half a turn.

    A grid of a single row or column has one difference there, zero.
    """
    angles = angles.unflatten(-2, grid)
    found = []
    for line in (angles[..., 0, :], angles[..., 0, :, :]):
        step = line.diff(dim=-2) if line.shape[-2] > 1 else torch.zeros_like(line)
        found.append(step - math.tau * (step.detach() / math.tau).round())
    return found[0], found[1]


def _turns(rope: nn.Module, angles: Tensor, grid: tuple[int, int]) -> Tensor:
    """The whole turns of a step, which the table does not show, (..., 2, d).

    On a grid of few patches a step may exceed half a turn. A finer grid reveals it: its steps are either as long, or,
    where positions are scaled to the image, shorter by the same factor.
    """
    finer = [_FINER * side for side in grid]
    twin = copy.deepcopy(rope)
    if hasattr(twin, "update_feat_shape"):
        twin.update_feat_shape(finer)
    fine = _steps(_angles(twin.get_embed(shape=finer)), finer)
    found = []
    for shown, short in zip(_steps(angles, grid), fine, strict=True):
        shown, short = shown.mean(-2), short.mean(-2)
        turns = [(candidate - shown) / math.tau for candidate in (short, _FINER * short)]
        whole = [turn.round() for turn in turns]
        as_long = (turns[0] - whole[0]).abs() <= (turns[1] - whole[1]).abs() + 1e-4
        found.append(torch.where(as_long, whole[0], whole[1]))
    return torch.stack(found, dim=-2)
