"""An op or a model beside its peers: errors against float64, times of one run, and the floor by bytes and FLOPs."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pm_models.measure import alternate

Call = Callable[[], object]


def record(
    case: str,
    op: str,
    calls: Mapping[str, Call],
    like: Tensor,
    moved: int,
    flops: float,
    machine: dict,
    *,
    rounds: int = 50,
    **facts: object,
) -> dict:
    """One case: the times of ``ours`` and of the peers. A peer that cannot run here is left out.

    Args:
        case: its name.
        op: the op's name.
        calls: what is timed, by name.
        like: the input whose shape and dtype are recorded.
        moved: bytes that must move.
        flops: floating-point operations that must be done.
        machine: what :func:`bench.machine.describe` measured.
        rounds: how often each is called on a CPU.
        facts: further entries of the record, or others in the place of its own.

    Returns:
        The record as it is written, and under ``times_ms`` all times, which are not.
    """
    runnable = {}
    for name, call in calls.items():
        try:
            call()
            runnable[name] = call
        except (RuntimeError, torch.OutOfMemoryError) as problem:
            print(f"{case}: {name} cannot run: {str(problem).splitlines()[0]}")
    times = _timed(runnable, like.is_cuda, rounds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    precision = str(facts.pop("dtype", like.dtype)).removeprefix("torch.")
    rate = machine["matmul_tflops"][precision]
    return {
        "case": case,
        "op": op,
        "shape": list(like.shape),
        "dtype": precision,
        "ours_ms": medians["ours"],
        "peers": {name: value for name, value in medians.items() if name != "ours"},
        "spread_ms": {name: max(values) - min(values) for name, values in times.items()},
        "call_ms": {name: _call_ms(call) for name, call in runnable.items()} if like.is_cuda else medians,
        "bytes": moved,
        "flops": flops,
        "memory": {name: _allocated(call) for name, call in runnable.items()} if like.is_cuda else {},
        "roofline_ms": max(moved / machine["copy_gbps"] / 1e6, flops / rate / 1e9),
        **facts,
        "times_ms": times,
    }


def errors(calls: Mapping[str, Call], exact: tuple[Tensor, ...]) -> dict[str, float]:
    """The largest relative error of any result of each call that can run, against ``exact`` in float64."""
    found = {}
    for name, call in calls.items():
        try:
            results = call()
        except (RuntimeError, torch.OutOfMemoryError):
            continue
        results = results if isinstance(results, tuple) else (results,)
        pairs = zip(results, exact, strict=True)
        found[name] = max(((result.double() - value).norm() / value.norm()).item() for result, value in pairs)
    return found


def _timed(calls: dict[str, Call], cuda: bool, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call: on a GPU device time, with the cache flushed before each."""
    if not cuda:
        seconds = alternate(calls, rounds, synchronize=False)
        return {name: [1e3 * value for value in values] for name, values in seconds.items()}
    from triton.testing import do_bench

    return {name: do_bench(call, warmup=50, rep=200, return_mode="all") for name, call in calls.items()}


def _allocated(call: Call) -> int:
    """The most bytes of GPU memory that a call takes besides what was taken before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _call_ms(call: Call) -> float:
    """The median of what a caller waits for one call on a GPU, its launches included."""
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)
