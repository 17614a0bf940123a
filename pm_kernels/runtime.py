"""What every op runs on: the backend, the device that kernels are planned for, known calls, registration."""

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from .launches import Plan, Prepared

CHUNK = 32  # columns of a matrix that a kernel takes at a time
_PLAIN = {Tensor, torch.nn.Parameter}
_BACKENDS = ("auto", "triton", "reference")
_backend = "auto"


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
        global _backend
        if name not in _BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(map(repr, _BACKENDS))}, got {name!r}")
        self._previous, _backend = _backend, name

    def __enter__(self) -> "backend":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _backend
        _backend = self._previous


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


INTERPRETER = Device(family=90, multiprocessors=1, shared=2**30, interpreter=True)


def target(tensor: Tensor) -> Device | None:
    """The device whose kernels run on a tensor like this one, by the backend that is set; ``None``: PyTorch runs.

    It is looked up in this module at every call, so a tool can put another device in its place.
    """
    if _backend == "reference" or (_backend == "auto" and not tensor.is_cuda):
        return None
    return _device(tensor)


def kernel_device(tensor: Tensor) -> Device | None:
    """The device for an operator that has been called: by now, in its backward, the backend may be another one."""
    device = target(tensor)
    return _device(tensor) if device is None else device


def _device(tensor: Tensor) -> Device | None:
    if tensor.is_cuda:
        return _gpu(tensor.device)
    return INTERPRETER if tensor.device.type == "cpu" and tensor.dtype != torch.bfloat16 and _interpreted() else None


@torch.compiler.assume_constant_result
def _gpu(device: torch.device) -> Device | None:
    return _properties(device)


@functools.cache
def _properties(device: torch.device) -> Device | None:
    """The device, planned for by what its architecture has in common with another's."""
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 8 or not _installed():
        return None
    family = {9: 90, 10: 100}.get(properties.major, 80)
    return Device(family, properties.multi_processor_count, properties.shared_memory_per_block_optin)


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1" and _installed()


def _installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # a module of that name is there, but has no spec
        return False


@torch.compiler.assume_constant_result
def full_precision() -> bool:
    """Whether PyTorch is set to take float32 products at full precision, without a matrix unit."""
    return torch.get_float32_matmul_precision() == "highest"


def precision(x: Tensor) -> str:
    """How products of float32 are taken, by PyTorch's own setting for matrix products; of no meaning for others."""
    return "ieee" if x.dtype == torch.float32 and full_precision() else "tf32"


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast has on for the tensor's device; ``None`` where it is off, or knows no such device."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A floating-point tensor as autocast takes it into a matmul: float64 and all that is no such tensor stay."""
    taken = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if taken else value


class Call(Protocol):
    """The arguments of an op: a NamedTuple whose first field is a tensor; others are tensors, tuples, options."""

    def check(self, op: str) -> None:
        """Raise a ValueError or TypeError that names what is wrong, or return."""

    def cast(self, dtype: torch.dtype) -> "Call":
        """The call under autocast."""

    def supported(self) -> bool:
        """Whether there is a kernel for its dtype and shape."""

    def faster(self) -> bool:
        """Whether the kernel is faster on a GPU than PyTorch's own operators."""


