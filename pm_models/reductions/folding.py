"""Folding: turn the static matrices of a model into one small transition per boundary between its stages.

The full token map between two stages is ``x = F z``: a static frame ``F`` times a small state ``z = [y ; p]``, the C
rows that the stage's blocks computed and the rows of the tokens that skipped it. A stage's merge matrix M and the
selection E of the tokens that skip it act on ``F z``, so that ``T = [M ; E^T] F`` takes one state to the next and the
map itself is never needed. Only matrices are computed here; no image is involved.

As long as the matrices keep the plan's support, every entry of every transition is a sum of products of two stored
numbers at places known from the plan. All transitions of a model are one vector of such sums, and every forward
computes it.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pm_kernels import ByColumn, SparseRows
from pm_kernels.runtime import autocast_dtype

from .matrices import StageMatrices

READOUTS = ("all", "prefix", "patch_mean")
Transition = Tensor | SparseRows
Runs = Sequence[StageMatrices | None]  # stages in order; None stands for uncompressed blocks between stages


class Folded(NamedTuple):
    """A model's matrices, folded for one readout.

    Args:
        transitions: for each run the matrix (C + carried, ...) that maps the previous state to the run's, or ``None``
            where the state does not change.
        frames: for each run the matrix (N, C + carried) that maps its state to the full map, or ``None`` where the
            state is the full map; empty if no maps were requested.
        readout: the matrix that maps the last state to the requested rows, or ``None`` where the state is these rows.
    """

    transitions: list[Transition | None]
    frames: list[Transition | None]
    readout: Transition | None


class Fold(nn.Module):
    """The transitions of a model whose matrices keep the plan's support, for one readout.

    Args:
        runs: the model's stages; at least one is not ``None``.
        num_tokens: N.
        num_prefix_tokens: P.
        readout: the rows to return after the last run: ``"all"`` N; ``"prefix"``, the first P; ``"patch_mean"``, the
            first P and the mean of the patches as one more row.
        maps: compute the frames of all runs too.
    """

    def __init__(
        self, runs: Runs, num_tokens: int, num_prefix_tokens: int, readout: str, *, maps: bool = False
    ) -> None:
        super().__init__()
        products, rests, count = _products(runs, num_tokens, num_prefix_tokens, readout, maps)
        share = 1 / max(num_tokens - num_prefix_tokens, 1)
        self.rests = None if rests is None else SumsOfProducts(*rests, torch.arange(len(rests[0])), count, share)
        count += 0 if rests is None else len(rests[0])
        self.patterns, self._sizes, terms = nn.ModuleList(), [], []
        for product in products:
            if product is not None:
                where, left, right = product.terms(count + _ONE)
                places, entries = torch.unique(where, return_inverse=True)
                terms.append((left, right, entries + sum(self._sizes)))
                self.patterns.append(SparsePattern(places, product.shape))
                self._sizes.append(len(places))
        self.sums = SumsOfProducts(*map(torch.cat, zip(*terms, strict=True)), count, share)
        self._present = [product is not None for product in products]
        self._runs = len(runs)
        self.register_buffer("cells", None, persistent=False)
        if readout == "patch_mean":  # the row of the patches' mean has no zeros
            cells = torch.full(products[-1].shape, len(places))
            cells.view(-1)[places] = torch.arange(len(places))
            self.cells = cells

    def forward(self, runs: Runs, dtype: torch.dtype) -> Folded:
        """The folded matrices, computed in at least float32, differentiable in the trained values."""
        values = torch.cat([matrix for stage in runs if stage is not None for matrix in stage()])
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        if self.rests is not None:
            values = torch.cat([values, -self.rests(values)])
        parts = self.sums(values).to(dtype).split(self._sizes)
        matrices = [pattern(part) for pattern, part in zip(self.patterns, parts, strict=True)]
        if self.cells is not None:
            matrices[-1] = F.pad(parts[-1], (0, 1))[self.cells]
        found = iter(matrices)
        return arranged([next(found) if present else None for present in self._present], self._runs)


class DenseFold(nn.Module):
    """The same for dense matrices, by matrix products; the arguments are those of :class:`Fold`."""

    def __init__(
        self, runs: Runs, num_tokens: int, num_prefix_tokens: int, readout: str, *, maps: bool = False
    ) -> None:
        super().__init__()
        self._readout, self._maps, self._prefix = readout, maps, num_prefix_tokens
        identity = torch.eye(num_tokens, dtype=torch.bool)
        self.register_buffer("identity", identity, persistent=False)
        for index, carried in enumerate(carried_tokens(runs, num_tokens, num_prefix_tokens, readout)):
            self.register_buffer(f"carried{index}", carried, persistent=False)

    def forward(self, runs: Runs, dtype: torch.dtype) -> Folded:
        wide = torch.promote_types(dtype, torch.float32)
        identity = self.identity.to(wide)
        frame, transitions, frames = None, [], []
        for index, stage in enumerate(runs):
            if stage is None:
                transitions.append(frame)
                frame = None
            else:
                merge, reconstruct = (matrix.to(wide) for matrix in stage.matrices())
                carried = getattr(self, f"carried{index}")
                matrix = torch.cat([merge, identity[carried]])
                transitions.append(matrix if frame is None else _product(matrix, frame))
                skipping = stage.pruned_mask.to(wide).diag()
                if stage.keeps_rest:
                    skipping = skipping + stage.shared_mask.to(wide)[:, None] * (
                        identity - _product(reconstruct, merge)
                    )
                frame = torch.cat([reconstruct, skipping[:, carried]], dim=1)
            frames.append(frame)
        readout = frame
        if self._readout != "all":
            readout = identity if frame is None else frame
            prefix, patches = readout[: self._prefix], readout[self._prefix :]
            readout = prefix if self._readout == "prefix" else torch.cat([prefix, patches.mean(0, keepdim=True)])
        found = [*transitions, *(frames if self._maps else []), readout]
        return arranged([None if matrix is None else matrix.to(dtype) for matrix in found], len(runs))


def _product(first: Tensor, second: Tensor) -> Tensor:
    """``first @ second`` without autocast, which would round a result that all images share."""
    if autocast_dtype(first) is None:
        return first @ second
    with torch.autocast(first.device.type, enabled=False):
        return first @ second


class FrozenFold(nn.Module):
    """Folded matrices as constants: those with few nonzeros are stored sparse, and also dense for exports."""

    def __init__(self, folded: Folded) -> None:
        super().__init__()
        matrices = [*folded.transitions, *folded.frames, folded.readout]
        self._runs = len(folded.transitions)
        self._sparse = []
        for index, matrix in enumerate(matrices):
            dense = matrix
            if isinstance(matrix, SparseRows):
                dense = matrix.to_dense(len(matrix.by_column.starts))
            elif matrix is not None and int(matrix.count_nonzero()) <= 4 * len(matrix):
                matrix = SparseRows.from_dense(matrix)
            self.register_buffer(f"dense{index}", dense, persistent=False)
            self._sparse.append(isinstance(matrix, SparseRows))
            if self._sparse[-1]:
                for name, tensor in zip(_FROZEN, (*matrix[:3], *matrix.by_column), strict=True):
                    self.register_buffer(f"{name}{index}", tensor.clone(), persistent=False)

    def forward(self, runs: Runs, dtype: torch.dtype) -> Folded:
        matrices = []
        for index, sparse in enumerate(self._sparse):
            if sparse and not torch.compiler.is_exporting():
                starts, columns, values, *by_column = (getattr(self, f"{name}{index}") for name in _FROZEN)
                matrices.append(SparseRows(starts, columns, values.to(dtype), ByColumn(*by_column)))
            else:
                dense = getattr(self, f"dense{index}")
                matrices.append(None if dense is None else dense.to(dtype))
        return arranged(matrices, self._runs)


_FROZEN = ("starts", "columns", "values", "by_starts", "by_rows", "by_entries")


def arranged(matrices: list[Transition | None], runs: int) -> Folded:
    """Split a list into the transitions of all runs, the frames of all runs or none, and the readout."""
    return Folded(matrices[:runs], matrices[runs:-1], matrices[-1])


class Entries(NamedTuple):
    """A sparse matrix whose entry ``i``, at (rows[i], columns[i]), is the element ``values[i]`` of a vector.

    Entries at the same place are summed.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor


