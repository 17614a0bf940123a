"""The static matrices of a compressed model, and their folding into one small transition per block boundary.

The full token map between two stages is ``x = F z``: a static frame ``F`` times a small state ``z = [y ; p]``, the C
rows that the stage's blocks computed and the rows of the tokens that it pruned. A stage's merge matrix M and the
selection E of its pruned tokens act on ``F z``, so that ``T = [M ; E^T] F`` takes one state to the next and the map
itself is never needed. Everything here is matrices; no image is touched.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .plan import CompressionPlan, StagePlan

TRAIN_MATRICES = ("support", "dense", None)
READOUTS = ("all", "prefix", "patch_mean")


class StageMatrices(nn.Module):
    """Merge matrix (C, N) and reconstruct matrix (N, C) of one stage, as they are stored and trained.

    Args:
        plan: the plan that the stage belongs to.
        stage: the stage.
        train_matrices: ``"support"`` trains one value per nonzero of the plan's matrices; ``"dense"`` trains every
            entry; ``None`` keeps the plan's values.
    """

    def __init__(self, plan: CompressionPlan, stage: StagePlan, train_matrices: str | None) -> None:
        super().__init__()
        rows, columns, values = plan.support(stage)
        mask = plan.token_mask(stage.first)
        self.shape = (plan.tokens[stage.first], plan.num_tokens)
        self.dense = train_matrices == "dense"
        merge, reconstruct = plan.merge_matrix(stage.first), plan.reconstruct_matrix(stage.first)
        if not self.dense:
            merge, reconstruct = values, reconstruct[columns, rows]
        if train_matrices is None:
            self.register_buffer("merge", merge)
            self.register_buffer("reconstruct", reconstruct)
        else:
            self.merge = nn.Parameter(merge)
            self.reconstruct = nn.Parameter(reconstruct)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("pruned_mask", 1 - mask, persistent=False)
        self.register_buffer("pruned", (mask == 0).nonzero().squeeze(1), persistent=False)
        # Pruned tokens that something later reads when only prefix tokens are wanted; see mark_unread.
        self.register_buffer("read", self.pruned, persistent=False)

    def merge_matrix(self) -> Tensor:
        """(C, N), differentiable in what trains."""
        if self.dense:
            return self.merge
        return self.merge.new_zeros(self.shape).index_put((self.rows, self.columns), self.merge)

    def reconstruct_matrix(self) -> Tensor:
        """(N, C), differentiable in what trains."""
        if self.dense:
            return self.reconstruct
        return self.reconstruct.new_zeros(self.shape[::-1]).index_put((self.columns, self.rows), self.reconstruct)

    def carried(self, readout: str) -> Tensor:
        """The pruned tokens whose rows the state carries past the stage."""
        return self.read if readout == "prefix" else self.pruned


@dataclass(frozen=True)
class Run:
    """Consecutive blocks ``first`` to ``last`` on the same tokens: a stage's, or all where ``matrices`` is None."""

    first: int
    last: int
    matrices: StageMatrices | None


@dataclass(frozen=True)
class Folded:
    """A model's matrices, folded for one readout.

    Args:
        transitions: for each run the matrix that makes its state from the one before, (C + pruned, ...), or ``None``
            where the state stays as it is.
        frames: for each run the matrix (N, C + pruned) that makes the full map from its state, or ``None`` where the
            state is the full map.
        readout: the matrix that makes the rows asked for from the last state, or ``None`` where the state is them.
    """

    transitions: list[Tensor | None]
    frames: list[Tensor | None]
    readout: Tensor | None


def mark_unread(runs: Sequence[Run], num_prefix_tokens: int) -> None:
    """Find, from the last run to the first, which pruned tokens are read by nothing when only prefix tokens are."""
    read = set(range(num_prefix_tokens))
    for run in reversed(runs):
        matrices = run.matrices
        if matrices is None or matrices.dense:
            read_before = None  # everything
        else:
            read_before = set(matrices.columns.tolist())
        if matrices is not None:
            pruned = set(matrices.pruned.tolist())
            kept = pruned if read is None else pruned & read
            matrices.read = torch.tensor(sorted(kept), dtype=torch.long, device=matrices.pruned.device)
            if read_before is not None:
                read_before |= kept
        read = read_before


def fold(runs: Sequence[Run], num_tokens: int, num_prefix_tokens: int, readout: str) -> Folded:
    """Fold the matrices of ``runs`` into transitions, in float32 at least, differentiably.

    Args:
        runs: the model's runs, covering its blocks in order.
        num_tokens: N.
        num_prefix_tokens: P.
        readout: the rows wanted after the last run: ``"all"`` N, ``"prefix"`` the first P, or ``"patch_mean"``: the
            first P and, as one more row, the mean of the patches.
    """
    like = next(run.matrices.merge for run in runs if run.matrices is not None)
    dtype = torch.promote_types(like.dtype, torch.float32)
    identity = torch.eye(num_tokens, dtype=dtype, device=like.device)
    frame, transitions, frames = None, [], []
    # A product of matrices in autocast's dtype would round what is computed once and used for every image.
    with torch.autocast(like.device.type, enabled=False):
        for run in runs:
            if run.matrices is None:
                transitions.append(frame)
                frame = None
            else:
                merge = run.matrices.merge_matrix().to(dtype)
                reconstruct = run.matrices.reconstruct_matrix().to(dtype)
                carried = run.matrices.carried(readout)
                select = identity.index_select(0, carried)
                if frame is None:
                    transitions.append(torch.cat([merge, select]))
                else:
                    transitions.append(torch.cat([merge @ frame, frame.index_select(0, carried)]))
                frame = torch.cat([reconstruct, select.T], dim=1)
            frames.append(frame)
        wanted = _readout_rows(identity, num_prefix_tokens, readout)
        if wanted is None:
            final = frame
        else:
            final = wanted if frame is None else wanted @ frame
    return Folded(transitions, frames, final)


def _readout_rows(identity: Tensor, num_prefix_tokens: int, readout: str) -> Tensor | None:
    """The rows wanted as a matrix (rows, N) on the full map; ``None`` is all of them."""
    if readout == "all":
        return None
    prefix = identity[:num_prefix_tokens]
    if readout == "prefix":
        return prefix
    return torch.cat([prefix, identity[num_prefix_tokens:].mean(dim=0, keepdim=True)])
