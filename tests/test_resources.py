"""What the compiler makes of the kernels, for GPUs that need not be there, and what Triton is called with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from covering import REST

WITHOUT_PRODUCTS = {"gather_forward", "gather_backward", "norm_backward"}
ROOT = Path(__file__).parents[1]
REPORT = json.loads((ROOT / "bench" / "results" / "static" / "resources.json").read_text(encoding="utf-8"))
triton = pytest.importorskip("triton")


def run(*command):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def records(tmp_path_factory, tries):
    """The kernels that the tables pick for DeiT-S in bfloat16; its heads of 64 are those of most ViTs."""
    path = tmp_path_factory.mktemp("report") / "resources.json"
    chosen = ["--dtype", "bfloat16", "--head-width", "64", "--width", "384", "--output", path]
    printed = run("-m", "bench.resources", *chosen, *(["--largest", "--target", "90"] if tries == "few" else []))
    records = json.loads(path.read_text())["records"]
    with_stack = sum(record["stack"] > 0 for record in records)
    assert f"{len(records)} kernels compiled, {with_stack} with a stack" in printed
    return records


@pytest.mark.fuzz
@pytest.mark.parametrize("target", [pytest.param("sm_80", marks=REST), "sm_90", pytest.param("sm_100", marks=REST)])
def test_every_kernel_is_compiled(records, target):
    kernels = {record["kernel"] for record in records if record["target"] == target}
    assert kernels == {
        "forward_resident",
        "forward_streaming",
        "backward_resident",
        "backward_queries",
        "backward_keys",
        "mix",
        "matrix_gradient",
        "gather_forward",
        "gather_backward",
        "norm_backward",
        "match",
    }


def test_no_kernel_of_the_report_spills():
    assert not [record for record in REPORT["records"] if record["stack"] or record["spills"]]


@pytest.mark.fuzz
def test_kernels_spill_no_more_than_in_the_report(records):
    """Another compiler than the report's may lay out registers otherwise, and put a few values of 4 bytes aside."""
    most = 0 if triton.__version__ == REPORT["triton"] else 32
    assert not [record for record in records if record["stack"] > most]


@pytest.mark.fuzz
def test_every_kernel_fits(records):
    assert not [record for record in records if record["resident"] < 1 or record["tensor_memory"] > 512]


@pytest.mark.fuzz
def test_matrix_products_take_the_fast_path(records):
    products = [record for record in records if record["kernel"] not in WITHOUT_PRODUCTS]
    hopper = [record["matrix"] for record in products if record["target"] == "sm_90"]
    assert all(matrix["HGMMA"] > 0 and "HMMA" not in matrix for matrix in hopper)
    blackwell = [record["matrix"] for record in products if record["target"] == "sm_100"]
    assert all(matrix["UTCHMMA"] > 0 for matrix in blackwell)


@pytest.mark.fuzz
def test_half_precision_is_not_loaded_number_by_number(records):
    """Where the compiler cannot tell that a mask or an address goes by 16 bytes, it gives a warp 16 loads for one."""
    products = [record for record in records if record["kernel"] not in WITHOUT_PRODUCTS]
    assert not [record for record in products if record["narrow_loads"]]


