"""A kernel launch as a value, and the device that it is planned for."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Device(NamedTuple):
    """What a plan needs to know of a device.

    Args:
        family: 80, 90 or 100, whose block sizes it takes.
        multiprocessors: how many programs run at once, at least.
        shared: bytes of shared memory that a program may have.
        interpreter: kernels run in Triton's interpreter, on a CPU.
    """

    family: int
    multiprocessors: int
    shared: int
    interpreter: bool = False


class Launch(NamedTuple):
    """One kernel, its number of programs, its arguments by name, and its options."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    warps: int
    stages: int

    def run(self) -> Any:
        """Run it; returns what Triton compiled, or None where there was nothing to run.

        Raises:
            ValueError: the grid is larger than a device takes.
        """
        if self.programs == 0:
            return None
        if self.programs >= 2**31:
            raise ValueError(f"{self.kernel.__name__} would need {self.programs} programs, more than 2^31 - 1")
        return self.kernel[(self.programs,)](**self.arguments, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        # Contraction of products and sums is asked for by name because its default changes between Triton's versions.
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


class Prepared:
    """A launch that ran, ready to run again on other tensors of the same dtypes, shapes, strides and alignments.

    It calls what Triton compiled for the first run: finding that anew costs ten times as much as the launch.

    Args:
        launch: the launch.
        compiled: what its :meth:`Launch.run` returned.
        names: the arguments that :meth:`run` is given, in that order; every tensor of the launch is one of them.
    """

    def __init__(self, launch: Launch, compiled: Any, names: Sequence[str]) -> None:
        self._runner = compiled[(launch.programs, 1, 1)]
        parameters = [parameter.name for parameter in launch.kernel.params]
        self._arguments = [None if name in names else launch.arguments[name] for name in parameters]
        self._slots = [(parameters.index(name), index) for index, name in enumerate(names) if name in parameters]

    def run(self, tensors: Sequence[torch.Tensor | None]) -> None:
        arguments = self._arguments.copy()
        for position, index in self._slots:
            arguments[position] = tensors[index]
        self._runner(*arguments)


class Repeats:
    """Calls of one launch each, kept by what they were planned for, to be run again on other tensors.

    Args:
        names: the arguments of the launches that are inputs and results of the call, in that order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._kept: dict[tuple, tuple[Prepared, Any]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        self._kept.clear()

    def find(self, key: tuple) -> tuple[Prepared, Any] | None:
        """What was kept under ``key``: the launch, and the shapes of its results."""
        return self._kept.get(key)

    def run(
        self, key: tuple, device: Device, launches: list[Launch], inputs: Sequence[torch.Tensor | None], shapes: Any
    ) -> None:
        """Run the launches, and keep the only one for calls of the same ``key``."""
        compiled = [launch.run() for launch in launches]
        launch, *others = launches
        # Only a launch that takes the inputs themselves, not copies, can be run again; the interpreter's cannot.
        taken = all(launch.arguments.get(name) is x for name, x in zip(self._names, inputs, strict=False))
        if taken and not others and compiled[0] is not None and not device.interpreter:
            if len(self._kept) >= 4096:
                self._kept.clear()
            self._kept[key] = Prepared(launch, compiled[0], self._names), shapes


def layout(tensor: torch.Tensor | None) -> tuple | None:
    """All that a launch is compiled and planned for, of one tensor."""
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16


INTERPRETER = Device(family=90, multiprocessors=1, shared=2**30, interpreter=True)


@functools.cache
def cuda_device(index: int) -> Device:
    """The device of that index, planned for by what its architecture has in common with another's."""
    properties = torch.cuda.get_device_properties(index)
    family = {9: 90, 10: 100}.get(properties.major, 80)
    return Device(family, properties.multi_processor_count, properties.shared_memory_per_block_optin)
