"""What the compiler makes of each kernel: registers, spills, shared memory, occupancy and matrix instructions.

python -m bench.resources                 # every configuration, for sm_80, sm_90 and sm_100; needs no GPU
python -m bench.resources --target 90 --dtype bfloat16 --head-width 64 --width 384

Kernels are compiled as the package would launch them, from plans for tensors without memory. A program that needs more
registers than there are shows a stack above 0; a matrix product off the fast path of sm_90 shows HMMA for HGMMA.
"""

import argparse
import collections
import concurrent.futures
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from . import results

HEAD_WIDTHS = (16, 32, 64, 80, 128)  # 96 is compiled as 80 is
WIDTHS = (192, 384, 768, 1024, 1280, 1664)
DTYPES = ("bfloat16", "float32")
LENGTHS = (16, 32, 64, 80, 96, 128, 144, 160, 192, 208, 224, 256, 577)
MERGED = (64, 128, 192, 256, 577)  # tokens after merging


class Target(NamedTuple):
    """A GPU by its limits: what a multiprocessor has, and what one program may take."""

    family: int
    multiprocessors: int
    shared_per_program: int
    shared: int
    registers: int = 65536
    threads: int = 2048
    programs: int = 32
    tensor_memory: int = 512  # columns, of which only sm_100 has any


TARGETS = {
    80: Target(80, 108, 163 * 1024, 164 * 1024),
    90: Target(90, 132, 227 * 1024, 228 * 1024),
    100: Target(100, 148, 227 * 1024, 228 * 1024),
}


class AttentionCase(NamedTuple):
    """One call of fused_merge_attention whose kernels are compiled."""

    target: int
    dtype: str
    width: int  # of a head
    tokens: int
    merged: int | None  # tokens after merging
    merge_queries: bool
    extras: bool  # with gate and bias, per head, and their gradients

    def launches(self) -> list[NamedTuple]:
        """What the package would launch: forward, then backward with every gradient."""
        from pm_kernels.attention import Attention
        from pm_kernels.attention_plan import plan_backward, plan_forward
        from pm_kernels.runtime import padded

        device, dtype = _device(self.target), getattr(torch, self.dtype)
        batch, heads = 256, 6
        qkv = torch.empty(batch, self.tokens, 3, heads, self.width, dtype=dtype, device="meta")
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        keys = self.merged or self.tokens
        merge = padded(torch.empty(self.merged, self.tokens, dtype=dtype, device="meta")) if self.merged else None
        gate = torch.empty(batch, heads, keys, device="meta") if self.extras else None
        call = Attention(q, k, v, merge, gate, gate, None, self.merge_queries)
        forward = plan_forward(device, call)
        out, lse = forward.results
        wanted = (self.merged is not None, self.extras, self.extras)
        return forward.launches + plan_backward(device, call, torch.empty_like(out), out, lse, wanted).launches


class MixCase(NamedTuple):
    """One transition whose kernels are compiled."""

    target: int
    dtype: str
    width: int
    matrix: str  # sparse or dense
    extras: bool  # with the LayerNorm, carried rows, and an update

    def launches(self) -> list[NamedTuple]:
        """What the package would launch: forward, then backward with every gradient."""
        from pm_kernels import ByColumn, SparseRows
        from pm_kernels.mixing import Mix
        from pm_kernels.mixing_plan import plan_backward, plan_forward
        from pm_kernels.runtime import padded

        device, batch, rows, kept = _device(self.target), 256, 137, 118 if self.extras else 137
        entries = 192

        def floating(*shape: int) -> torch.Tensor:
            return torch.empty(*shape, dtype=getattr(torch, self.dtype), device="meta")

        def integers(count: int) -> torch.Tensor:
            return torch.empty(count, dtype=torch.int32, device="meta")

        x, rest = floating(batch, kept, self.width), floating(batch, rows - kept, self.width) if self.extras else None
        matrix = padded(floating(rows, rows))
        if self.matrix == "sparse":
            by_column = ByColumn(integers(rows), integers(entries), integers(entries))
            matrix = SparseRows(integers(rows), integers(entries), floating(entries), by_column)
        weight = torch.empty(self.width, device="meta")
        norm = (weight, weight, 1e-6) if self.extras else None
        call = Mix(x, x if self.extras and self.matrix == "sparse" else None, rest, matrix, norm, kept, kept)
        forward = plan_forward(device, call)
        gradients = (x, rest, x if self.extras else None)
        backward = plan_backward(device, call, gradients, x, kept, rows, (True, True, self.extras))
        return forward.launches + backward.launches


