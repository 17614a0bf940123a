"""From token scores to a plan: which patches every stage keeps, merges and prunes."""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from .files import write_atomically
from .stages import StagePlan, kept_and_pruned, plan_stage, resize_stage

_MOST = 10_000  # blocks, and prefix tokens
_VERSION = 1
P = TypeVar("P", bound="Plan")


@dataclass(frozen=True)
class Plan(ABC):
    """Base class of the plans: an immutable value for one grid, depth and number of prefix tokens, saved as JSON."""

    kind: ClassVar[str]  # what its files call it
    grid: tuple[int, int]
    depth: int
    num_prefix_tokens: int

    @property
    def num_patches(self) -> int:
        """The number of patches of the grid."""
        return self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        """N, the number of prefix tokens and patches."""
        return self.num_prefix_tokens + self.num_patches

    def check_sizes(self) -> None:
        """Make the grid a tuple, and check the sizes.

        Raises:
            ValueError: the grid, the depth or the number of prefix tokens is out of range.
        """
        object.__setattr__(self, "grid", _checked_grid(self.grid))
        if not 1 <= self.depth <= _MOST:
            raise ValueError(f"depth must be between 1 and {_MOST}, got {self.depth}")
        if not 0 <= self.num_prefix_tokens <= _MOST:
            raise ValueError(f"num_prefix_tokens must be between 0 and {_MOST}, got {self.num_prefix_tokens}")

    @property
    @abstractmethod
    def tokens(self) -> tuple[int, ...]:
        """Tokens that each block runs on, prefix tokens included."""

    @abstractmethod
    def _fields(self) -> dict:
        """The entries of :meth:`to_dict` that are particular to this kind of plan."""

    @staticmethod
    @abstractmethod
    def _arguments(values: dict) -> dict:
        """The constructor arguments that :meth:`_fields` wrote."""

    def to_dict(self) -> dict:
        """The plan as plain JSON values, for :meth:`from_dict`."""
        return {
            "format": f"pm-vit {self.kind} plan",
            "version": _VERSION,
            "grid": list(self.grid),
            "depth": self.depth,
            "num_prefix_tokens": self.num_prefix_tokens,
            **self._fields(),
        }

    @classmethod
    def from_dict(cls: type[P], values: dict) -> P:
        """Rebuild a plan from the values of :meth:`to_dict`.

        Raises:
            ValueError: the values do not describe a plan of this kind and version; the message names the field.
        """
        if not cls.describes(values):
            article = "an" if cls.kind[0] in "aeiou" else "a"
            raise ValueError(f"not {article} {cls.kind} plan: 'format' must be 'pm-vit {cls.kind} plan'")
        if values.get("version") != _VERSION:
            raise ValueError(f"plan version must be {_VERSION}, got {values.get('version')!r}")
        try:
            return cls(
                grid=_checked_grid([as_integer(size) for size in values["grid"]]),
                depth=as_integer(values["depth"]),
                num_prefix_tokens=as_integer(values["num_prefix_tokens"]),
                **cls._arguments(values),
            )
        except KeyError as error:
            raise ValueError(f"a plan needs the field {error}") from error
        except (AttributeError, TypeError, OverflowError) as error:
            raise ValueError(f"a field of the plan has the wrong type: {error}") from error

    @classmethod
    def describes(cls, values: object) -> bool:
        """Whether JSON values describe a plan of this kind."""
        return isinstance(values, dict) and values.get("format") == f"pm-vit {cls.kind} plan"

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan as JSON; the file is replaced as a whole or not at all."""
        write_atomically(path, json.dumps(self.to_dict()).encode())

    @classmethod
    def load(cls: type[P], path: str | os.PathLike) -> P:
        """Read a plan that :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file does not hold a plan of this kind and version; the message names the file and field.
        """
        with reading_plan(path) as values:
            return cls.from_dict(values)


@contextmanager
def reading_plan(path: str | os.PathLike) -> Iterator[Any]:
    """The JSON values in a plan's file; errors raised while they are read name the file."""
    try:
        yield json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


