"""The specification of every op in plain PyTorch: any device, any floating dtype, differentiable."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ByColumn(NamedTuple):
    """The entries of a :class:`SparseRows` (M, N) in order of their columns, (B, ...) where every image has its own.

    Args:
        starts: (N,), where each column's entries start.
        rows: (nonzeros,), the row of each entry.
        entries: (nonzeros,), where the entry stands in the order of rows.
    """

    starts: Tensor
    rows: Tensor
    entries: Tensor

    @classmethod
    def of(cls, starts: Tensor, columns: Tensor, tokens: int) -> "ByColumn":
        """That of a matrix with ``tokens`` columns, in its integer type."""
        ordered, entries = torch.sort(columns, stable=True)
        rows = torch.searchsorted(starts.contiguous(), entries.to(starts.dtype), right=True) - 1
        places = torch.arange(tokens, device=columns.device, dtype=columns.dtype)
        found = torch.searchsorted(ordered, places.expand(*columns.shape[:-1], -1).contiguous())
        return cls(*(indices.to(columns.dtype) for indices in (found, rows, entries)))


class SparseRows(NamedTuple):
    """A matrix (M, N) by its nonzeros, row after row, as :func:`pm_kernels.token_mix` takes it.

    With one more dimension before those below, (B, ...), every image has a matrix of its own, all of as many nonzeros.

    Args:
        starts: (M,) int32 or int64, nondecreasing from 0: where each row's entries start; a row may be empty.
        columns: (nonzeros,) of the same integer type: the column of each entry. A column may occur twice in a row;
            its values are added.
        values: (nonzeros,) floating point, differentiable.
        by_column: the same entries in order of columns, which a backward on the kernels would work out at every call.
    """

    starts: Tensor
    columns: Tensor
    values: Tensor
    by_column: ByColumn | None = None

    @classmethod
    def from_dense(cls, matrix: Tensor) -> "SparseRows":
        """The nonzeros of a matrix (M, N), ready for a backward."""
        rows, columns = matrix.nonzero(as_tuple=True)
        starts = torch.searchsorted(rows, torch.arange(len(matrix), device=matrix.device)).int()
        by_column = ByColumn.of(starts, columns.int(), matrix.shape[1])
        return cls(starts, columns.int(), matrix[rows, columns], by_column)

    def to_dense(self, columns: int) -> Tensor:
        """The matrix (M, ``columns``), or (B, M, ``columns``), differentiable in the values."""
        if self.starts.dim() == 2:
            parts = zip(self.starts, self.columns, self.values, strict=True)
            return torch.stack([SparseRows(*part).to_dense(columns) for part in parts])
        entries = torch.arange(len(self.columns), device=self.columns.device, dtype=self.starts.dtype)
        rows = torch.searchsorted(self.starts, entries, right=True) - 1
        dense = self.values.new_zeros(len(self.starts), columns)
        return dense.index_put((rows, self.columns.long()), self.values, accumulate=True)

    def to(self, dtype: torch.dtype) -> "SparseRows":
        """The same matrix with values of another dtype."""
        return self._replace(values=self.values.to(dtype))


Matrix = Tensor | SparseRows


def fused_merge_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    merge: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    merge_queries: bool = True,
) -> Tensor:
    """Specification of :func:`pm_kernels.fused_merge_attention`, with the same shapes."""
    if merge is not None:
        q = merge @ q if merge_queries else q
        k, v = merge @ k, merge @ v
    if gate is not None:
        # (A * g) v = A (g v): a gate on the columns of the attention matrix is a gate on the rows of v.
        v = (gate.unsqueeze(-1) * v).to(v.dtype)
    bias = None if key_bias is None else key_bias.to(q.dtype).expand(*k.shape[:-1]).unsqueeze(-2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def token_mix(x: Tensor, matrix: Matrix) -> Tensor:
    """Specification of :func:`pm_kernels.token_mix`, with the same shapes."""
    if not isinstance(matrix, SparseRows):
        return torch.bmm(matrix.expand(x.shape[0], -1, -1), x)
    # The weighted sum of a few rows is what an embedding bag is: one bag for each row of the result.
    batch, tokens, width = x.shape
    starts, columns, values, _ = matrix
    if batch != 1 or starts.dim() == 2:
        image = torch.arange(batch, device=x.device, dtype=columns.dtype).unsqueeze(1)
        starts = (starts + image * columns.shape[-1]).flatten()
        columns = (columns + image * tokens).flatten()
        values = values.expand(batch, -1).reshape(-1)
    mixed = F.embedding_bag(columns, x.reshape(batch * tokens, width), starts, mode="sum", per_sample_weights=values)
    return mixed.view(batch, matrix.starts.shape[-1], width)


def token_mix_layer_norm(
    x: Tensor, matrix: Matrix, weight: Tensor, bias: Tensor, eps: float, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Specification of :func:`pm_kernels.token_mix_layer_norm`, with the same shapes."""
    mixed = token_mix(x, matrix)
    return mixed, layer_norm(mixed[:, :rows], weight, bias, eps)


