"""The package stands alone, as the Kernel Hub wants it: from any folder, several copies in one process."""

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import pm_kernels
from pm_kernels import backend

SOURCES = Path(pm_kernels.__file__).parent


def test_it_imports_only_itself_torch_and_triton():
    for path in SOURCES.glob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            found = re.match(r"\s*(?:from|import) (\S+)", line)
            if found:
                root = found[1].split(".")[0]
                assert root in {"", "torch", "triton"} | sys.stdlib_module_names, f"{path.name}: {line}"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_copy_under_another_name_runs_beside_it(tmp_path):
    """In the Kernel Hub's layout, build/torch-universal/<name>."""
    folder = tmp_path / "build" / "torch-universal" / "pm_kernels"
    shutil.copytree(SOURCES, folder, ignore=shutil.ignore_patterns("__pycache__"))
    spec = importlib.util.spec_from_file_location("pm_kernels_1a2b", folder / "__init__.py")
    copy = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = copy
    try:
        spec.loader.exec_module(copy)
        q, k, v = (torch.randn(1, 2, 9, 8) for _ in "qkv")
        expected = pm_kernels.fused_merge_attention(q, k, v)
        assert torch.equal(copy.fused_merge_attention(q, k, v), expected)
        assert hasattr(torch.ops.pm_kernels_1a2b, "attention")
        with backend("reference"):
            assert torch.equal(copy.token_mix(v[0], torch.eye(9)), v[0])
    finally:
        for name in [name for name in sys.modules if name.startswith(spec.name)]:
            del sys.modules[name]
