"""The merge and reconstruct matrices of a stage, as they are stored and trained."""

import torch
from torch import Tensor, nn

from pm_kernels import token_mix

from ..plan import CompressionPlan, StagePlan


class StageMatrices(nn.Module):
    """Merge matrix (C, N) and reconstruct matrix (N, C) of one stage.

    Args:
        plan: the plan that the stage belongs to.
        stage: the stage.
        train_matrices: ``"support"`` trains one number for each nonzero of the plan's matrices; ``"dense"`` trains
            every entry; ``None`` keeps the plan's numbers.
        shortcut: ``"pruned"`` or ``"all"``, see :func:`pm_models.compress`.
    """

    def __init__(self, plan: CompressionPlan, stage: StagePlan, train_matrices: str | None, shortcut: str) -> None:
        super().__init__()
        rows, columns, values = plan.support(stage)
        mask = plan.token_mask(stage.first)
        self.shape = (plan.tokens[stage.first], plan.num_tokens)
        self.dense = train_matrices == "dense"
        self.keeps_rest = shortcut == "all"
        if self.dense:
            merge, reconstruct = plan.merge_matrix(stage.first), plan.reconstruct_matrix(stage.first)
        else:
            energy = torch.zeros(self.shape[0]).index_add(0, rows, values.square())
            merge, reconstruct = values, values / energy[rows]
        for name, matrix in (("merge", merge), ("reconstruct", reconstruct)):
            if train_matrices is None:
                self.register_buffer(name, matrix)
            else:
                self.register_parameter(name, nn.Parameter(matrix))
        # 1 for tokens of which the merge leaves something out that skips the stage's blocks.
        shared = torch.zeros_like(mask)
        if self.keeps_rest:
            shared[columns[rows.bincount()[rows] > 1]] = 1
        # Where the nonzeros are, sorted by row; merge[i] stands at (rows[i], columns[i]), reconstruct[i] transposed.
        for name, tensor in (("rows", rows), ("columns", columns), ("pruned_mask", 1 - mask), ("shared_mask", shared)):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self) -> tuple[Tensor, Tensor]:
        """What is stored of both: the nonzeros (entries,), or with dense matrices all of (C, N) and (N, C).

        Whatever makes, moves or changes a module's parameters before its forward does so here.
        """
        return self.merge, self.reconstruct

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Merge matrix (C, N) and reconstruct matrix (N, C), differentiable in what trains."""
        merge, reconstruct = self()
        if self.dense:
            return merge, reconstruct
        merge = merge.new_zeros(self.shape).index_put((self.rows, self.columns), merge)
        return merge, reconstruct.new_zeros(self.shape[::-1]).index_put((self.columns, self.rows), reconstruct)

    def freeze(self) -> None:
        """Keep both as constants with all their entries, which are no longer saved."""
        matrices = [matrix.detach() for matrix in self.matrices()]
        for name, matrix in zip(("merge", "reconstruct"), matrices, strict=True):
            delattr(self, name)
            self.register_buffer(name, matrix, persistent=False)
        self.dense = True

    def full_map(self, y: Tensor, merged: Tensor | None, x: Tensor) -> Tensor:
        """The map (B, N, D) after the stage: ``R y``, and what skips its blocks.

        Args:
            y: (B, C, D), what the blocks computed.
            merged: (B, C, D), ``M x``; not read where pruned tokens alone skip the blocks.
            x: (B, N, D), the map before the stage.
        """
        _, reconstruct = self.matrices()
        full = token_mix(y, reconstruct) + self.pruned_mask.unsqueeze(1).to(x.dtype) * x
        if self.keeps_rest:
            full = full + self.shared_mask.unsqueeze(1).to(x.dtype) * (x - token_mix(merged, reconstruct))
        return full