class Product(NamedTuple):
    """The matrix ``first @ second`` of a given shape, where ``None`` stands for the identity."""

    first: Entries
    second: Entries | None
    shape: tuple[int, int]

    def terms(self, one: int) -> tuple[Tensor, Tensor, Tensor]:
        """The products that the matrix sums: flat index in the matrix, left and right factor, each (terms,)."""
        first, second, (_, width) = self
        if second is None:
            return first.rows * width + first.columns, first.values, torch.full_like(first.values, one)
        i, j = _pairs(first.columns, second.rows)
        return first.rows[i] * width + second.columns[j], first.values[i], second.values[j]


# Elements that follow the stored ones in the vector: 1, and 1 over the number of patches.
_ONE, _SHARE = range(2)


def _products(
    runs: Runs, num_tokens: int, num_prefix_tokens: int, readout: str, maps: bool
) -> tuple[list[Product | None], tuple[Tensor, Tensor] | None, int]:
    """All matrices of a fold in order, the factors of the rests, and how many elements the stages store.

    The elements are those of each stage's merge and reconstruct matrix, stage after stage, then the negated rests.
    """
    stages = [stage for stage in runs if stage is not None]
    count = sum(2 * len(stage.rows) for stage in stages)
    rests, pairs = iter([]), None
    if stages[0].keeps_rest:
        rests, pairs = _rests(stages, count)
    total = count + (0 if pairs is None else len(pairs[0]))
    frame, width, start = None, num_tokens, 0
    transitions, frames = [], []
    for stage, carried in zip(runs, carried_tokens(runs, num_tokens, num_prefix_tokens, readout), strict=True):
        if stage is None:
            transitions.append(frame and Product(frame, None, (num_tokens, width)))
            frame, width = None, num_tokens
        else:
            rows, columns = stage.rows.cpu(), stage.columns.cpu()
            merge = start + torch.arange(len(rows))
            reconstruct = merge + len(rows)
            start += 2 * len(rows)
            states = stage.shape[0] + torch.arange(len(carried))
            ones = torch.full_like(carried, total + _ONE)
            matrix = Entries(*map(torch.cat, ((rows, states), (columns, carried), (merge, ones))))
            transitions.append(Product(matrix, frame, (stage.shape[0] + len(carried), width)))
            entries = [(columns, rows, reconstruct), (carried, states, ones)]
            for tokens, others, numbers in [next(rests)] if stage.keeps_rest else []:
                i, j = _pairs(others, carried)
                entries.append((tokens[i], states[j], numbers[i]))
            frame, width = Entries(*map(torch.cat, zip(*entries, strict=True))), stage.shape[0] + len(carried)
        frames.append(frame and Product(frame, None, (num_tokens, width)))
    last = frames[-1]
    if readout != "all":
        wanted = _wanted(num_tokens, num_prefix_tokens, readout, total)
        # Prefix tokens are the first rows of every state, and depend on no other rows.
        last = Product(wanted, frame, (int(wanted.rows[-1]) + 1, num_prefix_tokens if readout == "prefix" else width))
    return [*transitions, *(frames if maps else []), last], pairs, count


