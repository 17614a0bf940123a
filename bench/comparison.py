"""An op beside its peers: errors against float64, times of the same run, and the floor that bytes and FLOPs set."""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pm_models.files import write_atomically
from pm_models.measure import alternate
from pm_models.report import format_table

from .machine import describe

Call = Callable[[], object]


def record(
    case: str,
    op: str,
    functions: Mapping[str, tuple[Call, Call]],
    exact: tuple[Tensor, ...],
    like: Tensor,
    moved: int,
    flops: int,
    machine: dict,
    others: Mapping[str, Call] | None = None,
) -> dict:
    """One case: ``functions``, ``ours`` and the peers, each on the inputs of ``exact`` and on all.

    Args:
        case: its name.
        op: the op's name.
        functions: what is compared with ``exact``, and what is timed.
        exact: the results in float64.
        like: the input whose shape and dtype are recorded.
        moved: bytes that must move.
        flops: floating-point operations that must be done.
        machine: what :func:`bench.machine.describe` measured.
        others: what is timed beside them and computes something else.
    """
    errors, runnable = {}, {}
    for name, (small, whole) in functions.items():
        try:
            errors[name] = _error(small, exact)
            whole()
            runnable[name] = whole
        except (RuntimeError, torch.OutOfMemoryError) as problem:
            print(f"{case}: {name} cannot run: {str(problem).splitlines()[0]}")
    seconds = _timed(runnable | dict(others or {}), like.is_cuda)
    milliseconds = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
    precision = str(like.dtype).removeprefix("torch.")
    return {
        "case": case,
        "op": op,
        "shape": list(like.shape),
        "dtype": precision,
        "ours_ms": milliseconds.pop("ours"),
        "peers": milliseconds,
        "spread_ms": {name: 1e3 * (max(times) - min(times)) for name, times in seconds.items()},
        "errors": errors,
        "bytes": moved,
        "flops": flops,
        "roofline_ms": max(moved / machine["copy_gbps"] / 1e6, flops / machine["matmul_tflops"][precision] / 1e9),
    }


def _error(function: Call, exact: tuple[Tensor, ...]) -> float:
    """The largest relative error of any result."""
    results = function()
    results = results if isinstance(results, tuple) else (results,)
    return max(
        ((result.double() - value).norm() / value.norm()).item() for result, value in zip(results, exact, strict=True)
    )


def _timed(functions: dict[str, Call], cuda: bool) -> dict[str, list[float]]:
    """Seconds of each call: on a GPU device time, with the cache flushed before each."""
    if not cuda:
        return alternate(functions, 10, synchronize=False)
    from triton.testing import do_bench

    return {
        name: [1e-3 * time for time in do_bench(function, warmup=50, rep=200, return_mode="all")]
        for name, function in functions.items()
    }


def rows(records: list[dict]) -> Iterator[tuple[str, ...]]:
    """The table that is printed."""
    yield "case", "ms", "of the floor", "fastest peer", "x it", "error x its"
    for record in records:
        ours_ms, others = record["ours_ms"], record["peers"]
        best = min((name for name in others if name in record["errors"]), key=others.get)
        yield (
            record["case"],
            f"{ours_ms:.3f}",
            f"{record['roofline_ms'] / ours_ms:.0%}",
            best,
            f"{others[best] / ours_ms:.2f}",
            f"{record['errors']['ours'] / record['errors'][best]:.2f}",
        )


def main(
    description: str, cases: Iterable[Any], measure: Callable[[Any, str, dict], dict], facts: dict | None = None
) -> None:
    """Measure the cases, print them as they come, and write all of them so far to a file where one is asked for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=None, help="write the records to a JSON file")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = describe(device)
    records = []
    for case in cases:
        records.append(measure(case, device, machine))
        print(format_table(list(rows(records))).splitlines()[-1], flush=True)
        if options.output is not None:
            content = json.dumps({**machine, **(facts or {}), "records": records}, indent=2) + "\n"
            write_atomically(options.output, content.encode())
    print("\n" + format_table(list(rows(records))))
