"""Every case of every suite, ours and each peer: ``pytest bench/ --benchmark-only``."""

import pytest
import torch

from .conftest import DEVICE, REPLAY, replay


@pytest.mark.benchmark(timer=replay)
def test_case(benchmark, measurements, suite, case, name):
    record = measurements.of(suite, case)
    if name not in record["times_ms"]:
        pytest.skip(f"{name} cannot run {record['case']} on this machine")
    times = record["times_ms"][name]
    REPLAY.load([1e-3 * time for time in times])
    benchmark.group = record["case"]
    benchmark.extra_info.update(
        shape=record["shape"], dtype=record["dtype"], device=DEVICE, torch=torch.__version__,
        roofline_ms=record["roofline_ms"],
    )  # fmt: skip
    benchmark.pedantic(lambda: None, rounds=len(times))
