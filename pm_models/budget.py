"""Plans for a budget: from an ordered list, the plan whose model has given GMACs, or a given speed on a device.

The list is :class:`KeepRates`, or :meth:`AdaptivePlan.candidates <pm_models.AdaptivePlan.candidates>`.
"""

import statistics
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .adaptive_plan import AdaptivePlan
from .measure import alternate, count_gmacs
from .models import Model, compressed, encoder_of, input_size, tokens_of
from .plan import CompressionPlan, Plan
from .unwrapping import unwrapped

_ROUNDS = 8


class KeepRates(Sequence[CompressionPlan]):
    """The plans of all distinct keep rates, starting at one patch per block; each is made when it is first asked for.

    Args:
        make_plan: makes the plan of a keep rate, such as :meth:`CompressionPlan.from_scores` with its other arguments
            bound.
        patches: number of patches of the model.
        prune_rate: the one that ``make_plan`` uses; it bounds the keep rate.
    """

    def __init__(self, make_plan: Callable[[float], CompressionPlan], patches: int, prune_rate: float) -> None:
        most = max(1, int(patches * (1 - prune_rate) + 1e-9))
        self.rates = [min(1.0, count / patches + 1e-9) for count in range(1, most + 1)]
        self._make_plan = cache(make_plan)

    def __len__(self) -> int:
        return len(self.rates)

    def __getitem__(self, index: int) -> CompressionPlan:
        return self._make_plan(self.rates[index])


class Fit(NamedTuple):
    """A plan that meets a budget.

    Args:
        plan: the plan.
        index: its place in the list that it was chosen from.
        value: GMACs of one image, or the measured speed as a multiple of the uncompressed model's.
    """

    plan: Plan
    index: int
    value: float


def fit_share(model: nn.Module, share: float) -> AdaptivePlan:
    """The :class:`~pm_models.AdaptivePlan` with the most tokens whose model has at most a share of the GMACs.

    Raises:
        ValueError: the share is not between what the strongest merging leaves and 1.
    """
    model = unwrapped(model)
    plans, gmacs = AdaptivePlan.candidates(encoder_of(model)), _counting(model, partial(compressed, model))
    dense = count_gmacs(model, input_size(model))
    least = gmacs(plans[0]) / dense
    if not least <= share < 1:
        raise ValueError(f"gmacs must be at least {least:.3g}, by the strongest merging, and below 1, got {share:g}")
    return plans[max(bisect_right(plans, share * dense, key=gmacs), 1) - 1]


def fit_gmacs(model: Model, plans: Sequence[Plan], make_model: Callable[[Plan], Model], target: float) -> Fit:
    """The plan with the most tokens whose compressed model has at most ``target`` GMACs per image.

    Args:
        model: the uncompressed model.
        plans: the plans to choose from, at least one, in ascending order of tokens.
        make_model: makes the compressed model of a plan, such as :func:`compress` with its other arguments bound.
        target: billions of multiply-accumulates of one image.

    Raises:
        ValueError: even the smallest plan has more, or the uncompressed model has no more.
    """
    model = unwrapped(model)
    dense, gmacs = count_gmacs(model, input_size(model)), _counting(model, make_model)
    if target >= dense:
        raise ValueError(f"target_gmacs must be below the uncompressed model's {dense:.4g}, got {target:g}")
    within = bisect_right(plans, target, key=gmacs)  # how many plans have no more
    if not within:
        raise ValueError(f"target_gmacs must be at least {gmacs(plans[0]):.4g}, with the fewest tokens, got {target:g}")
    return Fit(plans[within - 1], within - 1, gmacs(plans[within - 1]))


def _counting(model: Model, make_model: Callable[[Plan], Model]) -> Callable[[Plan], float]:
    """A function from a plan to the GMACs of an image, which counts each plan once."""
    return cache(lambda plan: count_gmacs(make_model(plan), input_size(model)))


def fit_speedup(
    model: Model,
    plans: Sequence[Plan],
    make_model: Callable[[Plan], Model],
    target: float,
    images: Tensor,
) -> Fit:
    """The plan whose compressed model is nearest to ``target`` times as fast on the images' device.

    Speeds are estimated from a table of the blocks' time against the number of tokens, measured once. The model of the
    plan that fits is then measured itself, and the estimates are corrected by the result, up to four times.

    Args:
        model: the uncompressed model, in evaluation mode on the images' device.
        plans, make_model: as in :func:`fit_gmacs`.
        target: throughput in inference, as a multiple of the uncompressed model's.
        images: (B, C, H, W), the batch to measure on.

    Raises:
        ValueError: the target is not above 1, or even the fewest tokens are not that fast.
    """
    if target <= 1:
        raise ValueError(f"target_speedup must be above 1, got {target:g}")
    model = unwrapped(model)
    table = measure_latency(model, images)

    def estimate(index: int) -> float:
        return table.speedup(plans[index])

    correction, fits = 1.0, {}
    for _ in range(4):
        goal = target / correction
        within = bisect_right(range(len(plans)), -goal, key=lambda index: -estimate(index))  # how many are fast enough
        if not within:
            raise ValueError(
                f"target_speedup must be at most about {estimate(0) * correction:.3g} at batch {len(images)} on "
                f"{images.device.type}, with the fewest tokens, got {target:g}"
            )
        # The next plan is slower than the goal, but may be nearer to it.
        nearest = range(len(plans))[within - 1 : within + 1]
        index = min(nearest, key=lambda index, goal=goal: abs(estimate(index) - goal))
        if index in fits:
            break
        fits[index] = Fit(plans[index], index, _speedup(model, make_model(plans[index]), images))
        correction = fits[index].value / estimate(index)
        best = min(fits.values(), key=lambda fit: abs(fit.value - target))
        if abs(best.value / target - 1) < 0.01:
            break
    return best


class LatencyTable(NamedTuple):
    """The time of a model's blocks against the number of tokens, on one device at one batch.

    Args:
        tokens: ascending; the last entry is all tokens.
        seconds: of all blocks together, each on that many tokens.
        rest: seconds of everything else in the model.
    """

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    rest: float

    def speedup(self, plan: Plan) -> float:
        """The estimated speed of the plan's model, as a multiple of the speed on all tokens."""
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
