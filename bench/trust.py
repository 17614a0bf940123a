"""What was tried to break the package, and how exact its ops are: the long property tests, and a table of errors.

``python -m bench.trust`` writes trust.json: for every op and dtype its error against float64 beside that of PyTorch's
own ops; the cases that each test of ``pytest -m fuzz`` tried; and how all tests went on the oldest versions, the
newest, and some between them, which ``.ci/versions`` installs. It takes more than an hour on two cores.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined

from pm_kernels import (
    SparseRows,
    backend,
    fused_merge_attention,
    fused_merge_attention_qkv,
    token_mix,
    token_mix_layer_norm,
    transition,
)

from . import results
from .machine import describe, versions

ROOT = Path(__file__).parents[1]
VERSIONS = ("oldest", "middle", "newest")  # as .ci/versions calls them
VERSIONED = ("torch ", "triton ", "timm ", "numpy ")  # as lines of .ci/versions begin
Op = Callable[..., Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.trust", description=__doc__.splitlines()[0])
    parser.add_argument(
        "parts", nargs="*", default=["errors", "tests", *VERSIONS],
        help=f"errors, {', '.join(VERSIONS)}, or tests by file or folder; the rest of the file stays (default: all)",
    )  # fmt: skip
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="write <device>/trust.json here")
    parser.add_argument("--processes", type=int, default=2, help="tests at a time (%(default)s)")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = options.results / device / "trust.json"
    records = []
    for part in options.parts:
        if part == "errors":
            found = errors(device)
        elif part in VERSIONS:
            found = on_versions(part)
        else:
            found = tried(options.processes, part)
        records = joined(path, list(found))
        results.write(path, describe(device), records)
    failed = [_name(record) for record in records if not record.get("passed", True)]
    print(f"{sum(record.get('cases', 0) for record in records)} cases; failed: {', '.join(failed) or 'none'}")


def joined(path: Path, found: list[dict]) -> list[dict]:
    """``found``, and what a file of the same kernels holds beside it; each record with the commit that it is of."""
    commit = versions()["commit"]
    found = [record | {"commit": commit} for record in found]
    names = {_name(record) for record in found}
    content, wrong = results.read(path) if path.is_file() else ({"records": []}, "")
    kept = [] if wrong else [record for record in content["records"] if _name(record) not in names]
    return [*({"commit": content["commit"]} | record for record in kept), *found]


def _name(record: dict) -> str:
    """What it is a record of."""
    if "op" in record:
        return f"{record['op']}, {record['dtype']}"
    return record.get("test") or record["versions"]


def tried(processes: int, tests: str) -> Iterator[dict]:
    """The outcome of every test of ``pytest -m fuzz``, and how many cases it tried."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "fuzz", "-n", str(processes), "--dist", "worksteal"]
        subprocess.run([*command, "--junitxml", str(report), tests], cwd=ROOT, check=False)
        for case in ElementTree.parse(report).iter("testcase"):
            if case.find("skipped") is None:
                properties = {found.get("name"): found.get("value") for found in case.iter("property")}
                name = f"{case.get('classname').removeprefix('tests.')}::{case.get('name')}"
                passed = case.find("failure") is None and case.find("error") is None
                yield {"test": name, "cases": int(properties.get("cases", 1)), "passed": passed}