def _rests(stages: Iterable[StageMatrices], count: int) -> tuple[Iterable[Entries], tuple[Tensor, Tensor]]:
    """For each stage the entries of ``-R M`` between tokens that share a merged token, and these entries' factors.

    Their elements follow the ``count`` stored ones.
    """
    entries, factors, start = [], [], 0
    for stage in stages:
        rows, columns = stage.rows.cpu(), stage.columns.cpu()
        sharing = stage.shared_mask.cpu()[columns].nonzero().squeeze(1)
        i, j = (sharing[index] for index in _pairs(rows[sharing], rows[sharing]))
        entries.append(Entries(columns[i], columns[j], count + torch.arange(len(i))))
        factors.append((start + len(rows) + i, start + j))
        count, start = count + len(i), start + 2 * len(rows)
    return iter(entries), tuple(map(torch.cat, zip(*factors, strict=True)))


def _wanted(num_tokens: int, num_prefix_tokens: int, readout: str, total: int) -> Entries:
    """The requested rows of the full map: the prefix tokens and, if asked for, the mean of the patches."""
    prefix = torch.arange(num_prefix_tokens)
    found = Entries(prefix, prefix, torch.full_like(prefix, total + _ONE))
    if readout == "prefix":
        return found
    patches = torch.arange(num_prefix_tokens, num_tokens)
    mean = torch.full_like(patches, num_prefix_tokens), patches, torch.full_like(patches, total + _SHARE)
    return Entries(*map(torch.cat, zip(found, mean, strict=True)))


def carried_tokens(runs: Runs, num_tokens: int, num_prefix_tokens: int, readout: str) -> list[Tensor]:
    """For each run the tokens that skip it and are read later, found from the last run to the first.

    These are pruned tokens and, where merged tokens keep their rest, those that share a merged token with one that is
    read. Dense matrices read every token.
    """
    everything = torch.ones(num_tokens, dtype=torch.bool)
    read = torch.arange(num_tokens) < num_prefix_tokens if readout == "prefix" else everything
    carried = []
    for stage in reversed(runs):
        found = torch.zeros_like(everything)
        if stage is None:
            read = everything
        else:
            rows, columns = stage.rows.cpu(), stage.columns.cpu()
            found |= stage.pruned_mask.cpu().bool() & read
            if stage.keeps_rest and stage.dense:
                found = everything
            elif stage.keeps_rest:
                merged = torch.zeros(stage.shape[0], dtype=torch.bool)
                merged[rows[read[columns]]] = True
                found[columns[merged[rows]]] |= stage.shared_mask.cpu().bool()[columns[merged[rows]]]
            read = found.clone()
            read[columns] = True
            read = everything if stage.dense else read
        carried.append(found.nonzero().squeeze(1))
    return carried[::-1]


