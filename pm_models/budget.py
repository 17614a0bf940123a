"""Plans for a budget: the keep rate at which a compressed model has given GMACs, or a given speed on a device."""

import statistics
from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .adaptive_plan import AdaptivePlan
from .measure import alternate, count_gmacs
from .models import Model, encoder_of, input_size, tokens_of
from .plan import CompressionPlan
from .segmenter import Segmenter
from .unwrapping import unwrapped
from .vision_transformer import compress

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


def fit_share(model: Model, share: float) -> AdaptivePlan:
    """The :class:`~pm_models.AdaptivePlan` of most tokens whose model has at most a share of the GMACs.

    A plan's share is estimated from its tokens. Models of plans that fit are then counted, which tells what else they
    spare, such as the last block's rows that no head reads.

    Raises:
        ValueError: the share is not between what the most merging leaves and 1.
    """
    model = unwrapped(model)
    cost, plans = TokenCost.of(model), AdaptivePlan.candidates(encoder_of(model))
    counted: dict[AdaptivePlan, float] = {}

    def count(plan: AdaptivePlan) -> float:
        if plan not in counted:
            smaller = model.compressed(plan) if isinstance(model, Segmenter) else compress(model, plan)
            counted[plan] = count_gmacs(smaller, input_size(model)) / cost.total
        return counted[plan]

    least = count(plans[0]) if plans else 1
    if not least <= share < 1:
        raise ValueError(f"gmacs must be at least {least:.3g}, the most merging, and below 1, got {share:g}")
    correction = least - cost.share(plans[0])
    for _ in range(4):
        within = bisect_right(plans, share, key=lambda plan: cost.share(plan) + correction)
        plan = plans[max(within, 1) - 1]
        if plan in counted:
            break
        correction = count(plan) - cost.share(plan)
    return max((plan for plan in counted if counted[plan] <= share), key=lambda plan: sum(plan.tokens))