def on_versions(which: str) -> Iterator[dict]:
    """The outcome of all tests on one of ``VERSIONS`` of what the package needs.

    Raises:
        RuntimeError: no test ran, as where the versions cannot be installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        report, lines = Path(folder) / "report.xml", []
        command = [str(ROOT / ".ci" / "versions"), which, "--junitxml", str(report)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
            for line in run.stdout:
                print(line, end="", flush=True)
                lines.append(line)
        if not report.is_file():
            raise RuntimeError(f"{' '.join(command)} ended with status {run.returncode} before it ran a test")
        counts = ElementTree.parse(report).find("testsuite").attrib
    skipped = int(counts["skipped"])
    yield {
        "versions": ", ".join(" ".join(line.split()) for line in lines if line.startswith(VERSIONED)),
        "tests": int(counts["tests"]) - skipped,
        "skipped": skipped,
        "passed": run.returncode == 0,
    }


def errors(device: str) -> Iterator[dict]:
    """For every op and dtype the greatest error of results and gradients, ours and PyTorch's, in parts of the greatest
    value."""
    dtypes = [torch.float32, torch.float16] + ([torch.bfloat16] if device == "cuda" else [])
    for dtype in dtypes:
        for name, (ours, theirs, inputs) in _ops(device).items():
            exact = _run(theirs, inputs, torch.float64)
            with backend("triton"):
                found = _run(ours, inputs, dtype)
            other = _run(theirs, inputs, dtype)
            yield {
                "op": name,
                "dtype": str(dtype).removeprefix("torch."),
                "ours": max(map(_error, found, exact)),
                "pytorch": max(map(_error, other, exact)),
            }


def _ops(device: str) -> dict[str, tuple[Op, Op, list[Tensor]]]:
    """By name: the op, the same of PyTorch's ops, and inputs in float32."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 118, 64, device=device) for _ in "qkv")
    merge = torch.randn(70, 118, device=device) / 118**0.5
    bias, gate = torch.randn(70, device=device), torch.rand(70, device=device)
    x, matrix = torch.randn(2, 118, 192, device=device), torch.randn(70, 118, device=device) / 118**0.5
    few = matrix * (torch.rand(matrix.shape, device=device) < 0.03)
    weight, offset = torch.randn(192, device=device), torch.randn(192, device=device)
    update, qkv = torch.randn(2, 100, 192, device=device), torch.randn(2, 118, 3, 3, 64, device=device)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def merged(q: Tensor, k: Tensor, v: Tensor, merge: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
        q, k, v = (merge @ x for x in (q, k, v))
        # A gate on the columns is one on the values.
        return F.scaled_dot_product_attention(q, k, v * gate.unsqueeze(1), attn_mask=bias.expand(1, 1, 70, 70))

    def packed(qkv: Tensor) -> Tensor:
        return sdpa(*qkv.permute(2, 0, 3, 1, 4))

    def rows_of(matrix: Tensor) -> SparseRows:
        return SparseRows.from_dense(few.to(matrix))._replace(values=matrix[few != 0])

    def norm(x: Tensor, matrix: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
        return F.layer_norm(matrix @ x, (192,), weight, offset, 1e-6)

    def step(x: Tensor, update: Tensor, matrix: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
        x, carried = x.split([100, 18], dim=1)
        return torch.cat(transition(x, carried, rows_of(matrix), 60, update=update, norm=(weight, offset, 1e-6)), dim=1)

    def steps(x: Tensor, update: Tensor, matrix: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
        x, carried = x.split([100, 18], dim=1)
        mixed = (matrix * (few != 0)) @ torch.cat([x + update, carried], dim=1)
        return torch.cat([mixed, F.layer_norm(mixed[:, :60], (192,), weight, offset, 1e-6)], dim=1)

    return {
        "attention": (fused_merge_attention, sdpa, [q, k, v]),
        "attention with merge, bias and gate": (
            lambda q, k, v, merge, bias, gate: fused_merge_attention(q, k, v, merge, key_bias=bias, gate=gate),
            merged,
            [q, k, v, merge, bias, gate],
        ),
        "attention of packed qkv": (fused_merge_attention_qkv, packed, [qkv]),
        "token mix, dense": (token_mix, lambda x, matrix: matrix @ x, [x, matrix]),
        "token mix, sparse": (
            lambda x, matrix: token_mix(x, rows_of(matrix)),
            lambda x, matrix: (matrix * (few != 0)) @ x,
            [x, few],
        ),
        "token mix and LayerNorm": (
            lambda *given: token_mix_layer_norm(*given, 1e-6)[1],
            norm,
            [x, matrix, weight, offset],
        ),
        "transition": (step, steps, [x, update, few, weight, offset]),
    }


def _run(op: Op, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    given = [value.to(dtype).requires_grad_() for value in inputs]
    out = op(*given)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.device).to(dtype)
    return [out, *torch.autograd.grad(out, given, upstream)]


def _error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


if __name__ == "__main__":
    main()
