"""Which tokens of an image are alike enough to merge, and their means: contract and checks."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from . import reference, runtime
from .mixing import WIDEST, token_mix
from .reference import ByColumn, Matching, SparseRows
from .runtime import Device, Known, check_tensor

LONGEST = 4096  # tokens: beyond, a single program for each image leaves too much of a GPU idle
RESIDENT = 2  # programs for each multiprocessor: as many as images of a common batch, and not more memory than that


class Results(NamedTuple):
    """What the kernel fills, see :class:`pm_kernels.Matching` and :class:`pm_kernels.ByColumn`."""

    segments: Tensor  # (B, N) int32, also the rows of the matrix's entries by column
    merged: Tensor  # (B, C) float32, sizes
    logs: Tensor  # (B, C) float32
    starts: Tensor  # (B, C) int32
    columns: Tensor  # (B, N) int32
    values: Tensor  # (B, N) in x's dtype
    by_starts: Tensor  # (B, N) int32
    entries: Tensor  # (B, N) int32

    def matching(self) -> Matching:
        """The results as the public functions return them."""
        by_column = ByColumn(self.by_starts, self.segments, self.entries)
        matrix = SparseRows(self.starts, self.columns, self.values, by_column)
        return Matching(self.segments, self.merged, self.logs, matrix)


class Match(NamedTuple):
    """The arguments of the op, as :func:`match` names them."""

    x: Tensor
    sizes: Tensor
    tokens: int
    num_prefix_tokens: int
    rounds: int
    update: Tensor | None = None
    norm: tuple[Tensor, Tensor, float] | None = None
    root_sizes: bool = False

    @classmethod
    def of(cls, *operands: Tensor | float | int | None) -> "Match":
        """The arguments from those of the registered operator, see :meth:`operands`."""
        x, sizes, update, weight, bias, eps, tokens, prefix, rounds, root_sizes = operands
        norm = None if weight is None else (weight, bias, eps)
        return cls(x, sizes, tokens, prefix, rounds, update, norm, root_sizes)

    def operands(self) -> tuple[Tensor | float | int | None, ...]:
        """The arguments as the registered operator takes them."""
        return self.x, self.sizes, self.update, *(self.norm or (None, None, 0.0)), *self[2:5], self.root_sizes

    def check(self, op: str) -> None:
        """Raise what the public functions do where the arguments do not fit together."""
        x, sizes, tokens, prefix, rounds, update, norm, root_sizes = self
        name = "features" if op == "match_tokens" else "x"
        check_tensor(name, x)
        if x.dim() != 3:
            raise ValueError(f"{name} must have shape (B, N, D), got {tuple(x.shape)}")
        batch, count, width = x.shape
        check_tensor("sizes", sizes)
        if sizes.shape != (batch, count):
            raise ValueError(f"sizes must have shape (B, N) = ({batch}, {count}), got {tuple(sizes.shape)}")
        check_tensor("sizes", sizes, x, name, dtype=False)
        for option, value, least, most in (("rounds", rounds, 1, None), ("num_prefix_tokens", prefix, 0, count)):
            _check_count(option, value, least, most)
        _check_count("tokens", tokens, prefix + reference.fewest_tokens(count - prefix, rounds), count)
        if not isinstance(root_sizes, bool):
            raise TypeError(f"root_sizes must be a bool, got {type(root_sizes).__name__}")
        if update is not None:
            check_tensor("update", update, x, name)
            if update.shape != x.shape:
                raise ValueError(f"update must have the shape of x, {tuple(x.shape)}, got {tuple(update.shape)}")
        for part, tensor in zip(("weight", "bias"), norm or (), strict=False):
            check_tensor(part, tensor, x, name, dtype=False)
            if tuple(tensor.shape) != (width,):
                raise ValueError(f"{part} must have shape (D,) = ({width},), got {tuple(tensor.shape)}")

    def cast(self, dtype: torch.dtype) -> "Match":
        """The call under autocast, which leaves it: distances are taken of what is there."""
        return self

    def supported(self) -> bool:
        """Whether there is a kernel for x's dtype and shape."""
        _, tokens, width = self.x.shape
        known = self.x.dtype in (torch.float16, torch.bfloat16, torch.float32)
        return known and 1 <= width <= WIDEST and tokens <= LONGEST

    def faster(self) -> bool:
        """Whether the kernel is faster on a GPU than PyTorch's operators."""
        return True

    def results(self) -> Results:
        """Memory for the results."""
        x, (batch, tokens, _) = self.x, self.x.shape

        def integers(count: int) -> Tensor:
            return x.new_empty(batch, count, dtype=torch.int32)

        sizes, logs = (x.new_empty(batch, self.tokens, dtype=torch.float32) for _ in range(2))
        values = x.new_empty(batch, tokens)
        segments, columns, by_starts, entries = (integers(tokens) for _ in range(4))
        return Results(segments, sizes, logs, integers(self.tokens), columns, values, by_starts, entries)

    def scratch(self, device: Device) -> tuple[Tensor, Tensor, Tensor]:
        """Memory that the programs use one image after another: features, numbers and indices."""
        batch, tokens, width = self.x.shape
        programs = min(batch, RESIDENT * device.multiprocessors)
        return (
            self.x.new_empty(programs, 2, tokens, width),
            self.x.new_empty(programs, 4, tokens, dtype=torch.float32),
            self.x.new_empty(programs, 2, tokens, dtype=torch.int32),
        )

    def flops(self) -> int:
        """Floating-point operations of the products of sources with targets."""
        batch, tokens, width = self.x.shape
        prefix = self.num_prefix_tokens
        return 2 * batch * width * reference.pairs_compared(tokens - prefix, self.tokens - prefix, self.rounds)