@dataclass(frozen=True)
class CompressionPlan(Plan):
    """Which patches each stage of a Vision Transformer keeps, merges and prunes: a value, saved as JSON.

    Blocks that belong to no stage run on all tokens.

    Args:
        grid: patches as (rows, columns).
        depth: blocks of the model.
        num_prefix_tokens: tokens before the patches (class, distillation, registers); never merged or pruned.
        stages: in order, not overlapping.

    Raises:
        ValueError: a field is out of range, or the stages do not fit the grid, the depth or each other.
    """

    kind = "compression"
    stages: tuple[StagePlan, ...]

    def __post_init__(self) -> None:
        self.check_sizes()
        _check_stage_bounds([(stage.first, stage.last) for stage in self.stages], self.depth)
        for stage in self.stages:
            if len(stage.segments) != self.num_patches:
                raise ValueError(
                    f"stage {stage.first}..{stage.last} has {len(stage.segments)} segments, expected one for each of "
                    f"the {self.num_patches} patches of the {self.grid[0]} x {self.grid[1]} grid"
                )

    @classmethod
    def from_scores(
        cls,
        scores: Tensor,
        grid: tuple[int, int],
        keep_rate: float,
        prune_rate: float,
        layer_decay: float = 0.025,
        num_prefix_tokens: int = 1,
        *,
        allocation: str = "global",
        row_weights: str = "sum",
        segments: str = "raster",
        stages: Sequence[tuple[int, int]] | None = None,
    ) -> "CompressionPlan":
        """Threshold scores into a plan (arXiv 2503.23455, section 3; segments as in the authors' code).

        The rates are met even where scores tie: the earlier layer wins, and within a layer the earlier patch. A layer
        that would otherwise keep nothing keeps its best patch.

        Args:
            scores: (L, h*w), nonnegative, one row per block, as :func:`pm_models.score_tokens` returns them.
            grid: (h, w) patches.
            keep_rate: fraction of all patches, from the highest score down, that stay tokens of their own.
            prune_rate: fraction of all patches, from the lowest score up, that skip the block.
                What is neither kept nor pruned is merged into a kept neighbour.
            layer_decay: the normalised scores of block ``l`` are multiplied by ``1 - layer_decay * l``.
            num_prefix_tokens: tokens before the patches.
            allocation: ``"global"``: the rates hold over all stages together, so each stage gets its own number of
                tokens; ``"layer"``: they hold in every stage.
            row_weights: ``"sum"``: a merged token is the sum of its patches, each weighted by its score over the
                kept patch's (the authors' choice); ``"average"``: the same weights scaled to sum 1.
            segments: the kept patch that a merged patch goes into: ``"raster"``: the nearer one along its row (the
                authors' choice); ``"nearest"``: the nearest in the grid, and of several the first in raster order.
            stages: (first, last) block of each stage, inclusive; a stage uses the scores of its first block.
                ``None`` makes every block a stage of its own.

        Raises:
            ValueError: an argument is out of range, or scores are not (L, h*w), finite and nonnegative.
        """
        grid = _checked_grid(grid)
        scores = _checked_scores(scores, grid)
        _check_choice("allocation", allocation, ("global", "layer"))
        _check_choice("row_weights", row_weights, ("sum", "average"))
        _check_choice("segments", segments, ("raster", "nearest"))
        if not 0 < keep_rate <= 1:
            raise ValueError(f"keep_rate must be above 0 and at most 1, got {keep_rate}")
        if not 0 <= prune_rate < 1:
            raise ValueError(f"prune_rate must be at least 0 and below 1, got {prune_rate}")
        if keep_rate + prune_rate > 1 + 1e-9:
            raise ValueError(
                f"keep_rate + prune_rate must be at most 1, got {keep_rate} + {prune_rate} = {keep_rate + prune_rate:g}"
            )
        depth = scores.shape[0]
        if not 0 <= layer_decay * (depth - 1) < 1:
            raise ValueError(
                f"layer_decay must be at least 0 and below 1 / (L - 1) = {1 / max(depth - 1, 1):g} for {depth} layers, "
                f"got {layer_decay}"
            )
        bounds = (
            [(block, block) for block in range(depth)] if stages is None else [(first, last) for first, last in stages]
        )
        if not bounds:
            raise ValueError("stages must name at least one (first, last) pair of blocks, got none")
        _check_stage_bounds(bounds, depth)
        first_blocks = torch.tensor([first for first, _ in bounds], dtype=torch.long)
        scores = scores[first_blocks]
        scores = scores / scores.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        scores = scores * (1 - layer_decay * first_blocks[:, None])
        groups = [scores] if allocation == "global" else scores.split(1)
        kept, pruned = map(
            torch.cat, zip(*(kept_and_pruned(group, keep_rate, prune_rate) for group in groups), strict=True)
        )
        return cls(
            grid=grid,
            depth=depth,
            num_prefix_tokens=num_prefix_tokens,
            stages=tuple(
                plan_stage(*bound, layer, keeps, prunes, grid, row_weights, segments)
                for bound, layer, keeps, prunes in zip(bounds, scores, kept, pruned, strict=True)
            ),
        )

    def resize(self, grid: tuple[int, int], *, segments: str = "raster") -> "CompressionPlan":
        """The plan for another grid over the same images, with the same shares of patches kept, merged and pruned.

        In each stage every patch's weight is divided by the largest weight in its token and interpolated to the new
        grid. The highest are kept and the lowest pruned; of equal weights the earlier patch's counts as the higher.

        Args:
            grid: (h, w) patches.
            segments: as in :meth:`from_scores`.

        Raises:
            ValueError: an argument is out of range.
        """
        grid = _checked_grid(grid)
        _check_choice("segments", segments, ("raster", "nearest"))
        if grid == self.grid:
            return self
        return CompressionPlan(
            grid=grid,
            depth=self.depth,
            num_prefix_tokens=self.num_prefix_tokens,
            stages=tuple(resize_stage(stage, self.grid, grid, segments) for stage in self.stages),
        )

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens that each block runs on, prefix tokens included."""
        tokens = [self.num_tokens] * self.depth
        for stage in self.stages:
            for block in range(stage.first, stage.last + 1):
                tokens[block] = self.num_prefix_tokens + stage.merged_patches
        return tuple(tokens)

    def stage_of(self, block: int) -> StagePlan | None:
        """The stage that ``block`` belongs to, or ``None`` where it runs on all tokens.

        Raises:
            IndexError: there is no such block.
        """
        if not 0 <= block < self.depth:
            raise IndexError(f"block must be between 0 and {self.depth - 1}, got {block}")
        return next((stage for stage in self.stages if stage.first <= block <= stage.last), None)

    def merge_matrix(self, block: int) -> Tensor:
        """(C, N) float32, maps all tokens to the block's tokens; the identity for a block that belongs to no stage."""
        stage = self.stage_of(block)
        if stage is None:
            return torch.eye(self.num_tokens)
        rows, columns, weights = self.support(stage)
        return torch.zeros(self.tokens[block], self.num_tokens).index_put((rows, columns), weights)

    def reconstruct_matrix(self, block: int) -> Tensor:
        """(N, C) float32, the Moore-Penrose pseudoinverse of the block's merge matrix."""
        merge = self.merge_matrix(block)
        # The rows have disjoint supports, so M M^T is diagonal and no SVD is needed.
        return (merge / merge.square().sum(dim=1, keepdim=True)).T.contiguous()

    def token_mask(self, block: int) -> Tensor:
        """(N,) float32: 1 for tokens that are kept or merged, 0 for pruned ones."""
        mask = torch.ones(self.num_tokens)
        stage = self.stage_of(block)
        if stage is not None:
            mask[self.num_prefix_tokens :] = (torch.tensor(stage.segments) >= 0).float()
        return mask

    def token_sizes(self, block: int) -> Tensor:
        """(C,) float32: how many of the N tokens each of the block's tokens stands for."""
        return (self.merge_matrix(block) != 0).sum(dim=1).float()

    def support(self, stage: StagePlan) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, columns and values (each (N - pruned,)) of the nonzeros of the stage's merge matrix, sorted by row."""
        prefix = self.num_prefix_tokens
        segments = torch.tensor(stage.segments)
        patches = (segments >= 0).nonzero().squeeze(1)
        rows = torch.cat([torch.arange(prefix), segments[patches] + prefix])
        columns = torch.cat([torch.arange(prefix), patches + prefix])
        values = torch.cat([torch.ones(prefix), torch.tensor(stage.weights, dtype=torch.float32)[patches]])
        order = rows.argsort(stable=True)
        return rows[order], columns[order], values[order]

    def _fields(self) -> dict:
        stages = [vars(stage) for stage in self.stages]
        return {"stages": [stage | {name: list(stage[name]) for name in ("segments", "weights")} for stage in stages]}

    @staticmethod
    def _arguments(values: dict) -> dict:
        return {
            "stages": tuple(
                StagePlan(
                    first=as_integer(stage["first"]),
                    last=as_integer(stage["last"]),
                    segments=tuple(as_integer(segment) for segment in stage["segments"]),
                    weights=tuple(float(weight) for weight in stage["weights"]),
                )
                for stage in values["stages"]
            )
        }

    def __repr__(self) -> str:
        rows, columns = self.grid
        lines = [
            f"CompressionPlan: {rows} x {columns} patches, {self.num_prefix_tokens} prefix tokens, "
            f"{self.depth} blocks; {sum(self.tokens)} of {self.depth * self.num_tokens} tokens",
            "  blocks   tokens    kept  merged  pruned",
        ]
        block = 0
        while block < self.depth:
            stage = self.stage_of(block)
            last = block if stage is None else stage.last
            kept = self.num_patches if stage is None else stage.merged_patches
            pruned = 0 if stage is None else stage.pruned_patches
            name = str(block) if last == block else f"{block}..{last}"
            merged = self.num_patches - kept - pruned
            lines.append(f"  {name:<6} {self.tokens[block]:>8} {kept:>7} {merged:>7} {pruned:>7}")
            block = last + 1
        return "\n".join(lines)


