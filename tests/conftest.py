"""Every test starts from the same random state."""

import pytest
import torch
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    AcceleratorState._reset_state(reset_partial_state=True)
