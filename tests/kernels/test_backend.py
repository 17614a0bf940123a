"""Choosing the implementation, and importing without a GPU or Triton."""

import subprocess
import sys

import pytest
import torch

from pm_kernels import backend, reference, token_mix


def test_reference_and_auto_run_on_the_cpu():
    x, matrix = torch.randn(2, 5, 6), torch.randn(4, 5)
    expected = reference.token_mix(x, matrix)
    with backend("reference"):
        assert torch.equal(token_mix(x, matrix), expected)
    assert torch.equal(token_mix(x, matrix), expected)


def test_triton_without_a_kernel_is_a_clear_error():
    with backend("triton"), pytest.raises(RuntimeError, match=r"kernel of token_mix: there is none for torch.float64"):
        token_mix(torch.randn(2, 5, 6).double(), torch.randn(4, 5).double())


def test_the_setting_outlasts_the_call_and_ends_with_the_block():
    x, matrix = torch.randn(2, 5, 6).double(), torch.randn(4, 5).double()
    backend("triton")
    try:
        with backend("reference"):
            token_mix(x, matrix)
        with pytest.raises(RuntimeError):
            token_mix(x, matrix)
    finally:
        backend("auto")
    token_mix(x, matrix)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'triton', 'reference', got 'cuda'"):
        backend("cuda")


def test_imports_and_runs_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, pm_kernels, pm_models\n"
        "assert pm_kernels.token_mix(torch.ones(1, 2, 3), torch.ones(1, 2)).sum() == 6"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
