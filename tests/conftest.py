"""Every test starts from the same random state. Without a GPU, kernels run in Triton's interpreter."""

import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

sys.path.append(str(Path(__file__).parents[1]))  # for bench, which is not installed

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # there is a process for each core already


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    AcceleratorState._reset_state(reset_partial_state=True)
