"""Which implementation the ops run: the Triton kernels or the PyTorch reference."""

from types import TracebackType

from torch import Tensor

_BACKENDS = ("auto", "triton", "reference")
_current = "auto"


class backend:
    """Choose the implementation of every op, from here on or for a ``with`` block.

    Args:
        name: ``"auto"`` takes the fastest implementation that the tensors' device has; ``"triton"`` insists on
            the Triton kernels; ``"reference"`` runs the PyTorch specification.

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


def require_reference(op: str, tensor: Tensor) -> None:
    """Refuse a call of ``op`` that asks for a Triton kernel, of which there is none yet.

    Raises:
        RuntimeError: the backend is ``"triton"``.
    """
    if _current == "triton":
        raise RuntimeError(
            f"{op} has no Triton kernel in this version, so backend 'triton' cannot run it on a "
            f"{tensor.device.type} tensor; choose backend 'auto' or 'reference'"
        )