class MatchCase(NamedTuple):
    """One call of match whose kernel is compiled."""

    target: int
    dtype: str
    width: int
    extras: bool  # with the LayerNorm, an update and the roots of sizes, as models have it

    def launches(self) -> list[NamedTuple]:
        """What the package would launch, for any number of tokens."""
        from pm_kernels.matching import Match
        from pm_kernels.matching_plan import plan

        device = _device(self.target)
        x = torch.empty(256, 197, self.width, dtype=getattr(torch, self.dtype), device="meta")
        weight, sizes = torch.empty(self.width, device="meta"), torch.empty(256, 197, device="meta")
        norm = (weight, weight, 1e-6) if self.extras else None
        call = Match(x, sizes, 120, 1, 3, x if self.extras else None, norm, root_sizes=self.extras)
        return plan(device, call).launches


Case = AttentionCase | MixCase | MatchCase


def _device(target: int) -> NamedTuple:
    from pm_kernels.runtime import Device

    torch.set_float32_matmul_precision("high")
    return Device(target, TARGETS[target].multiprocessors, TARGETS[target].shared_per_program)


def cases(
    targets: Iterable[int], dtypes: Iterable[str], head_widths: Iterable[int], widths: Iterable[int]
) -> Iterator[Case]:
    """Attention at every length of the tables, plain, merged, and with the queries left unmerged; mixes; matching."""
    for target, dtype, extras in itertools.product(targets, dtypes, (False, True)):
        for width in head_widths:
            for tokens in LENGTHS:
                yield AttentionCase(target, dtype, width, tokens, None, True, extras)
            for merged in MERGED:
                for merge_queries in (True, False):
                    tokens = 197 if merged <= 256 else 1601
                    yield AttentionCase(target, dtype, width, tokens, merged, merge_queries, extras)
        for width in widths:
            for matrix in ("sparse", "dense"):
                yield MixCase(target, dtype, width, matrix, extras)
            yield MatchCase(target, dtype, width, extras)


def report(task: tuple[Case, int]) -> dict:
    """One launch of a case, compiled."""
    case, index = task
    launch = case.launches()[index]
    facts = {"target": f"sm_{case.target}", "dtype": case.dtype, "width": case.width, "extras": case.extras}
    return facts | compile_for(TARGETS[case.target], launch)


def tasks(chosen: Iterable[Case]) -> list[tuple[Case, int]]:
    """The launches of all cases, each kernel that the compiler sees once."""
    found = {}
    for case in chosen:
        for index, launch in enumerate(case.launches()):
            found.setdefault((case.target, case.dtype, _compiled_in(launch)), (case, index))
    return list(found.values())


def largest(found: Iterable[tuple[Case, int]]) -> list[tuple[Case, int]]:
    """Of each kernel the last launch for each target, with a merge matrix and without: that with most of all."""
    last = {}
    for case, index in found:
        launch = case.launches()[index]
        last[case.target, case.dtype, launch.kernel.__name__, launch.arguments.get("p_merge") is None] = case, index
    return list(last.values())


def _compiled_in(launch: NamedTuple) -> tuple:
    """What makes a kernel another one for the compiler: its constants, and which pointers are given."""
    given = ((name, value if name.isupper() else value is not None) for name, value in sorted(launch.arguments.items()))
    return launch.kernel.__name__, launch.warps, launch.stages, *given


