"""The static matrices of a compressed model, and their folding into one small transition per block boundary.

The full token map between two stages is ``x = F z``: a static frame ``F`` times a small state ``z = [y ; p]``, the C
rows that the stage's blocks computed and the rows of the tokens that it pruned. A stage's merge matrix M and the
selection E of its pruned tokens act on ``F z``, so that ``T = [M ; E^T] F`` takes one state to the next and the map
itself is never needed. Everything here is matrices; no image is touched.

While the matrices keep the plan's support, each token's row of a frame has one nonzero and each column of a merge
matrix has one. A transition then has at most one entry for each token that it reads, a sum of products of two numbers,
and nothing of size N x N appears.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pm_kernels import BlockRows, ByColumn, SparseRows, token_mix

from .plan import CompressionPlan, StagePlan

TRAIN_MATRICES = ("support", "dense", None)
SHORTCUTS = ("pruned", "all")
READOUTS = ("all", "prefix", "patch_mean")
Transition = Tensor | SparseRows | BlockRows


class StageMatrices(nn.Module):
    """Merge matrix (C, N) and reconstruct matrix (N, C) of one stage, as they are stored and trained.

    Args:
        plan: the plan that the stage belongs to.
        stage: the stage.
        train_matrices: ``"support"`` trains one value per nonzero of the plan's matrices; ``"dense"`` trains every
            entry; ``None`` keeps the plan's values.
        shortcut: ``"pruned"`` or ``"all"``, see :func:`pm_models.compress`.
    """

    def __init__(
        self, plan: CompressionPlan, stage: StagePlan, train_matrices: str | None, shortcut: str = "pruned"
    ) -> None:
        super().__init__()
        rows, columns, values = plan.support(stage)
        mask = plan.token_mask(stage.first)
        self.shape = (plan.tokens[stage.first], plan.num_tokens)
        self.dense = train_matrices == "dense"
        if self.dense:
            merge, reconstruct = plan.merge_matrix(stage.first), plan.reconstruct_matrix(stage.first)
        else:
            energy = torch.zeros(self.shape[0]).index_add(0, rows, values.square())
            merge, reconstruct = values, values / energy[rows]
        if train_matrices is None:
            self.register_buffer("merge", merge)
            self.register_buffer("reconstruct", reconstruct)
        else:
            self.merge = nn.Parameter(merge)
            self.reconstruct = nn.Parameter(reconstruct)
        # Where the nonzeros are, sorted by row; merge[i] stands at (rows[i], columns[i]), reconstruct[i] transposed.
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("pruned_mask", 1 - mask, persistent=False)
        # 1 for tokens of which the merge leaves something out that skips the stage's blocks.
        self.keeps_rest = shortcut == "all"
        shared = torch.zeros_like(mask)
        if self.keeps_rest:
            shared[columns[rows.bincount()[rows] > 1]] = 1
        self.register_buffer("shared_mask", shared, persistent=False)

    def merge_matrix(self) -> Tensor:
        """(C, N), differentiable in what trains."""
        if self.dense:
            return self.merge
        return self.merge.new_zeros(self.shape).index_put((self.rows, self.columns), self.merge)

    def support(self) -> Tensor:
        """(C, N), 1 where the merge matrix has an entry, whatever its value."""
        return torch.zeros(self.shape, device=self.rows.device).index_put(
            (self.rows, self.columns), torch.ones(len(self.rows), device=self.rows.device)
        )

    def densify(self) -> None:
        """Keep every entry, so that no matrix is made of its nonzeros when the model runs; they do not train."""
        merge, reconstruct = self.merge_matrix().detach(), self.reconstruct_matrix().detach()
        for name, matrix in (("merge", merge), ("reconstruct", reconstruct)):
            delattr(self, name)
            self.register_buffer(name, matrix)
        self.dense = True

    def full_map(self, y: Tensor, merged: Tensor | None, x: Tensor) -> Tensor:
        """The map (B, N, D) after the stage: ``R y``, and what skips its blocks.

        Args:
            y: (B, C, D), what the blocks computed.
            merged: (B, C, D), ``M x``; not read where pruned tokens alone skip the blocks.
            x: (B, N, D), the map before the stage.
        """
        reconstruct = self.reconstruct_matrix()
        full = token_mix(y, reconstruct) + self.pruned_mask.unsqueeze(1).to(x.dtype) * x
        if self.keeps_rest:
            full = full + self.shared_mask.unsqueeze(1).to(x.dtype) * (x - token_mix(merged, reconstruct))
        return full

    def reconstruct_matrix(self) -> Tensor:
        """(N, C), differentiable in what trains."""
        if self.dense:
            return self.reconstruct
        return self.reconstruct.new_zeros(self.shape[::-1]).index_put((self.columns, self.rows), self.reconstruct)


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
        transitions: for each run the matrix that makes its state from the one before, (C + carried, ...), or ``None``
            where the state stays as it is.
        frames: for each run the matrix (N, C + carried) that makes the full map from its state, or ``None`` where the
            state is the full map; empty where the readout is not all tokens.
        readout: the matrix that makes the rows asked for from the last state, or ``None`` where the state is them.
    """

    transitions: list[Transition | None]
    frames: list[Transition | None]
    readout: Transition | None

    def to(self, dtype: torch.dtype) -> "Folded":
        """The same with matrices of another dtype."""
        return self._each(lambda matrix: matrix.to(dtype))

    def structured(self) -> "Folded":
        """The same by what the matrices hold now: those of few nonzeros by these, those of few blocks by these."""
        return self._each(lambda matrix: _structured(matrix) if isinstance(matrix, Tensor) else matrix)

    def dense(self) -> "Folded":
        """The same with every entry of every matrix."""
        return self._each(_dense)

    def _each(self, change: Callable[[Transition], Transition]) -> "Folded":
        def changed(matrices: list[Transition | None]) -> list[Transition | None]:
            return [None if matrix is None else change(matrix) for matrix in matrices]

        return Folded(changed(self.transitions), changed(self.frames), *changed([self.readout]))