def _checked_scores(scores: Tensor, grid: tuple[int, int]) -> Tensor:
    """The scores in float64 on the CPU; a ValueError unless they are (L, h*w), finite and nonnegative."""
    patches = grid[0] * grid[1]
    scores = torch.as_tensor(scores).detach().to("cpu", torch.float64)
    if scores.dim() != 2 or scores.shape[0] == 0 or scores.shape[1] != patches:
        raise ValueError(
            f"scores must have shape (L, h*w) with h*w = {patches} for grid {grid}, got {tuple(scores.shape)}"
        )
    if not torch.isfinite(scores).all() or (scores < 0).any():
        layer = int((~(scores >= 0) | scores.isinf()).any(dim=1).nonzero()[0])
        raise ValueError(f"scores must be finite and nonnegative, got NaN, infinite or negative in layer {layer}")
    return scores


def _checked_grid(grid: Sequence[int]) -> tuple[int, int]:
    if not isinstance(grid, Sequence) or len(grid) != 2 or not all(isinstance(side, int) and side > 0 for side in grid):
        raise ValueError(f"grid must be two positive integers (rows, columns), got {grid!r}")
    return grid[0], grid[1]


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_stage_bounds(bounds: Sequence[tuple[int, int]], depth: int) -> None:
    previous = -1
    for first, last in bounds:
        if not previous < first <= last < depth:
            raise ValueError(
                f"stages must be (first, last) blocks in order, without overlap, within 0..{depth - 1}, "
                f"got {[tuple(stage) for stage in bounds]}"
            )
        previous = last


def as_integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected an integer, got {value!r}")
    return value
