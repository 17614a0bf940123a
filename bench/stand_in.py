"""A GPU that is not there: Triton compiles for it and launches on it, and nothing runs.

What Python does between a call and the launch can be measured, and looked at, on any machine.
"""

import collections
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from pm_kernels import backend, runtime

from .resources import TARGETS


class StandIn:
    """Triton's view of a device of one family, whose last launches are kept in ``launched``."""

    def __init__(self, family: int) -> None:
        self._family = family
        self.launched: collections.deque[tuple] = collections.deque(maxlen=16)
        self.utils = self

    def get_current_device(self) -> int:
        return self._family  # Triton keeps what it compiled by device, and no GPU must find what runs nothing

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._family, 32)

    def get_device_properties(self, device: int) -> dict:
        target = TARGETS[self._family]
        return {"max_shared_mem": target.shared_per_program, "multiprocessor_count": target.multiprocessors}

    def load_binary(self, *_: object) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, threads that fit."""
        return 0, 0, 0, 0, 1024

    def unload_module(self, *_: object) -> None:
        """Nothing was loaded."""

    def launcher_cls(self, *_: object) -> object:
        return lambda *arguments: driver.active.launched.append(arguments)  # it outlives the stand-in that made it


@contextmanager
def stand_in(family: int = 90) -> Iterator[StandIn]:
    """Kernels on CPU tensors are launched on a stand-in. Not where Triton's interpreter is chosen."""
    target = TARGETS[family]
    device, before = runtime.Device(family, target.multiprocessors, target.shared_per_program), runtime.target
    standing = StandIn(family)
    driver.set_active(standing)
    runtime.target = lambda tensor: device
    try:
        with torch.no_grad(), backend("triton"):
            yield standing
    finally:
        runtime.target = before
        driver.set_active(None)  # Triton looks for its own again when it needs one