class SumsOfProducts(nn.Module):
    """Sums of products of two elements of a vector, in a fixed order, so that results are reproducible.

    Args:
        left, right: (terms,), the indices of each product's factors.
        sums: (terms,), the sum that each product goes into; every sum has at least one.
        count: number of elements in the vector; 1 and ``share`` follow them.
        share: 1 over the number of patches.
    """

    def __init__(self, left: Tensor, right: Tensor, sums: Tensor, count: int, share: float) -> None:
        super().__init__()
        self._share = share
        self.register_buffer("factors", torch.stack([left, right]), persistent=False)
        self.register_buffer("sums", sums, persistent=False)
        # Most sums have a single term, which is taken as it is; the others go through a table padded with a zero term.
        counts = sums.bincount()
        alone = counts[sums] == 1
        table = _grouped(sums[~alone].unique(return_inverse=True)[1], int((counts > 1).sum()))
        several = F.pad((~alone).nonzero().squeeze(1), (0, 1), value=len(sums))[table]
        order = torch.cat([sums[alone], (counts > 1).nonzero().squeeze(1)])
        self.register_buffer("alone", alone.nonzero().squeeze(1), persistent=False)
        self.register_buffer("several", several, persistent=False)
        self.register_buffer("order", order.argsort(), persistent=False)
        # For each element, where backward finds the gradients of its products: in the order of the other factor.
        numbers = torch.cat([right, left])
        stored = (numbers < count).nonzero().squeeze(1)
        uses = F.pad(stored, (0, 1), value=len(numbers))[_grouped(numbers[stored], count)]
        self.register_buffer("uses", uses, persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        """(count,) to (sums,)."""
        constants = values.new_ones(1), values.new_full((1,), self._share)
        numbers = torch.cat([values, *constants])
        places = self.factors, self.alone, self.several, self.order
        if torch.is_grad_enabled() and values.requires_grad:
            return _DifferentiableSums.apply(values, numbers.detach(), *places, self.sums, self.uses)
        return _sums_of_products(numbers, *places)


class _DifferentiableSums(torch.autograd.Function):
    """The sums with a backward that gathers: an element may be in many products, and autograd would scatter."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        values: Tensor,
        numbers: Tensor,
        factors: Tensor,
        alone: Tensor,
        several: Tensor,
        order: Tensor,
        sums: Tensor,
        uses: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(numbers, factors, sums, uses)
        return _sums_of_products(numbers, factors, alone, several, order)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        numbers, factors, sums, uses = ctx.saved_tensors
        products = (gradient[sums] * numbers[factors]).flatten()
        return torch.cat([products, products.new_zeros(1)])[uses].sum(1), *[None] * 7


def _sums_of_products(numbers: Tensor, factors: Tensor, alone: Tensor, several: Tensor, order: Tensor) -> Tensor:
    left, right = numbers[factors]
    products = torch.cat([left * right, numbers.new_zeros(1)])
    return torch.cat([products[alone], products[several].sum(1)])[order]


class SparsePattern(nn.Module):
    """The places of the nonzeros of a :class:`SparseRows`.

    Args:
        places: (entries,), row * columns + column of each entry, ascending.
        shape: (rows, columns).
    """

    def __init__(self, places: Tensor, shape: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("starts", torch.searchsorted(places, torch.arange(shape[0]) * shape[1]).int(), False)
        self.register_buffer("columns", (places % shape[1]).int(), False)
        for name, tensor in ByColumn.of(self.starts, self.columns, shape[1])._asdict().items():
            self.register_buffer(f"by_{name}", tensor, persistent=False)

    def forward(self, values: Tensor) -> SparseRows:
        by_column = ByColumn(self.by_starts, self.by_rows, self.by_entries)
        return SparseRows(self.starts, self.columns, values, by_column)


def _grouped(groups: Tensor, count: int) -> Tensor:
    """(count, most): the indices of each group's items, padded with the total number of items."""
    order = groups.argsort(stable=True)
    ordered = groups[order]
    place = torch.arange(len(order)) - torch.searchsorted(ordered, ordered)
    most = int(place.max()) + 1 if len(place) else 0
    table = torch.full((count, most), len(groups))
    table[ordered, place] = order
    return table


def _pairs(columns: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """All (i, j) with columns[i] equal to rows[j]."""
    order = rows.argsort(stable=True)
    first, last = (torch.searchsorted(rows[order], columns, right=right) for right in (False, True))
    counts = last - first
    i = torch.arange(len(columns)).repeat_interleave(counts)
    j = torch.arange(len(i)) - (counts.cumsum(0) - counts)[i]
    return i, order[first[i] + j]