def transition(
    x: Tensor,
    carried: Tensor | None,
    matrix: Matrix,
    rows: int | None = None,
    *,
    update: Tensor | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Specification of :func:`pm_kernels.transition`, with the same shapes."""
    state = x if update is None else x + update
    mixed = token_mix(state if carried is None else torch.cat([state, carried], dim=1), matrix)
    y = mixed[:, :rows]
    rest = None if rows is None or rows == mixed.shape[1] else mixed[:, rows:]
    return y, rest, None if norm is None else layer_norm(y, *norm)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm with statistics in float32 for half-precision rows; float64 stays float64."""
    if weight.dtype == bias.dtype == x.dtype:  # PyTorch's own takes them so
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(x.dtype)


class Matching(NamedTuple):
    """Which tokens merge, image by image.

    Args:
        segments: (B, N) int32, the merged token that each token goes into.
        sizes: (B, C) in float32 at least, how many tokens each merged token stands for.
        log_sizes: (B, C), their logarithms, by which attention minds them as keys.
        matrix: takes x (B, N, D) to the size-weighted means (B, C, D), by :func:`pm_kernels.token_mix`.
    """

    segments: Tensor
    sizes: Tensor
    log_sizes: Tensor
    matrix: Matrix


def match(
    x: Tensor,
    sizes: Tensor,
    tokens: int,
    num_prefix_tokens: int = 1,
    rounds: int = 2,
    *,
    root_sizes: bool = False,
    update: Tensor | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
) -> Matching:
    """Specification of :func:`pm_kernels.match`, with the same shapes."""
    wide, (batch, left, _) = torch.promote_types(x.dtype, torch.float32), x.shape
    with torch.no_grad(), _without_autocast(x.device.type):
        state = x if update is None else x.to(wide) + update
        features = compared = _rounded(state if norm is None else layer_norm(state, *norm), x.dtype, wide)
        sizes = merged = sizes.to(wide)
        segments = torch.arange(left, device=x.device).expand(batch, -1)
        for index, merges in enumerate(merges_by_round(left - num_prefix_tokens, tokens - num_prefix_tokens, rounds)):
            if index > 0:
                compared = _rounded(token_mix(features, means(segments, sizes, left, wide)), x.dtype, wide)
            weights = merged.sqrt() if root_sizes else merged
            segments = _match_once(compared, weights, merges, num_prefix_tokens).gather(1, segments)
            left -= merges
            merged = segment_sums(sizes, segments, left)
        return Matching(segments.int(), merged, merged.log(), means(segments, sizes, tokens, x.dtype))


def _without_autocast(device: str) -> AbstractContextManager:
    """Products are taken in the dtype of their factors."""
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def _rounded(x: Tensor, dtype: torch.dtype, wide: torch.dtype) -> Tensor:
    """Numbers that ``dtype`` has, in ``wide``."""
    return x.to(dtype).to(wide)


def merges_by_round(patches: int, left: int, rounds: int) -> list[int]:
    """How many of ``patches`` merge into others in each round, so that ``left`` remain: even shares, as far as can be.

    A round takes at most the patches at even places, all but the lower half.
    """
    merges = []
    for following in reversed(range(rounds)):
        # Twice as many and one can be halved, and so on: no more may be left before the rounds that follow.
        most = (left + 1 << following) - 1
        share = max(-(-(patches - left) // (following + 1)), patches - most)
        merges.append(share)
        patches -= share
    return merges


def pairs_compared(patches: int, left: int, rounds: int) -> int:
    """How many pairs of a source and a target the rounds of an image's match compare."""
    pairs = 0
    for merges in merges_by_round(patches, left, rounds):
        pairs += (patches - patches // 2) * (patches // 2)
        patches -= merges
    return pairs


def fewest_tokens(patches: int, rounds: int) -> int:
    """How few of ``patches`` can be left by a number of rounds."""
    return max(patches >> rounds, min(patches, 1))


def _match_once(features: Tensor, weights: Tensor, merges: int, prefix: int) -> Tensor:
    """One round on tokens (B, N, D): where each of them goes (B, N) int64, of those that are left."""
    batch, count, _ = features.shape
    places = torch.arange(count, device=features.device).expand(batch, -1)
    if count - prefix < 2:
        return places
    lengths = torch.linalg.vector_norm(features, dim=-1).square()
    lengths = lengths[:, prefix::2, None] + lengths[:, None, prefix + 1 :: 2]
    sources, targets = features[:, prefix::2], features[:, prefix + 1 :: 2]
    cost = (sources @ targets.mT).mul_(-2).add_(lengths)
    # What is lost in rounding is no distance: tokens that are equal merge by their places.
    cost.masked_fill_(cost < lengths.mul_(8 * torch.finfo(features.dtype).eps), 0.0)
    source, target = weights[:, prefix::2, None], weights[:, None, prefix + 1 :: 2]
    cost.mul_((source * target).div_(source + target)).nan_to_num_(torch.inf, torch.inf)
    cheapest, partner = cost.min(dim=-1)
    stays = _not_among_least(cheapest, merges)
    staying = prefix + cheapest.shape[1] - merges
    of_sources = torch.where(stays, stays.cumsum(dim=1) + (prefix - 1), partner + staying)
    of_targets = F.pad(places[:, : targets.shape[1]] + staying, (0, (count - prefix) % 2))
    alternating = torch.stack([of_sources, of_targets], dim=2).flatten(1)[:, : count - prefix]
    return torch.cat([places[:, :prefix], alternating], dim=1)


def _not_among_least(costs: Tensor, count: int) -> Tensor:
    """Whether each of the costs (B, E) is none of its row's ``count`` lowest; of equal ones the first is the lower."""
    if not torch.compiler.is_exporting():
        stays = torch.ones_like(costs, dtype=torch.bool)
        return stays.scatter_(1, costs.argsort(dim=1, stable=True)[:, :count], False)
    place = torch.arange(costs.shape[1], device=costs.device)
    other, own = costs.unsqueeze(1), costs.unsqueeze(2)
    return ((other < own) | ((other == own) & (place < place.unsqueeze(1)))).sum(dim=2) >= count


def segment_sums(sizes: Tensor, segments: Tensor, tokens: int) -> Tensor:
    """Sums (B, ``tokens``) of sizes (B, N) by segments (B, N) int64."""
    if torch.compiler.is_exporting():
        return (memberships(segments, tokens, sizes.dtype) @ sizes.unsqueeze(2)).squeeze(2)
    return sizes.new_zeros(sizes.shape[0], tokens).scatter_add(1, segments, sizes)


def memberships(segments: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """(B, ``tokens``, N): 1 where a token goes into a merged token. For files, which are to hold no scatter."""
    return (segments.unsqueeze(1) == torch.arange(tokens, device=segments.device).unsqueeze(1)).to(dtype)


def means(segments: Tensor, sizes: Tensor, tokens: int, dtype: torch.dtype) -> Matrix:
    """The matrices (B, ``tokens``, N) of size-weighted means by segments (B, N) int64."""
    if torch.compiler.is_exporting():
        weighted = memberships(segments, tokens, sizes.dtype) * sizes.unsqueeze(1)
        return (weighted / weighted.sum(dim=2, keepdim=True)).to(dtype)
    weights = sizes / segment_sums(sizes, segments, tokens).gather(1, segments)
    ordered, columns = segments.sort(dim=1, stable=True)
    rows = torch.arange(tokens, device=segments.device).expand(len(segments), -1).contiguous()
    starts = torch.searchsorted(ordered, rows)
    return SparseRows(starts.int(), columns.int(), weights.gather(1, columns).to(dtype))


def merge_segments(x: Tensor, segments: Tensor, sizes: Tensor, tokens: int) -> Tensor:
    """Specification of :func:`pm_kernels.merge_segments`, with the same shapes."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return token_mix(x, means(segments.long(), sizes.to(wide), tokens, x.dtype))
