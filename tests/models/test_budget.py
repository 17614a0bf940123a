"""Plans for a budget, with times that are made up, so that nothing depends on the machine."""

from functools import partial

import pytest
import torch
from helpers import images_for, small_vit

from pm_models import AdaptivePlan, CompressionPlan, budget, compress
from pm_models.budget import KeepRates, LatencyTable, fit_gmacs, fit_speedup, measure_latency
from pm_models.measure import count_gmacs

PATCHES = 35


@pytest.fixture
def model():
    return small_vit(depth=3)


@pytest.fixture
def make_plan():
    scores = torch.rand(3, PATCHES)
    return lambda keep_rate: CompressionPlan.from_scores(scores, (7, 5), keep_rate, 0.1)


@pytest.fixture(params=["static", "adaptive"])
def plans(request, model, make_plan):
    """Every plan there is, from the fewest tokens on."""
    return KeepRates(make_plan, PATCHES, 0.1) if request.param == "static" else AdaptivePlan.candidates(model)


def test_every_keep_rate_that_differs(make_plan):
    plans = KeepRates(make_plan, PATCHES, 0.1)
    assert len(plans) == 31  # of 35 patches, 3.5 are pruned
    for index in (0, 1, 17, 30):
        assert plans[index] == make_plan((index + 1) / PATCHES + 1e-9)
    tokens = [sum(plan.tokens) for plan in plans]
    assert tokens == sorted(set(tokens))


@pytest.mark.parametrize("share", [0.45, 0.52, 0.6])
def test_gmacs_are_met_and_no_more_tokens_would(model, plans, share):
    size = (3, 28, 20)
    target = share * count_gmacs(model, size)
    fitted = fit_gmacs(model, plans, partial(compress, model), target)
    assert fitted.value == count_gmacs(compress(model, fitted.plan), size) <= target
    assert fitted.plan == plans[fitted.index]
    more = plans[fitted.index + 1]
    assert sum(more.tokens) > sum(fitted.plan.tokens)
    assert count_gmacs(compress(model, more), size) > target


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (1e-6, "target_gmacs must be at least .*, with the fewest tokens, got 1e-06"),
        (10.0, "target_gmacs must be below the uncompressed model's"),
    ],
)
def test_gmacs_out_of_reach(model, plans, target, message):
    with pytest.raises(ValueError, match=message):
        fit_gmacs(model, plans, partial(compress, model), target)


def test_the_table_is_read_between_its_points():
    table = LatencyTable(tokens=(9, 18, 36), seconds=(1.0, 2.5, 6.0), rest=2.0)
    scores = torch.rand(2, PATCHES)

    def plan(tokens):
        return CompressionPlan.from_scores(
            scores, (7, 5), min(1.0, (tokens - 1) / PATCHES + 1e-9), 0.0, allocation="layer"
        )

    for tokens, blocks in ((9, 1.0), (12, 1.5), (18, 2.5), (27, 4.25), (36, 6.0), (5, 1.0)):
        assert plan(tokens).tokens == (tokens, tokens)
        assert table.speedup(plan(tokens)) == pytest.approx(8.0 / (2.0 + blocks))


@pytest.mark.parametrize("error", [0.8, 1.0, 1.15])
@pytest.mark.parametrize("target", [1.2, 1.6, 2.2])
def test_speed_is_met_though_the_table_is_off(monkeypatch, model, plans, target, error):
    """The device is by a factor slower or faster than the table says: the choice follows the device."""
    table = LatencyTable(tokens=(2, 36), seconds=(0.5, 6.0), rest=0.5)

    def speed(plan):
        return 1 + error * (table.speedup(plan) - 1)

    monkeypatch.setattr(budget, "measure_latency", lambda *_: table)
    monkeypatch.setattr(budget, "_speedup", lambda _, compressed, __: speed(compressed.plan))
    speeds = [speed(plan) for plan in plans]
    fitted = fit_speedup(model, plans, partial(compress, model), target, images_for(model))
    assert fitted.plan == plans[fitted.index]
    assert fitted.value == speeds[fitted.index]
    assert abs(fitted.value - target) <= min(abs(speed - target) for speed in speeds) + 0.03 * target


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (1.0, "target_speedup must be above 1, got 1"),
        (50.0, "target_speedup must be at most about .* at batch 3 on cpu, with the fewest tokens, got 50"),
    ],
)
def test_speed_out_of_reach(monkeypatch, model, plans, target, message):
    monkeypatch.setattr(budget, "measure_latency", lambda *_: LatencyTable((2, 36), (0.5, 6.0), 0.5))
    with pytest.raises(ValueError, match=message):
        fit_speedup(model, plans, partial(compress, model), target, images_for(model))


def test_what_the_table_measures(monkeypatch, model):
    """All blocks on an eighth of the tokens, two eighths, ..., and the model; nothing else is timed."""
    ran = []

    def counted(calls, cuda):
        assert not cuda
        times = {}
        for name, call in calls.items():
            handles = [b.register_forward_hook(lambda _, x, __: ran.append(x[0].shape[1])) for b in model.blocks]
            ran.clear()
            call()
            times[name] = float(sum(ran)) + (100 if name == "model" else 0)
            for handle in handles:
                handle.remove()
        return times

    monkeypatch.setattr(budget, "_medians", counted)
    table = measure_latency(model, images_for(model))
    assert table.tokens == (4, 9, 14, 18, 22, 27, 32, 36)
    assert table.seconds == tuple(3.0 * tokens for tokens in table.tokens)
    assert table.rest == 100