class Known:
    """What is known of calls of one kind: where they run and, after the first on kernels, how to launch them again."""

    def __init__(self, device: Device | None) -> None:
        self.device = device
        self._prepared: Prepared | None = None

    def repeat(self, tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None] | None:
        """The results for the tensors of another call of the kind. None: it has to be planned."""
        return None if self._prepared is None else self._prepared.run(tensors)

    def run(self, plan: Plan, tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Run what was planned for the tensors, and keep it where it can be repeated."""
        compiled = [launch.run() for launch in plan.launches]
        if not self.device.interpreter and all(kernel is not None for kernel in compiled):
            self._prepared = Prepared.of(plan, compiled, tensors)
        return plan.results


KNOWN: dict[tuple, Known] = {}


def settle(call: Call, op: str | None = None) -> tuple[Call, Known, str]:
    """Check a call and choose where it runs: once for all calls of the same shapes, strides, dtypes and options.

    Args:
        call: an op's arguments.
        op: the public function's name; ``None`` for a registered operator, which kernels were chosen for before.

    Returns:
        The call, in autocast's dtype where that is on; what is known of its kind; and how to run its kernels:
        ``"launch"`` them, or ``"record"`` that for a backward, or, where a compiler, a tracer or a dispatch mode has to
        see it, ``"dispatch"`` the registered operator.
    """
    x, device, key, how = call[0], None, None, "dispatch"
    if isinstance(x, Tensor):
        kind = x.device.type
        if op is not None and kind != "meta" and torch.is_autocast_enabled(kind):
            call = call.cast(torch.get_autocast_dtype(kind))
            x = call[0]
        device = target(x) if op is not None else kernel_device(x)
    if not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        key, known, recorded = _find(call, op, device)
        if key is not None and not is_in_torch_dispatch_mode():
            how = "record" if recorded and torch.is_grad_enabled() else "launch"
        if known is not None:
            return call, known, how
    if op is not None:
        call.check(op)
    return call, _new(key, _chosen(call, op, device)), how


def settle_backward(*arguments: Any) -> Known:
    """What is known of backwards of the kind of these arguments, the first a tensor: their forward ran on kernels."""
    device = kernel_device(arguments[0])
    key, known, _ = _find(arguments, "backward", device)
    return known or _new(key, device)


def _find(arguments: Sequence[Any], op: str | None, device: Device | None) -> tuple[tuple | None, Known | None, bool]:
    """The key of calls of this kind, if there can be one; what is known of them; whether they ask for a gradient."""
    key, recorded = [op, device, _backend, torch.get_float32_matmul_precision()], False
    try:
        values = list(arguments)
        for value in values:
            if type(value) in _PLAIN:
                offset = 0 if device is None else value.data_ptr() % 16
                key.append((value.shape, value.stride(), value.dtype, value.device, offset))
                recorded = recorded or value.requires_grad
            elif isinstance(value, tuple):
                key.append(type(value))
                values += value
            elif isinstance(value, Tensor):
                return None, None, False  # a kind of tensor that may do anything
            else:
                key.append(value)
        key = tuple(key)
        return key, KNOWN.get(key), recorded
    except (RuntimeError, TypeError):  # a tensor without memory, symbolic sizes, or what is no argument at all
        return None, None, False


def _new(key: tuple | None, device: Device | None) -> Known:
    known = Known(device)
    if key is not None:
        if len(KNOWN) >= 4096:
            KNOWN.clear()
        KNOWN[key] = known
    return known


def _chosen(call: Call, op: str | None, device: Device | None) -> Device | None:
    """The device, or ``None`` where PyTorch runs the call.

    Raises:
        RuntimeError: the backend is ``"triton"``, and there is no kernel for this dtype, shape or device.
    """
    supported = call.supported()
    if _backend != "triton" and op is not None:
        return device if supported and call.faster() else None
    x = call[0]
    if not supported:
        problem = f"there is none for {x.dtype} tensors of shape {tuple(x.shape)}"
    elif device is not None:
        return device
    elif x.is_cuda:
        problem = "it needs the triton package and a GPU of compute capability 8.0 or newer"
    elif x.device.type == "cpu" and _interpreted():
        problem = "Triton's interpreter computes bfloat16 wrongly; take float32 or float16"
    else:
        problem = (
            f"it needs CUDA tensors, got {x.device.type}; on CPU tensors kernels run in Triton's interpreter "
            "only, with TRITON_INTERPRET=1 set before Python starts"
        )
    raise RuntimeError(
        f"backend 'triton' cannot run the kernel of {op or type(call).__name__}: {problem}; or choose backend 'auto'"
    )


def check_tensor(name: str, value: Any, like: Tensor | None = None, of: str = "", dtype: bool = True) -> None:
    """A floating-point tensor, on the device of ``like``, which is the argument ``of``, and of its dtype.

    Raises:
        TypeError: it is no tensor, not floating point, or of another dtype.
        ValueError: it is on another device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, the device of {of}, got {value.device}")
    if like is not None and dtype and value.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of {of}, {like.dtype}, got {value.dtype}")


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Make the tensor's GPU the current one, where it is not, as Triton launches on the current one."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def padded(matrix: Tensor) -> Tensor:
    """A matrix with zeros after its last column, up to a multiple of CHUNK, for wide loads."""
    missing = -matrix.shape[1] % CHUNK
    return F.pad(matrix, (0, missing)) if missing else matrix.contiguous()


# Operators have the package's name, so that copies of it under other names can be loaded beside it.
_NAMESPACE = __package__.replace(".", "_")
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")


def register(
    schema: str,
    kernel: Callable,
    fake: Callable,
    recorded: type[torch.autograd.Function] | str,
    flops: Callable[..., int],
) -> torch._ops.OpOverload:
    """Register an operator, so that compilers, export, CUDA graphs and the FLOP counter see one node.

    Args:
        schema: name, arguments and results.
        kernel: the implementation, on CPU and CUDA tensors.
        fake: the same without memory.
        recorded: the operator under autograd, which costs a third of what torch.library.register_autograd does per
            call: a function of what is known of the call, or None, and the arguments. Or what to say where its results
            are differentiated.
        flops: floating-point operations of the arguments.
    """
    _LIBRARY.define(schema)
    name = schema.split("(")[0]
    packet = getattr(getattr(torch.ops, _NAMESPACE), name)
    op = packet.default
    function = _refused(op, recorded) if isinstance(recorded, str) else recorded

    def under_autograd(*arguments: object) -> object:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            return function.apply(None, *arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, kernel, key)
    _LIBRARY.impl(name, under_autograd, "Autograd")
    torch.library.register_fake(op, fake, lib=_LIBRARY)
    register_flop_formula(packet, get_raw=True)(lambda *arguments, out_val=None: flops(*arguments))
    return op


def _refused(op: torch._ops.OpOverload, problem: str) -> type[torch.autograd.Function]:
    class Refused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: FunctionCtx, _: None, *arguments: object) -> object:
            with torch._C._AutoDispatchBelowAutograd():
                return op(*arguments)

        @staticmethod
        def backward(ctx: FunctionCtx, *gradients: Tensor | None) -> None:
            raise RuntimeError(f'{problem}; choose pm_kernels.backend("reference") for second derivatives')

    return Refused
