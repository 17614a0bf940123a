"""Which implementation the ops run: the Triton kernels or the PyTorch reference."""

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .launch import Device

_BACKENDS = ("auto", "triton", "reference")
_current = "auto"


class backend:
    """Choose the implementation of every op, from here on or for a ``with`` block.

    Args:
        name: ``"auto"`` takes the fastest implementation that the tensors' device has; ``"triton"`` insists on
            the Triton kernels, which on CPU tensors run in Triton's interpreter where ``TRITON_INTERPRET=1`` is set
            before Python starts; ``"reference"`` runs the PyTorch specification.

    Raises:
        ValueError: ``name`` is none of the three.

    Example::

        backend("reference")            # from here on
        with backend("reference"):      # for this block
            out = fused_merge_attention(q, k, v)
    """

    def __init__(self, name: str) -> None:
        global _current
        if name not in _BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(map(repr, _BACKENDS))}, got {name!r}")
        self._previous, _current = _current, name

    def __enter__(self) -> "backend":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _current
        _current = self._previous


def use_kernels(op: str, tensor: Tensor, supported: bool, faster: bool) -> bool:
    """Whether ``op`` runs its kernels on tensors like ``tensor``.

    Args:
        op: its name, for the message.
        tensor: any of the op's inputs.
        supported: there are kernels for this dtype and shape.
        faster: they are the fastest implementation on a GPU.

    Raises:
        RuntimeError: the backend is ``"triton"``, and there is no kernel for this dtype, shape or device.
    """
    if _current == "reference" or (_current == "auto" and not (faster and supported and tensor.is_cuda)):
        return False
    if _current == "auto":
        return _has_kernels(tensor.device)
    if not supported:
        problem = f"there is none for {tensor.dtype} tensors of shape {tuple(tensor.shape)}"
    elif tensor.is_cuda:
        if _has_kernels(tensor.device):
            return True
        problem = "it needs the triton package and a GPU of compute capability 8.0 or newer"
    elif tensor.device.type != "cpu" or not _interpreted():
        problem = (
            f"it needs CUDA tensors, got {tensor.device.type}; on CPU tensors kernels run in Triton's interpreter "
            "only, with TRITON_INTERPRET=1 set before Python starts"
        )
    elif tensor.dtype == torch.bfloat16:
        problem = "Triton's interpreter computes bfloat16 wrongly; take float32 or float16"
    else:
        return True
    raise RuntimeError(f"backend 'triton' cannot run the kernel of {op}: {problem}; or choose backend 'auto'")


def kernel_device(tensor: Tensor) -> "Device | None":
    """What to plan an operator's launches for, or None where it is written out in PyTorch.

    An operator does not ask for the backend, which may be another one by the time of its backward.
    """
    interpreted = tensor.device.type == "cpu" and tensor.dtype != torch.bfloat16 and _interpreted()
    if not (tensor.is_cuda or interpreted):
        return None
    from .launch import INTERPRETER, cuda_device

    return cuda_device(tensor.device.index) if tensor.is_cuda else INTERPRETER


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Make the tensor's GPU the current one, where it is not, as Triton launches on the current one."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


@torch.compiler.assume_constant_result
def full_precision() -> bool:
    """Whether PyTorch is set to take float32 products at full precision, without a matrix unit."""
    return torch.get_float32_matmul_precision() == "highest"


@torch.compiler.assume_constant_result
def _has_kernels(device: torch.device) -> bool:
    return _runs_kernels(device)


@functools.cache
def _runs_kernels(device: torch.device) -> bool:
    return _installed() and torch.cuda.get_device_capability(device) >= (8, 0)


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1" and _installed()


def _installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # a module of that name is there, but has no spec
        return False
