"""What the compiler makes of the kernels, for GPUs that need not be there, and what Triton is called with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest.importorskip("triton")


def run(*command):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Every kernel that the tables pick for bfloat16 heads of 64, the width of every DeiT and most ViTs."""
    path = tmp_path_factory.mktemp("report") / "resources.json"
    printed = run("-m", "bench.resources", "--dtype", "bfloat16", "--width", "64", "--output", path)
    records = json.loads(path.read_text())["records"]
    assert f"{len(records)} kernels compiled, 0 with a stack" in printed
    return records


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_every_kernel_is_compiled(records, target):
    kernels = {record["kernel"] for record in records if record["target"] == target}
    assert kernels == {
        "forward_resident",
        "forward_streaming",
        "backward_resident",
        "backward_queries",
        "backward_keys",
        "merge_tokens",
        "merge_gradient",
    }


def test_no_kernel_spills(records):
    assert not [record for record in records if record["stack"] or record["spills"]]


def test_every_kernel_fits(records):
    assert not [record for record in records if record["resident"] < 1 or record["tensor_memory"] > 512]


def test_matrix_products_take_the_fast_path(records):
    hopper = [record["matrix"] for record in records if record["target"] == "sm_90"]
    assert all(matrix["HGMMA"] > 0 and "HMMA" not in matrix for matrix in hopper)
    blackwell = [record["matrix"] for record in records if record["target"] == "sm_100"]
    assert all(matrix["UTCHMMA"] > 0 for matrix in blackwell)


REPEATED = """
import torch
from bench.stand_in import stand_in
from pm_kernels import fused_merge_attention

def inputs(offset=0):
    qkv = torch.empty(2 * 9 * 3 * 2 * 16 + 8, dtype=torch.float16)[offset : offset + 2 * 9 * 3 * 2 * 16]
    return qkv.view(2, 9, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)

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
            device.launched.clear()
            for _ in range(3):
                kept.append((inputs(offset), ))
                kept.append(fused_merge_attention(*kept[-1][0], **options))
            first, *repeated = device.launched
            for launch in repeated:
                assert len(launch) == len(first)
                changed = []
                for before, after in zip(first, launch):
                    if isinstance(before, torch.Tensor):
                        assert before.dtype == after.dtype
                        assert (before.shape, before.stride()) == (after.shape, after.stride())
                        changed.append(before is not after)
                    elif type(before).__name__ != "LazyDict":  # what a profiler is told of one launch
                        assert before is after or before == after, (before, after)
                assert sum(changed) >= 5  # q, k, v, out, lse
            own = [x.data_ptr() for x in (*kept[-2][0], kept[-1])]
            assert set(own) <= {x.data_ptr() for x in repeated[-1] if isinstance(x, torch.Tensor)}
    # Other shapes, strides, alignments and options are other launches, and each is planned once.
    from pm_kernels.attention_launch import _prepared
    assert len(_prepared) == 5 * 2, len(_prepared)
print("as the first")
"""


def test_a_repeated_call_launches_as_the_first_one_did():
    """The second call takes a shorter way to the launch; it must hand over the same, but for the tensors."""
    assert run("-c", REPEATED).strip() == "as the first"
