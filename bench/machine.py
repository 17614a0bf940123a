"""What a result was measured on: names, versions, and the machine's own copy and matmul rates."""

import datetime
import importlib.metadata
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch


def describe(device: str = "cpu") -> dict:
    """Device, versions, commit and date, and the rates measured now."""
    facts = {"threads": torch.get_num_threads()} if device == "cpu" else {"driver": _driver()}
    return {
        "device": _processor() if device == "cpu" else torch.cuda.get_device_name(),
        **facts,
        **versions(),
        "copy_gbps": copy_gbps(device),
        "matmul_tflops": {
            "float32": matmul_tflops(torch.float32, device),
            "bfloat16": matmul_tflops(torch.bfloat16, device),
        },
    }


def versions() -> dict:
    """Versions, commit and date."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "timm")},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def copy_gbps(device: str = "cpu") -> float:
    """Gigabytes per second of a large copy, reads and writes counted."""
    source = torch.randn(2**26 if device == "cpu" else 2**30, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device) / 1e9


def matmul_tflops(dtype: torch.dtype, device: str = "cpu") -> float:
    """10^12 floating-point operations per second of a large square product of random numbers."""
    size = 2048 if device == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size**3 / _seconds(lambda: a @ b, device) / 1e12


def _seconds(function: Callable[[], object], device: str) -> float:
    times = []
    for _ in range(8):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"cpu: {name}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The checkout's commit, marked where the working tree differs from it in more than results."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--", ":/", ":(top,exclude)bench/results")
    return (commit or "unknown") + ("-dirty" if changed else "")


def _git(*command: str) -> str:
    """What git prints, nothing where it fails."""
    done = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