class TokenCost(NamedTuple):
    """What a model's multiply-accumulates depend on, to count those of a plan without its model.

    Args:
        total: of the uncompressed model, in billions, of one image.
        blocks: for each block the factors of the tokens and of their square.
        width: D.
    """

    total: float
    blocks: list[tuple[float, float]]
    width: int

    @classmethod
    def of(cls, model: Model) -> "TokenCost":
        """That of an uncompressed model."""
        model = unwrapped(model)
        encoder = encoder_of(model)
        full = tokens_of(model)[0]
        half = -(-full // 2)
        known, blocks = {}, []
        for block in encoder.blocks:
            kind = (type(block), *(weight.shape for weight in block.parameters()))
            if kind not in known:
                whole, part = (count_gmacs(block, (count, encoder.embed_dim)) for count in (full, half))
                square = (whole / full - part / half) / max(full - half, 1)
                known[kind] = (whole / full - square * full, square)
            blocks.append(known[kind])
        return cls(count_gmacs(model, input_size(model)), blocks, encoder.embed_dim)

    def share(self, plan: AdaptivePlan) -> float:
        """GMACs of the plan's model over the uncompressed model's."""
        full, spared = plan.num_tokens, 0.0
        for (linear, square), tokens in zip(self.blocks, plan.tokens, strict=True):
            spared += linear * (full - tokens) + square * (full**2 - tokens**2)
        return 1 - (spared - plan.matching_macs(self.width) / 1e9) / self.total


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

    def gmacs(rate: float) -> float:
        return count_gmacs(make_model(make_plan(rate)), size)

    rates = _keep_rates(model, prune_rate)
    within = bisect_right(rates, target, key=gmacs)  # how many rates have no more
    if not within:
        raise ValueError(f"target_gmacs must be at least {gmacs(rates[0]):.4g}, one patch a block, got {target:g}")
    rate = rates[within - 1]
    return Fit(make_plan(rate), rate, gmacs(rate))


def fit_speedup(
    model: Model,
    make_plan: Callable[[float], CompressionPlan],
    make_model: Callable[[CompressionPlan], Model],
    prune_rate: float,
    target: float,
    images: Tensor,
) -> Fit:
    """The plan of the keep rate whose compressed model is nearest to ``target`` times as fast on the images' device.

    A plan's speed is estimated from a table of the blocks' time against tokens, which is measured once. The compressed
    model of the plan that fits is then measured, and the estimates are corrected by what it gives, up to four times.

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

    def estimate(rate: float) -> float:
        return table.speedup(make_plan(rate))

    correction, fits = 1.0, {}
    for _ in range(4):
        goal = target / correction
        within = bisect_right(rates, -goal, key=lambda rate: -estimate(rate))  # how many rates are as fast
        if not within:
            raise ValueError(
                f"target_speedup must be at most about {estimate(rates[0]) * correction:.3g} at batch {len(images)} on "
                f"{images.device.type}, one patch a block, got {target:g}"
            )
        # The one after them is slower than the goal, and may be nearer to it.
        rate = min(rates[within - 1 : within + 1], key=lambda rate, goal=goal: abs(estimate(rate) - goal))
        if rate in fits:
            break
        plan = make_plan(rate)
        fits[rate] = Fit(plan, rate, _speedup(model, make_model(plan), images))
        correction = fits[rate].value / table.speedup(plan)
        best = min(fits.values(), key=lambda fit: abs(fit.value - target))
        if abs(best.value / target - 1) < 0.01:
            break
    return best


class LatencyTable(NamedTuple):
    """The time of a model's blocks against the number of tokens, on one device at one batch.

    Args:
        tokens: ascending, the last is all tokens.
        seconds: of all blocks, each on so many tokens.
        rest: seconds of everything else in the model.
    """

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    rest: float

    def speedup(self, plan: CompressionPlan) -> float:
        """The estimated speed of the plan's model, in times that of all tokens."""
        blocks = np.interp(plan.tokens, self.tokens, self.seconds).mean().item()
        return (self.rest + self.seconds[-1]) / (self.rest + blocks)


def measure_latency(model: Model, images: Tensor) -> LatencyTable:
    """Measure the table of a model, in evaluation mode, on a batch of images (B, C, H, W)."""
    model = unwrapped(model)
    encoder = encoder_of(model)
    total = tokens_of(model)[0]
    counts = sorted({max(1 + encoder.num_prefix_tokens, round(total * eighth / 8)) for eighth in range(1, 9)})
    x = torch.randn(len(images), total, encoder.embed_dim, device=images.device, dtype=images.dtype)

    def blocks(tokens: Tensor) -> None:
        for block in encoder.blocks:
            tokens = block(tokens)

    with torch.inference_mode():
        calls = {count: partial(blocks, x[:, :count].contiguous()) for count in counts}
        times = _medians(calls | {"model": partial(model, images)}, images.is_cuda)
    seconds = tuple(times[count] for count in counts)
    return LatencyTable(tuple(counts), seconds, max(0.0, times["model"] - seconds[-1]))


def _speedup(model: Model, compressed: Model, images: Tensor) -> float:
    with torch.inference_mode():
        times = _medians({"dense": partial(model, images), "ours": partial(compressed, images)}, images.is_cuda)
    return times["dense"] / times["ours"]


def _medians(calls: dict, cuda: bool) -> dict:
    return {name: statistics.median(times) for name, times in alternate(calls, _ROUNDS, synchronize=cuda).items()}


def _keep_rates(model: Model, prune_rate: float) -> list[float]:
    """Every keep rate that differs: 1 patch a block, 2, ..., all that are not pruned."""
    patches = encoder_of(model).patch_embed.num_patches
    most = max(1, int(patches * (1 - prune_rate) + 1e-9))
    return [min(1.0, count / patches + 1e-9) for count in range(1, most + 1)]
