"""Prune and Merge: static merge and reconstruct matrices around each stage of blocks."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from timm.models import checkpoint
from torch import Tensor, nn

from pm_kernels import token_mix, transition
from pm_kernels.runtime import autocast_dtype

from ..compression import Compression
from .blocks import attend, attends_apart, comes_apart, feed, opening_norm, run_block
from .folding import READOUTS, DenseFold, Fold, Folded, FrozenFold
from .matrices import StageMatrices
from .rotary import RotaryPositions

EXECUTIONS = ("folded", "literal")
Maps = dict[int, Tensor | None]


class Run(NamedTuple):
    """Consecutive blocks ``first`` to ``last`` on as many ``tokens``: a stage's, or all if ``stage`` is None."""

    first: int
    last: int
    stage: str | None
    tokens: int


class StaticReduction(nn.Module):
    """Prune and Merge (arXiv 2503.23455, section 3): ``y = M x``, the stage's blocks, ``x = R y + (1 - mask) x``.

    The matrices of each stage are a submodule named by its first block.

    Args:
        compression: the plan and its options.
        rope: the model's rotary embedding, or ``None``.
        rope_mixed: whether it has a table for each block.
    """

    def __init__(self, compression: Compression, rope: nn.Module | None = None, rope_mixed: bool = False) -> None:
        super().__init__()
        plan = compression.plan
        self._compression = compression
        self.execution = "folded"
        for stage in plan.stages:
            matrices = StageMatrices(plan, stage, compression.train_matrices, compression.shortcut)
            self.add_module(str(stage.first), matrices)
        # Where blocks rotate queries and keys, merged tokens need positions.
        self.positions = None if rope is None else RotaryPositions(rope, plan, rope_mixed)
        self.cut(plan.depth)

    def __getitem__(self, first: str) -> StageMatrices:
        return self._modules[first]

    def values(self) -> Iterator[StageMatrices]:
        """The matrices of every stage, in order."""
        return (self[run.stage] for run in self.runs if run.stage is not None)

    def cut(self, depth: int) -> None:
        """Run only the first ``depth`` blocks; a stage that reaches beyond them ends there."""
        plan = self._compression.plan
        for stage in plan.stages:
            if stage.first >= depth:
                self._modules.pop(str(stage.first), None)
        self.runs = list(_runs(self._compression, depth))
        self.folds = nn.ModuleDict()
        stages = self._stages()
        if any(stages):
            kind = DenseFold if self._compression.train_matrices == "dense" else Fold
            make = partial(kind, stages, plan.num_tokens, plan.num_prefix_tokens)
            readouts = [name for name in READOUTS if name != "prefix" or plan.num_prefix_tokens]
            self.folds.update({readout: make(readout) for readout in readouts} | {"maps": make("all", maps=True)})
            self.folds.to(next(self.values()).rows.device)

    def freeze(self, dtype: torch.dtype) -> None:
        """Make the folds and the matrices constant: they no longer train and are no longer saved."""
        with torch.no_grad():
            for name, fold in self.folds.items():
                self.folds[name] = FrozenFold(fold(self._stages(), dtype))
            for stage in self.values():
                stage.freeze()

    def fold(self, readout: str, dtype: torch.dtype) -> Folded:
        """The folded matrices for ``readout``, or ``"maps"``, in ``dtype``."""
        return self.folds[readout](self._stages(), dtype)

    def forward(
        self,
        blocks: nn.Module,
        x: Tensor,
        readout: str = "all",
        rope: Tensor | None = None,
        *,
        grid: tuple[int, int] | None = None,
        maps: Maps | None = None,
        checkpointing: bool = False,
    ) -> Tensor:
        """Run the blocks on x (B, N, D), and return the rows of ``readout``.

        Args:
            blocks: the model's.
            x: (B, N, D).
            readout: the rows that are needed: ``"all"`` N tokens, ``"prefix"``, or ``"patch_mean"``. All rows are
                returned where they exist anyway.
            rope: a rotary table for the patches.
            grid: the patches' grid, which is the plan's.
            maps: filled in with the full map after each block that is a key. The run ends after the last of them and
                returns its map.
            checkpointing: recompute activations between blocks in backward.

        Raises:
            ValueError: x does not have as many tokens as the plan.
        """
        plan = self._compression.plan
        if x.shape[1] != plan.num_tokens:
            raise ValueError(
                f"the images give {x.shape[1]} tokens, but the plan was made for a grid of {plan.grid} and "
                f"{plan.num_prefix_tokens} prefix tokens: {plan.num_tokens} tokens"
            )
        positions: list[dict[str, Tensor]] = [{}] * len(blocks)
        if rope is not None:
            runs = [(run.first, run.last, run.stage is not None) for run in self.runs]
            positions = [{"rope": table} for table in self.positions(rope, runs)]
        call = checkpoint if checkpointing and torch.is_grad_enabled() else None
        if self.execution == "literal" or self._compression.merge_site == "attention" or len(self.folds) == 0:
            return self._run_literal(blocks, x, positions, maps or {}, call)
        return self._run_folded(blocks, x, readout, positions, maps or {}, call)

    def _stages(self) -> list[StageMatrices | None]:
        return [None if run.stage is None else self._modules[run.stage] for run in self.runs]

    def _run_literal(
        self, blocks: nn.Module, x: Tensor, positions: list[dict], maps: Maps, call: Callable | None
    ) -> Tensor:
        """The paper's equations one by one, always with all N tokens between stages.

        With ``shortcut="all"``, ``x - R M x`` is added to tokens that share a merged token. With
        ``merge_site="attention"``, the first block of a stage takes x itself and merges in its attention.
        """
        for run, stage in zip(self.runs, self._stages(), strict=True):
            merge = None if stage is None else stage.matrices()[0]
            inside = merge is not None and self._compression.merge_site == "attention"
            y = merged = x if merge is None or inside else token_mix(x, merge)
            if inside:
                merged = token_mix(x, merge)
            for index in range(run.first, run.last + 1):
                block = blocks[index]
                step = partial(_run_merging, block, merged=merged, merge=merge) if inside and y is x else block
                step = partial(step, **positions[index])
                y = step(y) if call is None else call(step, y)
                if index in maps or index == run.last:
                    full = y if stage is None else stage.full_map(y, merged, x)
                    if index in maps:
                        maps[index] = full
                        if index == max(maps):
                            return full
            x = full
        return x

    def _run_folded(
        self,
        blocks: nn.Module,
        x: Tensor,
        readout: str,
        positions: list[dict],
        maps: Maps,
        call: Callable | None,
    ) -> Tensor:
        """The same by folded transitions: only the small state exists between stages, see :mod:`.folding`.

        The state consists of three tensors; the next transition mixes ``[x + update; carried]``.
        """
        plan = self._compression.plan
        folded = self.fold("maps" if maps else readout, autocast_dtype(x) or x.dtype)
        # If only the prefix rows are read, the last block computes no others. This holds for matrices on the plan's
        # support, where a prefix token depends on its own row alone; with dense matrices it depends on all rows.
        reads_prefix = readout == "prefix" and not maps and self._compression.train_matrices != "dense"
        update = carried = None
        for index, (run, matrix) in enumerate(zip(self.runs, folded.transitions, strict=True)):
            for number in range(run.first, run.last + 1):
                block = blocks[number]
                step = partial(
                    _step,
                    block,
                    matrix=matrix if number == run.first else None,
                    tokens=run.tokens,
                    rows=plan.num_prefix_tokens
                    if reads_prefix and number == len(blocks) - 1 and attends_apart(block)
                    else None,
                    # Checkpointing keeps a step's inputs: one tensor takes less memory than two.
                    apart=number == run.last and number not in maps and call is None,
                    positions=positions[number],
                )
                x, update, carried = (step if call is None else partial(call, step))(x, update, carried)
                if number in maps:
                    frame = folded.frames[index]
                    maps[number] = x if frame is None else transition(x, carried, frame, plan.num_tokens)[0]
                    if number == max(maps):
                        return maps[number]
        if folded.readout is None:
            return x if update is None else x + update
        if reads_prefix:
            x, carried = x[:, : plan.num_prefix_tokens], None
            update = None if update is None else update[:, : plan.num_prefix_tokens]
        return transition(x, carried, folded.readout, update=update)[0]


