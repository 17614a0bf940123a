"""Models as files that run without this package: ONNX, ``torch.export`` and AOTInductor."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .files import atomic_path
from .models import Model, frozen, input_size
from .unwrapping import unwrapped

FORMATS = {"onnx": ".onnx", "pt2": ".pt2", "aoti": ".pt2"}
_MOST_BYTES = 2**31 - 2**24  # of one ONNX file
_UNWANTED = ("Scatter", "Loop", "Scan", "If")  # what servers of ONNX are slow at, or lack
_INPUT, _OUTPUT = "images", "logits"


class Exported(NamedTuple):
    """A file that was written, and how its results differ from the model's.

    Args:
        path: the file.
        run: the file, loaded: images (B, 3, H, W) to logits, for any batch.
        max_error: the greatest difference to the model's logits over the greatest of these, on random images.
    """

    path: Path
    run: Callable[[Tensor], Tensor]
    max_error: float


def export_model(
    model: Model, path: str | os.PathLike, format: str, *, batch_size: int = 2, tolerance: float = 1e-3
) -> Exported:
    """Write a model, compressed or not, to a file for images of its size in batches of any number.

    The file is loaded and run once, on more images than it was made with, before it appears at ``path``.

    Args:
        model: a timm VisionTransformer or Eva, or a :class:`Segmenter`, on the device that the file is for (ONNX:
            any), or a wrapper of one (``torch.compile``, DistributedDataParallel, accelerate, ...). It is left as it
            was.
        path: of the file.
        format: ``"onnx"``, in float32, its token mixes as matrix products, with no scatter and no loop; ``"pt2"``, for
            ``torch.export.load``; ``"aoti"``, compiled for this machine, for ``torch._inductor.aoti_load_package``.
        batch_size: of the images that the model is traced with, at least 2; files take any batch.
        tolerance: the greatest ``max_error`` that is let pass.

    Raises:
        ValueError: ``format`` is unknown, the model is too large for one ONNX file, or its graph holds an operator that
            ONNX is not to have.
        ImportError: a package for ONNX is missing.
        RuntimeError: the file's results differ from the model's by more than ``tolerance``.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(map(repr, FORMATS))}, got {format!r}")
    if batch_size < 2:
        raise ValueError(f"batch_size must be at least 2, as a batch of 1 would be the only one, got {batch_size}")
    model = unwrapped(model)
    like = next(model.parameters())
    if format == "onnx":
        _check_onnx(model)
        model = copy.deepcopy(model).cpu().float()
    else:
        model = copy.deepcopy(model)
    model = frozen(model.eval().requires_grad_(False))
    device, dtype = ("cpu", torch.float32) if format == "onnx" else (like.device, like.dtype)
    images = torch.randn(batch_size + 1, *input_size(model), device=device, dtype=dtype)
    with torch.no_grad():
        expected = model(images)
    write = {"onnx": _write_onnx, "pt2": _write_pt2, "aoti": _write_aoti}[format]
    path = Path(path)
    with atomic_path(path) as temporary:
        # AOTInductor insists on the name's end.
        written = temporary.with_name(f"{temporary.name}{FORMATS[format]}")
        try:
            run = write(model, images[:-1], written)
            error = ((run(images) - expected).abs().max() / expected.abs().max()).item()
            if not error <= tolerance:
                raise RuntimeError(
                    f"the {format} file gives other logits than the model: they differ by {error:.3g} of the greatest, "
                    f"expected at most {tolerance:g}; nothing is written"
                )
            os.replace(written, temporary)
        finally:
            written.unlink(missing_ok=True)
    return Exported(path, run, error)


def _write_onnx(model: Model, images: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    import onnx

    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=[_INPUT],
        output_names=[_OUTPUT],
        verbose=False,
    )
    program.save(str(path), external_data=False)
    _check_operators(onnx.load(str(path), load_external_data=False))
    return load_onnx(path)


def _write_pt2(model: Model, images: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    torch.export.save(_exported(model, images), str(path))
    return torch.export.load(str(path)).module()


def _write_aoti(model: Model, images: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    torch._inductor.aoti_compile_and_package(_exported(model, images), package_path=str(path))
    return torch._inductor.aoti_load_package(str(path))


def _exported(model: Model, images: Tensor) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def load_onnx(path: str | os.PathLike, *, threads: int = 0) -> Callable[[Tensor], Tensor]:
    """An ONNX file in onnxruntime on the CPU, taking and giving tensors.

    ``threads`` is how many it may take; 0: as many as there are cores.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([_OUTPUT], {_INPUT: images.numpy()})[0])

    return run


def _check_onnx(model: nn.Module) -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"ONNX needs the packages onnx, onnxscript and onnxruntime: pip install '.[export]'; {error}"
        ) from error
    size = sum(4 * tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if size > _MOST_BYTES:
        raise ValueError(
            f"the model has {size / 2**30:.1f} GiB in float32, and one ONNX file holds 2; export it as pt2"
        )


def _check_operators(content: object) -> None:
    """Refuse what static matrices have no need for."""
    graphs = [content.graph, *content.functions]
    unwanted = {node.op_type for graph in graphs for node in graph.node if node.op_type.startswith(_UNWANTED)}
    if unwanted:
        raise ValueError(f"the ONNX graph has {', '.join(sorted(unwanted))}: a part of the model has no static form")