def _structured(matrix: Tensor) -> Transition:
    rows, columns = matrix.shape
    if int(matrix.count_nonzero()) <= 4 * rows:
        return SparseRows.from_dense(matrix)
    blocks = BlockRows.from_dense(matrix)
    every = (len(blocks.starts) - 1) * -(-columns // 32)
    return blocks if 4 * len(blocks.chunks) <= 3 * every else matrix


def _dense(matrix: Transition) -> Tensor:
    if isinstance(matrix, SparseRows):
        return matrix.to_dense(len(matrix.by_column.starts))
    return matrix.matrix if isinstance(matrix, BlockRows) else matrix


class Folding(nn.Module):
    """How a model's matrices fold for one readout: indices, worked out once; :meth:`forward` fills in the values.

    Args:
        runs: the model's runs, covering its blocks in order; at least one is a stage.
        num_tokens: N.
        num_prefix_tokens: P.
        readout: the rows wanted after the last run: ``"all"`` N; ``"prefix"`` the first P; ``"patch_mean"`` the first P
            and, as one more row, the mean of the patches.
    """

    def __init__(self, runs: Sequence[Run], num_tokens: int, num_prefix_tokens: int, readout: str) -> None:
        super().__init__()
        self._runs = runs
        self._num_tokens = num_tokens
        self.dense = any(run.matrices is not None and run.matrices.dense for run in runs)
        self.keeps_rest = any(run.matrices is not None and run.matrices.keeps_rest for run in runs)
        self._carried = [f"carried{index}" for index in range(len(runs))]
        for name, carried in zip(
            self._carried, _carried_tokens(runs, num_tokens, num_prefix_tokens, readout), strict=True
        ):
            self.register_buffer(name, carried, persistent=False)
        rows, columns, sizes = _wanted_rows(num_tokens, num_prefix_tokens, readout)
        self.register_buffer("wanted_rows", rows, persistent=False)
        self.register_buffer("wanted_columns", columns, persistent=False)
        self.register_buffer("wanted_sizes", sizes, persistent=False)
        self._wanted = int(rows[-1]) + 1
        self._all = readout == "all"
        self._prefix = readout == "prefix"
        if self.keeps_rest and not self.dense:
            self._lay_out_products()
        elif not self.dense:
            self._lay_out()

    def forward(self) -> Folded:
        """The folded matrices, in float32 at least, differentiable in what trains."""
        like = next(run.matrices.merge for run in self._runs if run.matrices is not None)
        dtype = torch.promote_types(like.dtype, torch.float32)
        # Products in autocast's dtype would round what is computed once and used for every image.
        with torch.autocast(like.device.type, enabled=False):
            if not (self.dense or self.keeps_rest):
                return self._fold_sparse(like, dtype)
            folded = self._fold_dense(like, dtype)
            return folded if self.dense else self._gather(folded)

    def _fold_dense(self, like: Tensor, dtype: torch.dtype, *, pattern: bool = False) -> Folded:
        """The matrices with all their entries; with ``pattern``, what they are if those of the stages are all 1.

        That is above 0 wherever a value can come to be, where it is 0 now too.
        """
        identity = torch.eye(self._num_tokens, dtype=dtype, device=like.device)
        frame, transitions, frames = None, [], []
        for run, name in zip(self._runs, self._carried, strict=True):
            if run.matrices is None:
                transitions.append(frame)
                frame = None
            else:
                carried = getattr(self, name).to(like.device)
                merge, reconstruct = run.matrices.merge_matrix().to(dtype), run.matrices.reconstruct_matrix().to(dtype)
                if pattern:
                    merge = run.matrices.support().to(dtype)
                    reconstruct = merge.mT
                stage = torch.cat([merge, identity.index_select(0, carried)])
                transitions.append(stage if frame is None else stage @ frame)
                skipping = identity
                if run.matrices.keeps_rest:
                    shared = run.matrices.shared_mask.unsqueeze(1).to(dtype)
                    left_out = shared * (reconstruct @ merge)
                    skipping = identity + left_out if pattern else identity - left_out
                    skipping = skipping * (shared + run.matrices.pruned_mask.unsqueeze(1).to(dtype))
                frame = torch.cat([reconstruct, skipping.index_select(1, carried)], dim=1)
            frames.append(frame)
        if self._all:
            return Folded(transitions, frames, frame)
        wanted = identity.new_zeros(self._wanted, self._num_tokens)
        wanted = wanted.index_put((self.wanted_rows, self.wanted_columns), 1 / self.wanted_sizes.to(dtype))
        readout = wanted if frame is None else wanted @ frame
        if self._prefix and not self.dense:  # it stands in the first rows of every state, and reads no others
            readout = readout[:, : self._wanted]
        return Folded(transitions, [], readout)

    def _lay_out_products(self) -> None:
        """Where the matrices have entries, and how many columns, for :meth:`_gather`."""
        like = next(run.matrices.merge for run in self._runs if run.matrices is not None)
        with torch.no_grad():
            folded = self._fold_dense(torch.zeros(0, device=like.device), torch.float32, pattern=True)
        for name, matrix in _named_matrices(folded):
            if matrix is not None:
                places = matrix.cpu().flatten().nonzero().squeeze(1)
                rows, columns = places // matrix.shape[1], (places % matrix.shape[1]).int()
                starts = torch.searchsorted(rows, torch.arange(len(matrix))).int()
                indices = {"places": places, "starts": starts, "columns": columns}
                by_column = ByColumn.of(starts, columns, matrix.shape[1])._asdict()
                for field, tensor in (
                    indices | {f"by_column_{key}": value for key, value in by_column.items()}
                ).items():
                    self.register_buffer(f"{name}_{field}", tensor, persistent=False)

    def _gather(self, folded: Folded) -> Folded:
        """The same matrices by their entries; a readout of means has no zeros, and stays."""
        found = {}
        for name, matrix in _named_matrices(folded):
            if matrix is not None and (name != "readout" or self._prefix):
                by_column = ByColumn(*(getattr(self, f"{name}_by_column_{field}") for field in ByColumn._fields))
                starts, columns = getattr(self, f"{name}_starts"), getattr(self, f"{name}_columns")
                matrix = SparseRows(starts, columns, matrix.flatten()[getattr(self, f"{name}_places")], by_column)
            found[name] = matrix
        frames = [found[f"frame{index}"] for index in range(len(folded.frames))]
        transitions = [found[f"transition{index}"] for index in range(len(folded.transitions))]
        return Folded(transitions, frames, frames[-1] if self._all else found["readout"])

    def _lay_out(self) -> None:
        """The indices of every sparse matrix. A frame is two lists over tokens: its column, and where its value is.

        A transition reads tokens, sorted by row; token ``i`` has the value ``weights[i] * frame_values[sources[i]]``
        there, where the values of a frame are the stage's reconstruct values and, last, a 1 for carried tokens. Tokens
        of a row that stand in the same column of the frame are one entry, whose value is their sum.
        """
        slots, sources, columns = None, None, self._num_tokens
        for index, (run, name) in enumerate(zip(self._runs, self._carried, strict=True)):
            matrices, tokens = run.matrices, torch.arange(self._num_tokens)
            if matrices is None:
                rows = tokens
            else:
                carried = getattr(self, name)
                merged_rows, merged_columns = matrices.rows.cpu(), matrices.columns.cpu()
                rows = torch.cat([merged_rows, matrices.shape[0] + torch.arange(len(carried))])
                tokens = torch.cat([merged_columns, carried])
            if matrices is not None or slots is not None:
                self._add_layout(f"transition{index}", rows, tokens, slots, sources, columns)
            columns = int(rows[-1]) + 1
            if matrices is None:
                slots, sources = None, None
                continue
            slots = torch.full((self._num_tokens,), -1)
            slots[tokens] = rows
            sources = torch.full((self._num_tokens,), len(matrices.reconstruct))
            sources[merged_columns] = torch.arange(len(merged_columns))
            if self._all:
                everything = torch.arange(self._num_tokens)
                self._add_layout(f"frame{index}", everything, everything, slots, sources, columns)
        # What is read of the prefix stands in the first rows of every state.
        columns = int(self.wanted_rows[-1]) + 1 if self._prefix else columns
        self._add_layout("readout", self.wanted_rows, self.wanted_columns, slots, sources, columns)
        self._columns = columns

    def _add_layout(
        self, name: str, rows: Tensor, tokens: Tensor, slots: Tensor | None, sources: Tensor | None, columns: int
    ) -> None:
        """Register the indices of a matrix (any, columns) that reads ``tokens`` through the frame, one a row of
        ``rows``."""
        read = tokens if slots is None else slots[tokens]
        places, entries = torch.unique(rows * columns + read, return_inverse=True)
        starts = torch.searchsorted(places, torch.arange(int(rows[-1]) + 1) * columns).int()
        read = (places % columns).int()
        indices = {"starts": starts, "columns": read, "sources": None if slots is None else sources[tokens]}
        for field, by_column in ByColumn.of(starts, read, columns)._asdict().items():
            indices[f"by_column_{field}"] = by_column
        # Which tokens make up each entry, filled up with the one after the last, a zero.
        most = int(entries.bincount().max())
        members = torch.full((len(places), most), len(tokens))
        order = entries.argsort(stable=True)
        first = torch.searchsorted(entries[order], entries[order])
        members[entries[order], torch.arange(len(order)) - first] = order
        indices["members"] = None if torch.equal(entries, torch.arange(len(tokens))) else members
        for field, tensor in indices.items():
            self.register_buffer(f"{name}_{field}", tensor, persistent=False)

    def _fold_sparse(self, like: Tensor, dtype: torch.dtype) -> Folded:
        one = torch.ones(1, dtype=dtype, device=like.device)
        frame_values, transitions, frames = None, [], []
        for index, (run, name) in enumerate(zip(self._runs, self._carried, strict=True)):
            weights = None
            if run.matrices is not None:
                weights = torch.cat([run.matrices.merge.to(dtype), one.expand(len(getattr(self, name)))])
            if weights is None and frame_values is None:
                transitions.append(None)
            else:
                transitions.append(self._sparse(f"transition{index}", weights, frame_values))
            if run.matrices is None:
                frame_values = None
                frames.append(None)
            else:
                frame_values = torch.cat([run.matrices.reconstruct.to(dtype), one])
                frames.append(self._sparse(f"frame{index}", None, frame_values) if self._all else None)
        if self._all:
            return Folded(transitions, frames, frames[-1])
        wanted = self._sparse("readout", 1 / self.wanted_sizes.to(dtype), frame_values)
        # A mean of all patches is a row without zeros.
        return Folded(transitions, [], wanted if self._prefix else wanted.to_dense(self._columns))

    def _sparse(self, name: str, weights: Tensor | None, frame_values: Tensor | None) -> SparseRows:
        values = weights
        if frame_values is not None:
            values = frame_values.index_select(0, getattr(self, f"{name}_sources"))
            values = values if weights is None else weights * values
        members = getattr(self, f"{name}_members")
        if members is not None:
            values = torch.cat([values, values.new_zeros(1)])
            values = values.index_select(0, members.flatten()).view(members.shape).sum(1)
        by_column = ByColumn(*(getattr(self, f"{name}_by_column_{field}") for field in ByColumn._fields))
        return SparseRows(getattr(self, f"{name}_starts"), getattr(self, f"{name}_columns"), values, by_column)


def _named_matrices(folded: Folded) -> Iterator[tuple[str, Tensor | None]]:
    yield from ((f"transition{index}", matrix) for index, matrix in enumerate(folded.transitions))
    yield from ((f"frame{index}", matrix) for index, matrix in enumerate(folded.frames))
    if not folded.frames:
        yield "readout", folded.readout


def _carried_tokens(runs: Sequence[Run], num_tokens: int, num_prefix_tokens: int, readout: str) -> list[Tensor]:
    """For each run the tokens that skip it and whose rows something later reads, found from the last run to the first.

    They are the pruned ones; where merged tokens keep their rest, those that share a merged token with one that is read
    too.
    """
    everything = set(range(num_tokens))
    read = set(range(num_prefix_tokens)) if readout == "prefix" else everything
    carried = []
    for run in reversed(runs):
        if run.matrices is None:
            carried.append(set())
            read = everything
            continue
        pruned = set(run.matrices.pruned_mask.nonzero().squeeze(1).tolist())
        carried.append(pruned & read)
        if run.matrices.keeps_rest:
            carried[-1] |= everything if run.matrices.dense else _sharing(run.matrices, read)
        read = everything if run.matrices.dense else carried[-1] | set(run.matrices.columns.tolist())
    return [torch.tensor(sorted(tokens), dtype=torch.long) for tokens in reversed(carried)]


def _sharing(matrices: StageMatrices, read: set[int]) -> set[int]:
    """The tokens that share a merged token with another, where any of those is read."""
    shared = matrices.shared_mask.bool().tolist()
    pairs = list(zip(matrices.rows.tolist(), matrices.columns.tolist(), strict=True))
    merged = {row for row, token in pairs if token in read}
    return {token for row, token in pairs if row in merged and shared[token]}


def _wanted_rows(num_tokens: int, num_prefix_tokens: int, readout: str) -> tuple[Tensor, Tensor, Tensor]:
    """The rows wanted of the full map, each the mean of some tokens: row, token and the row's size for each entry."""
    if readout == "all":
        return torch.arange(num_tokens), torch.arange(num_tokens), torch.ones(num_tokens, dtype=torch.long)
    prefix = torch.arange(num_prefix_tokens)
    if readout == "prefix":
        return prefix, prefix, torch.ones_like(prefix)
    patches = num_tokens - num_prefix_tokens
    rows = torch.cat([prefix, torch.full((patches,), num_prefix_tokens)])
    sizes = torch.cat([torch.ones_like(prefix), torch.full((patches,), patches)])
    return rows, torch.arange(num_tokens), sizes