def _step(
    block: nn.Module,
    x: Tensor,
    update: Tensor | None,
    carried: Tensor | None,
    *,
    matrix: object,
    tokens: int,
    rows: int | None,
    apart: bool,
    positions: dict[str, Tensor],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run a block, with the transition before it if there is one, from state to state.

    ``rows``: compute only that many; ``apart``: return the terms of the last sum separately.
    """
    normed = None
    if matrix is not None:
        x, carried, normed = transition(x, carried, matrix, tokens, update=update, norm=opening_norm(block))
    if normed is None and rows is None and not apart:
        return block(x, **positions), None, carried
    x, update = run_block(block, x, normed, rows, **positions)
    if update is not None and not apart:
        x, update = x + update, None
    return x, update, carried


def _run_merging(block: nn.Module, x: Tensor, *, merged: Tensor, merge: Tensor) -> Tensor:
    """A block that merges inside its attention: x (B, N, D), ``merged`` (B, C, D) and merge (C, N) to (B, C, D).

    The first norm and the projection to queries, keys and values run on all N tokens, the rest on the C merged ones.
    """
    if not comes_apart(block):
        raise ValueError(
            "merge_site='attention' runs a stage's first block in parts, which would bypass the hook or forward that "
            "was put on the block itself; put it on a part of the block, or merge before it (merge_site='block')"
        )
    y = merged + attend(block, block.norm1(x), merge=merge)
    return y + feed(block, y)


def _runs(compression: Compression, depth: int) -> Iterator[Run]:
    """The stages and the uncompressed blocks between them, up to ``depth``."""
    block, plan = 0, compression.plan
    while block < depth:
        stage = plan.stage_of(block)
        if stage is None:
            later = [other.first for other in plan.stages if other.first > block]
            last = min([depth, *later]) - 1
            yield Run(block, last, None, plan.num_tokens)
        else:
            last = min(stage.last, depth - 1)
            yield Run(block, last, str(stage.first), plan.num_prefix_tokens + stage.merged_patches)
        block = last + 1