def match_tokens(
    features: Tensor,
    sizes: Tensor,
    tokens: int,
    *,
    num_prefix_tokens: int = 1,
    rounds: int = 2,
    root_sizes: bool = False,
) -> tuple[Tensor, Tensor]:
    """Decide image by image which tokens merge, so that ``tokens`` are left: by Ward's criterion, in a few rounds.

    In a round the patches at even places, counted after the prefix tokens, are sources, those at odd places targets.
    Each source proposes the target of the least cost ``n_i n_j / (n_i + n_j) * |f_i - f_j|^2``: by so much the merge
    raises the squared distances within clusters. The cheapest proposals are carried out; of equal ones, the first. What
    is left are the sources that stay, then the targets, and the next round takes the size-weighted means of features.
    Every round carries out as many proposals as the next ones, but for those that half of its patches do not allow.

    Distances are taken in float32 at least. One that is not above its rounding error counts as 0, one of a NaN as
    infinite. An image's result does not depend on the others. Nothing is differentiated.

    Args:
        features: (B, N, D), floating point: what tokens are compared by, such as a block's normed input.
        sizes: (B, N), floating point, above 0: how many tokens each stands for.
        tokens: C, how many are left, prefix tokens included: a round at most halves the others, rounded down.
        num_prefix_tokens: the first tokens, which never merge.
        rounds: how often sources and targets are paired.
        root_sizes: take the square roots of sizes in the cost, by which large clusters merge more readily.

    Returns:
        segments (B, N) int32, the merged token that each token goes into, and the merged tokens' sizes (B, C), in
        float32 (float64 for float64 features).

    Raises:
        ValueError: a shape, a device or a number does not fit; the message names the argument.
        TypeError: an argument is no floating-point tensor, or no whole number.
    """
    call = Match(features, sizes, tokens, num_prefix_tokens, rounds, root_sizes=root_sizes)
    matching = _matched(call, "match_tokens")
    return matching.segments, matching.sizes


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
    """:func:`match_tokens` of ``LayerNorm(x + update)``, with the matrix of the merge for :func:`transition`.

    What is compared is rounded to x's dtype, the means of a later round too; sums are taken in float32 at least.

    Args:
        x: (B, N, D), floating point.
        sizes, tokens, num_prefix_tokens, rounds, root_sizes: as in :func:`match_tokens`.
        update: (B, N, D), added to x.
        norm: weight (D,), bias (D,) and epsilon of the LayerNorm; ``None`` takes the sum as it is.

    Raises:
        ValueError, TypeError: as :func:`match_tokens` does.
    """
    return _matched(Match(x, sizes, tokens, num_prefix_tokens, rounds, update, norm, root_sizes), "match")