def compile_for(target: Target, launch: NamedTuple) -> dict:
    """Compile one launch for a target and count what it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = _signature(launch)
    compiled = triton.compile(
        ASTSource(launch.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", target.family, 32),
        options=launch.options,
    )
    usage, instructions = _disassembled(compiled.asm["cubin"])
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    shared = compiled.metadata.shared
    threads = 32 * launch.warps
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    resident = min(
        target.registers // (-(-registers // 8) * 8 * threads),
        target.shared // (shared + 1024),
        target.threads // threads,
        target.programs,
        target.tensor_memory // columns if columns else target.programs,
    )
    blocks = {
        name: value
        for name, value in launch.arguments.items()
        if name in ("PIECES", "ROWS", "COLUMNS", "STEP", "KEYS", "TOKENS", "SOURCES", "TARGETS", "CHUNK")
    }
    return {
        "kernel": launch.kernel.__name__,
        "blocks": blocks,
        "merging": launch.arguments.get("p_merge") is not None,
        "warps": launch.warps,
        "stages": launch.stages,
        "registers": registers,
        "stack": stack,
        "spills": instructions["LDL"] + instructions["STL"],
        "narrow_loads": instructions["LDG.E.U16"],
        "shared": shared,
        "tensor_memory": columns,
        "resident": resident,
        "matrix": {name: instructions[name] for name in ("HGMMA", "UTCHMMA", "HMMA") if instructions[name]},
    }


def _signature(launch: NamedTuple) -> tuple[dict, dict, dict]:
    """Types, compiled-in values and alignments of the arguments, as Triton takes them from a call."""
    kinds = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        aligned = False
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + kinds[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        else:
            signature[parameter.name] = "fp32"
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _disassembled(cubin: bytes) -> tuple[str, collections.Counter]:
    """The resource usage that cuobjdump prints, and how often each instruction that matters here occurs."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    return usage, collections.Counter(re.findall(r"\b(HGMMA|UTCHMMA|HMMA|LDL|STL|LDG\.E\.U16)\b", code))


def reports(chosen: Iterable[tuple[Case, int]]) -> Iterator[dict]:
    """:func:`report` of every one of these launches, on all processors."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(mp_context=context, initializer=_without_interpreter) as pool:
        yield from pool.map(report, chosen)


def _without_interpreter() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def row(record: dict) -> str:
    """One line of the printed table."""
    blocks = " ".join(f"{name.lower()} {'+'.join(map(str, v)) if isinstance(v, (tuple, list)) else v}"
                      for name, v in record["blocks"].items())  # fmt: skip
    matrix = " ".join(f"{name}:{count}" for name, count in record["matrix"].items())
    return (
        f"{record['target']:6} {record['dtype']:8} {record['width']:4} {record['kernel']:18} {blocks:44} "
        f"{'merge' if record['merging'] else '':5} {'extras' if record['extras'] else '':6} "
        f"{record['warps']:2}w {record['stages']}s {record['registers']:4} {record['stack']:5} {record['spills']:5} "
        f"{record['shared'] / 1024:5.0f}K {record['resident']:2} {matrix}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.resources", description=__doc__.split("\n")[0])
    parser.add_argument("--target", type=int, choices=TARGETS, nargs="+", default=list(TARGETS))
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--head-width", type=int, nargs="*", default=list(HEAD_WIDTHS), help="of attention")
    parser.add_argument("--width", type=int, nargs="*", default=list(WIDTHS), help="of tokens that are mixed")
    parser.add_argument("--largest", action="store_true", help="of each kernel only the largest")
    parser.add_argument("--output", type=Path, default=None, help="write the records to a JSON file")
    chosen = parser.parse_args(arguments)
    print("target, dtype, width, kernel, blocks, options, warps, stages, registers, stack, spills, shared memory, "
          "resident programs, matrix instructions")  # fmt: skip
    records, launches = [], tasks(cases(chosen.target, chosen.dtype, chosen.head_width, chosen.width))
    for record in reports(largest(launches) if chosen.largest else launches):
        records.append(record)
        print(row(record), flush=True)
    spilled = [record for record in records if record["stack"]]
    print(f"{len(records)} kernels compiled, {len(spilled)} with a stack")
    if chosen.output is not None:
        results.write(chosen.output, {}, records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