REPEATED = """
import torch
from bench.stand_in import stand_in
from pm_kernels import fused_merge_attention
from pm_kernels.runtime import KNOWN

def inputs(offset=0):
    qkv = torch.empty(2 * 9 * 3 * 2 * 16 + 8, dtype=torch.float16)[offset : offset + 2 * 9 * 3 * 2 * 16]
    return qkv.view(2, 9, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)

def same(before, after):
    if isinstance(before, torch.Tensor):
        return (before.shape, before.stride(), before.dtype) == (after.shape, after.stride(), after.dtype)
    return before is after or before == after

gate, bias, merge = torch.ones(9), torch.zeros(2, 2, 9), torch.ones(5, 9, dtype=torch.float16)
kept = []  # so that no memory is used twice
with stand_in() as device:
    for options in (
        {},
        {"gate": gate},
        {"key_bias": bias, "scale": 0.5},
        {"merge": merge},
        {"merge": merge, "merge_queries": False},
    ):
        for offset in (0, 8, 1):
            # What one tensor in three places prepares must serve three tensors, and the other way round.
            fused_merge_attention(*3 * [inputs(offset)[0]], **options)
            device.launched.clear()
            for planned in (False, True, False):
                if planned:
                    KNOWN.clear()
                kept.append(own := inputs(offset))
                kept.append((fused_merge_attention(*own, **options),))
                addresses = {x.data_ptr() for x in device.launched[-1] if isinstance(x, torch.Tensor)}
                assert {x.data_ptr() for x in kept[-1] + own} <= addresses
                assert len(addresses) == 5 + len({"gate", "key_bias", "merge"} & set(options))
            # LazyDict is what a profiler is told of one launch.
            launched = [[x for x in launch if type(x).__name__ != "LazyDict"] for launch in device.launched]
            assert len(launched) == 3 and len({len(launch) for launch in launched}) == 1
            for launch in launched[1:]:
                assert all(map(same, launched[0], launch))
    KNOWN.clear()
    for options in ({}, {"scale": 0.5}, {"gate": gate}, {"merge": merge}):
        for offset in (0, 8, 1):
            fused_merge_attention(*inputs(offset), **options)
    assert len(KNOWN) == 4 * 2, len(KNOWN)  # options, and alignments
print("as the first")
"""


def test_a_repeated_call_launches_as_the_first_one_did():
    """The second call takes a shorter way to the launch; it must hand over the same, but for the tensors."""
    assert run("-c", REPEATED).strip() == "as the first"


REPEATED_MIX = """
import torch
from bench.stand_in import stand_in
from pm_kernels import SparseRows, transition
from pm_kernels.runtime import KNOWN

def tensor(*shape, offset=0):
    return torch.empty(torch.Size(shape).numel() + 8, dtype=torch.float16)[offset:-8 + offset or None].view(shape)

def same(before, after):
    if isinstance(before, torch.Tensor):
        return (before.shape, before.stride(), before.dtype) == (after.shape, after.stride(), after.dtype)
    return before is after or before == after

dense = torch.eye(32, dtype=torch.float16)
matrices = {"sparse": SparseRows.from_dense(dense), "dense": dense}
weight, bias = torch.ones(16), torch.zeros(16)
kept = []  # so that no memory is used twice
with stand_in() as device:
    for kind, matrix in matrices.items():
        for norm in (None, (weight, bias, 1e-6)):
            for carried in (0, 9):
                for offset in (0, 8, 1):
                    device.launched.clear()
                    for planned in (False, True, False):
                        if planned:
                            KNOWN.clear()
                        x = tensor(2, 32 - carried, 16, offset=offset)
                        rest = tensor(2, carried, 16, offset=offset) if carried else None
                        update = torch.empty_like(x) if kind == "sparse" else None
                        results = transition(x, rest, matrix, 32 - carried, update=update, norm=norm)
                        tensors = [t for t in (x, rest, update, *results) if t is not None]
                        kept.append(tensors)
                        addresses = {t.data_ptr() for t in device.launched[-1] if isinstance(t, torch.Tensor)}
                        assert {t.data_ptr() for t in tensors} <= addresses
                    launched = [[t for t in launch if type(t).__name__ != "LazyDict"] for launch in device.launched]
                    assert len(launched) == 3 and len({len(launch) for launch in launched}) == 1
                    for launch in launched[1:]:
                        assert all(map(same, launched[0], launch))
print("as the first", len(KNOWN))
"""


def test_a_repeated_mix_launches_as_the_first_one_did():
    assert run("-c", REPEATED_MIX).startswith("as the first")


