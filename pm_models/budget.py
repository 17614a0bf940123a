"""Plans for a budget: the keep rate at which a compressed model has given GMACs, or a given speed on a device."""

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .data import input_size
from .measure import alternate, count_gmacs
from .plan import CompressionPlan
from .segmenter import Model, encoder_of
from .unwrapping import unwrapped

_ROUNDS = 8


class Fit(NamedTuple):
    """A plan that meets a budget.

    Args:
        plan: the plan.
        keep_rate: the rate that it was made with.
        value: GMACs of one image, or the measured speed in times the uncompressed model's.
    """

    plan: CompressionPlan
    keep_rate: float
    value: float


def fit_gmacs(
    model: Model,
    make_plan: Callable[[float], CompressionPlan],
    make_model: Callable[[CompressionPlan], Model],
    prune_rate: float,
    target: float,
) -> Fit:
    """The plan of the highest keep rate whose compressed model has at most ``target`` GMACs an image.

    Args:
        model: the uncompressed model.
        make_plan: a plan by its keep rate, such as :meth:`CompressionPlan.from_scores` with all else given.
        make_model: the compressed model of a plan, such as :func:`compress` with all else given.
        prune_rate: that of ``make_plan``, which bounds the keep rate.
        target: billions of multiply-accumulates of one image.

    Raises:
        ValueError: no keep rate has as few, or the uncompressed model has no more.
    """
    model = unwrapped(model)
    size = input_size(model)
    dense = count_gmacs(model, size)
    if target >= dense:
        raise ValueError(f"target_gmacs must be below the uncompressed model's {dense:.4g}, got {target:g}")

    def gmacs(plan: CompressionPlan) -> float:
        return count_gmacs(make_model(plan), size)

    rates = _keep_rates(model, prune_rate)
    least = gmacs(make_plan(rates[0]))
    if least > target:
        raise ValueError(f"target_gmacs must be at least {least:.4g}, one patch a block, got {target:g}")
    best = _last(rates, lambda rate: gmacs(make_plan(rate)) <= target)
    plan = make_plan(rates[best])
    return Fit(plan, rates[best], gmacs(plan))


def fit_speedup(
    model: Model,
    make_plan: Callable[[float], CompressionPlan],
    make_model: Callable[[CompressionPlan], Model],
    prune_rate: float,
    target: float,
    images: Tensor,
) -> Fit:
    """The plan of the keep rate whose compressed model is nearest to ``target`` times as fast on the images' device.

    The time of a plan is told from a table, measured once, of the blocks' time against tokens; how far that is from the
    compressed model's is measured on the plan that the table gives, and the plan chosen anew by it.

    Args:
        model: the uncompressed model, in evaluation mode on the images' device.
        make_plan, make_model, prune_rate: as in :func:`fit_gmacs`.
        target: throughput in inference, in times the uncompressed model's.
        images: (B, C, H, W), the batch to be fast at.

    Raises:
        ValueError: the target is not above 1, or one patch a block is not as fast.
    """
    if target <= 1:
        raise ValueError(f"target_speedup must be above 1, got {target:g}")
    model = unwrapped(model)
    table = measure_latency(model, images)
    rates = _keep_rates(model, prune_rate)
    correction, fitted, seen = 1.0, None, set()
    for _ in range(4):
        reachable = table.speedup(make_plan(rates[0])) * correction
        if reachable < target:
            raise ValueError(
                f"target_speedup must be at most about {reachable:.3g} at batch {len(images)} on {images.device.type}, "
                f"one patch a block, got {target:g}"
            )
        goal = target / correction
        last = _last(rates, lambda rate, goal=goal: table.speedup(make_plan(rate)) >= goal)
        # The one after it is slower than the goal, and may be nearer to it.
        near = rates[last : last + 2]
        best = last + min(range(len(near)), key=lambda i: abs(table.speedup(make_plan(near[i])) - goal))
        plan = make_plan(rates[best])
        measured = _speedup(model, make_model(plan), images)
        candidate = Fit(plan, rates[best], measured)
        if fitted is None or abs(measured - target) < abs(fitted.value - target):
            fitted = candidate
        if abs(fitted.value / target - 1) < 0.01 or best in seen:
            break
        seen.add(best)
        correction = measured / table.speedup(plan)
    return fitted


class LatencyTable(NamedTuple):
    """The time of a model's blocks against the number of tokens, on one device at one batch.

    Args:
        tokens: ascending, the last is all tokens.
        seconds: of all blocks, each on so many tokens.
        rest: seconds of what is not a block.
    """

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    rest: float

    def speedup(self, plan: CompressionPlan) -> float:
        """How many times as fast the plan's model is told to be."""
        blocks = sum(self._of(tokens) for tokens in plan.tokens) / plan.depth
        return (self.rest + self.seconds[-1]) / (self.rest + blocks)

    def _of(self, tokens: int) -> float:
        """Seconds of all blocks on ``tokens`` tokens, between the two nearest that were measured."""
        upper = next(index for index, measured in enumerate(self.tokens) if measured >= tokens)
        lower = max(0, upper - 1)
        if self.tokens[upper] == self.tokens[lower]:
            return self.seconds[upper]
        share = (tokens - self.tokens[lower]) / (self.tokens[upper] - self.tokens[lower])
        return self.seconds[lower] + share * (self.seconds[upper] - self.seconds[lower])


def measure_latency(model: Model, images: Tensor) -> LatencyTable:
    """Measure the table of a model, in evaluation mode, on a batch of images (B, C, H, W)."""
    model = unwrapped(model)
    encoder = encoder_of(model)
    total = encoder.patch_embed.num_patches + encoder.num_prefix_tokens
    counts = sorted({max(1 + encoder.num_prefix_tokens, round(total * eighth / 8)) for eighth in range(1, 9)})
    x = torch.randn(len(images), total, encoder.embed_dim, device=images.device, dtype=images.dtype)

    def blocks(tokens: Tensor) -> None:
        for block in encoder.blocks:
            tokens = block(tokens)

    with torch.inference_mode():
        calls = {count: (lambda count=count: blocks(x[:, :count].contiguous())) for count in counts}
        times = _medians(calls | {"model": lambda: model(images)}, images.is_cuda)
    seconds = tuple(times[count] for count in counts)
    return LatencyTable(tuple(counts), seconds, max(0.0, times["model"] - seconds[-1]))


def _speedup(model: Model, compressed: Model, images: Tensor) -> float:
    with torch.inference_mode():
        times = _medians({"dense": lambda: model(images), "ours": lambda: compressed(images)}, images.is_cuda)
    return times["dense"] / times["ours"]


def _medians(calls: dict, cuda: bool) -> dict:
    return {name: statistics.median(times) for name, times in alternate(calls, _ROUNDS, synchronize=cuda).items()}


def _keep_rates(model: Model, prune_rate: float) -> list[float]:
    """Every keep rate that differs: 1 patch a block, 2, ..., all that are not pruned."""
    patches = encoder_of(model).patch_embed.num_patches
    most = max(1, int(patches * (1 - prune_rate) + 1e-9))
    return [min(1.0, count / patches + 1e-9) for count in range(1, most + 1)]


def _last(rates: Sequence[float], fits: Callable[[float], bool]) -> int:
    """The last of ascending rates that fits, where the first does and what is past one that does not fits no more."""
    low, high = 0, len(rates)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(rates[middle]) else (low, middle)
    return low
