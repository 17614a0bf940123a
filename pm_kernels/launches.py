"""What a call launches, and how it is launched again: the plan of a kind of call, run and kept."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


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


class Plan(NamedTuple):
    """What a call launches, in order, and the memory that it fills, which every call has anew.

    Args:
        launches: the launches.
        results: what they fill, None where there is nothing.
        scratch: what passes between them.
    """

    launches: list[Launch]
    results: Sequence[Tensor | None]
    scratch: Sequence[Tensor] = ()


class Prepared:
    """A plan that ran, ready to run again on other tensors of the same dtypes, shapes, strides and alignments.

    It calls what Triton compiled for the first run: finding that anew costs ten times as much as the launch.
    """

    def __init__(self, memory: list[Callable[[], Tensor] | None], results: int, steps: list[tuple]) -> None:
        self._memory, self._results, self._steps = memory, results, steps

    @classmethod
    def of(cls, plan: Plan, compiled: Sequence[Any], tensors: Sequence[Tensor | None]) -> "Prepared | None":
        """None where a launch takes anything but views of these tensors and of the plan's own memory."""
        memory = [*plan.results, *plan.scratch]
        steps = []
        for launch, kernel in zip(plan.launches, compiled, strict=True):
            arguments = [launch.arguments[parameter.name] for parameter in launch.kernel.params]
            slots = []
            for position, argument in enumerate(arguments):
                if isinstance(argument, Tensor):
                    source = _source(argument, [*tensors, *memory])
                    if source is None:
                        return None
                    slots.append((position, *source))
                    arguments[position] = None
            steps.append((kernel[(launch.programs, 1, 1)], arguments, slots))
        return cls([None if x is None else _like(x) for x in memory], len(plan.results), steps)

    def run(self, tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Run on these tensors; returns the results."""
        memory = [None if empty is None else empty() for empty in self._memory]
        sources = [*tensors, *memory]
        for runner, constants, slots in self._steps:
            arguments = constants.copy()
            for position, index, view in slots:
                x = sources[index]
                if view is not None:
                    shape, strides, offset = view
                    x = x.as_strided(shape, strides, x.storage_offset() + offset)
                arguments[position] = x
            runner(*arguments)
        return memory[: self._results]


def _like(x: Tensor) -> Callable[[], Tensor]:
    return functools.partial(torch.empty_strided, x.shape, x.stride(), dtype=x.dtype, device=x.device)


def _source(x: Tensor, sources: Sequence[Tensor | None]) -> tuple[int, tuple | None] | None:
    """Which of the tensors x is, or is a view of: its index, and shape, strides and offset where it begins elsewhere.

    None where there is none, or where there may be others: what is one tensor today, or parts of one, may be several
    tomorrow.
    """
    same = [index for index, source in enumerate(sources) if source is x]
    if not same:
        place = x.untyped_storage().data_ptr()
        same = [i for i, y in enumerate(sources) if y is not None and y.untyped_storage().data_ptr() == place]
    if len(same) != 1:
        return None
    offset = x.storage_offset() - sources[same[0]].storage_offset()
    # Where a tensor begins is all that a kernel takes of it.
    return same[0], (x.shape, x.stride(), offset) if offset else None