def _matched(call: Match, op: str) -> Matching:
    call, known, how = runtime.settle(call, op)
    if known.device is None:
        return reference.match(*call[:5], root_sizes=call.root_sizes, update=call.update, norm=call.norm)
    results = Results(*match_operator(*call.operands())) if how == "dispatch" else _run(call, known)
    return results.matching()


def _run(call: Match, known: Known) -> Results:
    tensors = (call.x, call.sizes, call.update, *(call.norm or ())[:2])
    with runtime.on_device(call.x):
        results = known.repeat(tensors)
        if results is None:
            from .matching_plan import plan

            results = known.run(plan(known.device, call), tensors)
    return Results(*results)


def _forward(*operands: Tensor | float | int | None) -> tuple[Tensor, ...]:
    call, known, _ = runtime.settle(Match.of(*operands))
    return tuple(_run(call, known))


class _Recorded(torch.autograd.Function):
    """What is decided has no gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, _: None, *operands: Tensor | float | int | None) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            results = match_operator(*operands)
        ctx.mark_non_differentiable(*results)
        return results

    @staticmethod
    def backward(ctx: FunctionCtx, *_: Tensor) -> tuple[None, ...]:
        return (None,) * 11


match_operator = runtime.register(
    "match(Tensor x, Tensor sizes, Tensor? update, Tensor? weight, Tensor? bias, float eps, SymInt tokens, "
    "SymInt num_prefix_tokens, SymInt rounds, bool root_sizes) -> (Tensor segments, Tensor sizes_left, "
    "Tensor log_sizes, Tensor starts, Tensor columns, Tensor values, Tensor by_starts, Tensor by_entries)",
    _forward,
    lambda *operands: tuple(Match.of(*operands).results()),
    _Recorded,
    lambda *operands: Match.of(*operands).flops(),
)


def merge_segments(x: Tensor, segments: Tensor, sizes: Tensor, tokens: int) -> Tensor:
    """The size-weighted means of tokens that go into the same merged token.

    Args:
        x: (B, N, D), floating point.
        segments: (B, N), whole numbers from 0 to ``tokens`` - 1, as :func:`match_tokens` returns them.
        sizes: (B, N), floating point, above 0: how many tokens each of x stands for.
        tokens: C.

    Returns:
        (B, C, D) in x's dtype, differentiable in x. A merged token without members is 0.

    Raises:
        ValueError: a shape or a device does not fit; the message names the argument.
        TypeError: an argument is of the wrong kind.
    """
    check_tensor("x", x)
    if x.dim() != 3:
        raise ValueError(f"x must have shape (B, N, D), got {tuple(x.shape)}")
    if not isinstance(segments, Tensor) or segments.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"segments must be a tensor of int32 or int64, got {getattr(segments, 'dtype', type(segments))}"
        )
    check_tensor("sizes", sizes, x, "x", dtype=False)
    for name, tensor in (("segments", segments), ("sizes", sizes)):
        if tensor.shape != x.shape[:2]:
            raise ValueError(f"{name} must have shape (B, N) = {tuple(x.shape[:2])}, got {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, the device of x, got {tensor.device}")
    _check_count("tokens", tokens, 1 if x.shape[1] else 0, None)
    wide = torch.promote_types(x.dtype, torch.float32)
    return token_mix(x, reference.means(segments.long(), sizes.detach().to(wide), tokens, x.dtype))


def _check_count(name: str, value: int, least: int, most: int | None) -> None:
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__}")
    if value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"between {least} and {most}"
        raise ValueError(f"{name} must be {bounds}, got {value}")