REPEATED_MATCH = """
import torch
from bench.stand_in import stand_in
from pm_kernels import match, transition
from pm_kernels.launches import Prepared
from pm_kernels.runtime import KNOWN

runs, run = [], Prepared.run
Prepared.run = lambda self, tensors: runs.append(tensors) or run(self, tensors)
kept = []  # so that no memory is used twice
with stand_in() as device:
    for normed in (False, True):
        for _ in range(2):
            device.launched.clear()
            x, update = (torch.empty(2, 19, 16, dtype=torch.float16) for _ in range(2))
            sizes, norm = torch.empty(2, 19), (torch.empty(16), torch.empty(16), 1e-6) if normed else None
            matching = match(x, sizes, 11, update=update, norm=norm)
            results = transition(x, None, matching.matrix, update=update, norm=norm)
            matrix = matching.matrix
            given = [x, update, *(norm or ())[:2]]
            filled = [*matching[:3], *matrix[:3], *matrix.by_column[::2], sizes]
            kept.append((given, filled, results))
            matched, merged = (
                {t.data_ptr() for t in launch if isinstance(t, torch.Tensor)} for launch in device.launched
            )
            assert {t.data_ptr() for t in given + filled} <= matched
            assert {t.data_ptr() for t in [*given, *matrix[:3], *results] if t is not None} <= merged
assert len(runs) == 4 and len(KNOWN) == 4, (len(runs), len(KNOWN))
print("two launches")
"""


def test_a_merge_is_two_launches_and_is_repeated():
    """The match and the transition, with nothing between them; the second time as the first one prepared them."""
    assert run("-c", REPEATED_MATCH).strip() == "two launches"


TARGETS = """
import torch
from bench.stand_in import stand_in
from pm_kernels import fused_merge_attention_qkv
from pm_kernels.attention_kernels import forward_resident

qkv = torch.empty(2, 9, 3, 2, 16, dtype=torch.float16)
for family in (80, 90, 100, 80):
    with stand_in(family) as device:
        for count in (1, 2):
            fused_merge_attention_qkv(qkv)
            assert len(device.launched) == count, (family, device.launched)
        device.unload_module(None)
assert set(forward_resident.device_caches) == {80, 90, 100}, set(forward_resident.device_caches)
print("launched on each")
"""


def test_a_stand_in_takes_launches_of_its_own_target_and_leaves_nothing_for_a_gpu():
    assert run("-c", TARGETS).strip() == "launched on each"


PACKED = """
import torch
from bench.stand_in import stand_in
from pm_kernels import fused_merge_attention_qkv
from pm_kernels.launches import Prepared
from pm_kernels.runtime import KNOWN

runs, run = [], Prepared.run
Prepared.run = lambda self, tensors: runs.append(tensors) or run(self, tensors)

def launched():
    return {x.data_ptr() for x in device.launched[-1] if isinstance(x, torch.Tensor)}

kept = []  # so that no memory is used twice
with stand_in() as device:
    for recorded in (False, True):
        for _ in range(2):
            qkv = torch.empty(2, 9, 3, 2, 16, dtype=torch.float16, requires_grad=recorded)
            sizes = torch.empty(2, 1, 9)
            with torch.set_grad_enabled(recorded):
                out = fused_merge_attention_qkv(qkv, key_bias=sizes)
            assert out.requires_grad == recorded
            parts = [part.data_ptr() for part in (sizes, *qkv.unbind(2))]
            assert {out.data_ptr(), *parts} <= launched()
            if recorded:
                dout = torch.empty_like(out)
                (dqkv,) = torch.autograd.grad(out, qkv, dout)
                parts += [out.data_ptr(), dout.data_ptr(), *(part.data_ptr() for part in dqkv.unbind(2))]
                assert set(parts) <= launched()
            kept.append((qkv, sizes, out))
assert len(runs) == 4 and len(KNOWN) == 2, (len(runs), len(KNOWN))
print("prepared")
"""


def test_a_packed_projection_is_repeated_too_and_in_training():
    """The first call plans; later ones take up what it prepared, recorded for a backward or not, and so does that."""
    assert run("-c", PACKED).strip() == "prepared"
