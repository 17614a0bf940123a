"""The merge and reconstruct matrices of a stage, in the form that is stored and trained."""

import torch
from torch import Tensor, nn

from pm_kernels import token_mix

from ..plan import CompressionPlan, StagePlan


class StageMatrices(nn.Module):
    """Merge matrix (C, N) and reconstruct matrix (N, C) of one stage.

    Args:
        plan: the plan that the stage belongs to.
        stage: the stage.
        train_matrices: ``"support"`` trains the nonzeros of the plan's matrices; ``"dense"`` trains every entry;
            ``None`` keeps the plan's values.
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
        # 1 for tokens that share a merged token: what the merge leaves out of them skips the stage's blocks.
        shared = torch.zeros_like(mask)
        if self.keeps_rest:
            shared[columns[rows.bincount()[rows] > 1]] = 1
        # The nonzeros' places, sorted by row: merge[i] is at (rows[i], columns[i]), reconstruct[i] at the transpose.
        for name, tensor in (("rows", rows), ("columns", columns), ("pruned_mask", 1 - mask), ("shared_mask", shared)):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self) -> tuple[Tensor, Tensor]:
        """The stored values of both matrices: the nonzeros (entries,), or if dense all of (C, N) and (N, C).

        A forward of its own, so that hooks that make, move or change a module's parameters act before it.
        """
        return self.merge, self.reconstruct

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Merge matrix (C, N) and reconstruct matrix (N, C), differentiable in the trained values."""
        merge, reconstruct = self()
        if self.dense:
            return merge, reconstruct
        merge = merge.new_zeros(self.shape).index_put((self.rows, self.columns), merge)
        return merge, reconstruct.new_zeros(self.shape[::-1]).index_put((self.columns, self.rows), reconstruct)

    def freeze(self) -> None:
        """Keep both matrices as dense constants, which are no longer saved."""
        matrices = [matrix.detach() for matrix in self.matrices()]
        for name, matrix in zip(("merge", "reconstruct"), matrices, strict=True):
            delattr(self, name)
            self.register_buffer(name, matrix, persistent=False)
        self.dense = True

    def full_map(self, y: Tensor, merged: Tensor | None, x: Tensor) -> Tensor:
        """The full map (B, N, D) after the stage: ``R y`` and what skips its blocks.

        Args:
            y: (B, C, D), the blocks' output.
            merged: (B, C, D), ``M x``; not used where only pruned tokens skip the blocks.
            x: (B, N, D), the map before the stage.
        """
        _, reconstruct = self.matrices()
        full = token_mix(y, reconstruct) + self.pruned_mask.unsqueeze(1).to(x.dtype) * x
        if self.keeps_rest:
            full = full + self.shared_mask.unsqueeze(1).to(x.dtype) * (x - token_mix(merged, reconstruct))
        return full
