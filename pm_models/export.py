"""Export models to files that run without this package: ONNX, ``torch.export`` and AOTInductor."""

import copy
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .files import allow_default_mode, unfinished
from .models import Model, frozen, input_size
from .unwrapping import unwrapped

FORMATS = {"onnx": ".onnx", "pt2": ".pt2", "aoti": ".pt2"}
OPSETS = range(17, 24)  # of ONNX: the first with LayerNormalization to the newest that PyTorch exports
_LOWEST_OPSET = 18  # the lowest that PyTorch exports
_MOST_BYTES = 2**31 - 2**24  # in one ONNX file
_UNWANTED = ("Scatter", "Loop", "Scan", "If")  # operators that ONNX servers are slow at or lack
_INPUT, _OUTPUT = "images", "logits"


class Exported(NamedTuple):
    """An exported file, and how far its results differ from the model's.

    Args:
        path: the file.
        run: the file, loaded: images (B, 3, H, W) to logits, for any batch.
        max_error: on random images, the largest difference from the model's logits, relative to the largest logit, or
            absolute if all logits are 0.
    """

    path: Path
    run: Callable[[Tensor], Tensor]
    max_error: float


def export_model(
    model: nn.Module,
    path: str | os.PathLike,
    format: str,
    *,
    batch_size: int = 2,
    tolerance: float = 1e-3,
    opset: int | None = None,
) -> Exported:
    """Write a model, compressed or not, to a file that takes batches of any size.

    Before the file appears at ``path``, it is loaded and run once, on another batch size than it was traced with.

    Args:
        model: a timm VisionTransformer or Eva, or a :class:`Segmenter`, on the device that the file is for (any for
            ONNX), or a wrapper of one (``torch.compile``, DistributedDataParallel, accelerate, ...). It is left as it
            was.
        path: the file to write.
        format: ``"onnx"``, in float32, with token mixes as matrix products, without scatters and loops; ``"pt2"``, for
            ``torch.export.load``; ``"aoti"``, compiled for this machine, for ``torch._inductor.aoti_load_package``.
        batch_size: the batch size to trace the model with, at least 2; files take any batch.
        tolerance: the largest ``max_error`` to accept.
        opset: the ONNX opset, from 17 to 23; older runtimes need lower ones. ``None``: PyTorch's choice.

    Raises:
        TypeError: ``opset`` is no integer.
        ValueError: ``format`` is unknown, ``opset`` is out of range or does not suit the format or model, the model's
            logits are NaN, the model is too large for one ONNX file, or its graph has a scatter or a loop.
        ImportError: a package for ONNX is missing.
        RuntimeError: the file's results differ from the model's by more than ``tolerance``.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(map(repr, FORMATS))}, got {format!r}")
    if batch_size < 2:
        raise ValueError(
            f"batch_size must be at least 2, because a file traced with 1 would take no other, got {batch_size}"
        )
    if opset is not None and format != "onnx":
        raise ValueError(f"opset must be None for format {format!r}, because only ONNX has opsets, got {opset}")
    model = unwrapped(model)
    like = next(model.parameters())
    if format == "onnx":
        _check_onnx(model, opset)
        model = copy.deepcopy(model).cpu().float()
    else:
        model = copy.deepcopy(model)
    model = frozen(model.eval().requires_grad_(False))
    device, dtype = ("cpu", torch.float32) if format == "onnx" else (like.device, like.dtype)
    images = torch.randn(batch_size + 1, *input_size(model), device=device, dtype=dtype)
    with torch.no_grad():
        expected = model(images)
    if expected.isnan().any():
        raise ValueError("model gives NaN on random images, so its file cannot be checked; nothing is written")
    writers: dict[str, Callable[..., Callable[[Tensor], Tensor]]] = {
        "onnx": partial(_write_onnx, opset=opset),
        "pt2": _write_pt2,
        "aoti": _write_aoti,
    }
    path = Path(path)
    with unfinished(path) as folder:
        folder.mkdir()
        written = folder / f"model{FORMATS[format]}"  # AOTInductor requires this suffix
        run = writers[format](model, images[:-1], written)
        error = _difference(run(images), expected)
        if not error <= tolerance:
            raise RuntimeError(
                f"the logits of the {format} file differ from the model's by {error:.3g} of the largest, "
                f"expected at most {tolerance:g}; nothing is written"
            )
        allow_default_mode(written)
        os.replace(written, path)
    return Exported(path, run, error)


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest finite value; infinities only equal themselves."""
    greatest = expected.abs().nan_to_num(posinf=0.0).max()
    # Equal values differ by 0; the difference of two infinities would be NaN.
    differences = torch.where(found == expected, 0.0, (found - expected).abs())
    return (differences.max() / torch.where(greatest > 0, greatest, 1.0)).item()


def _write_onnx(model: Model, images: Tensor, path: Path, opset: int | None) -> Callable[[Tensor], Tensor]:
    import onnx
    import onnxruntime

    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=[_INPUT],
        output_names=[_OUTPUT],
        opset_version=None if opset is None else max(opset, _LOWEST_OPSET),
        verbose=False,
    )
    program.save(str(path), external_data=False)
    content = onnx.load(str(path), load_external_data=False)
    _check_operators(content)
    if opset is not None:
        if opset < _LOWEST_OPSET:
            _lower(content, opset)
        # Runtimes refuse files in a format version newer than their own, whatever the opset.
        content.ir_version = min(content.ir_version, onnx.helper.find_min_ir_version_for(content.opset_import))
        onnx.save(content, str(path))
    try:
        run = load_onnx(path)
        run(images)
    except Exception as error:  # onnxruntime has no public class for its errors
        told = str(error).strip().splitlines()[0]
        raise ValueError(
            f"onnxruntime {onnxruntime.__version__} cannot run the file with opset {opset or 'by default'}; nothing is "
            f"written: {told}"
        ) from error
    return run


def _lower(content: Any, opset: int) -> None:
    """Convert the graph to opset 17, which is below those that PyTorch exports.

    PyTorch would leave this to onnx, which cannot convert some models, and in others leaves attributes that the opset
    does not have.

    Raises:
        ValueError: an operator of the graph has no equivalent in the opset.
    """
    from onnx import defs, helper, numpy_helper

    graph = content.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        try:
            old = defs.get_schema(node.op_type, opset, node.domain)
            new = defs.get_schema(node.op_type, _LOWEST_OPSET, node.domain)
            if old.since_version == new.since_version:
                continue
            if (
                "axes" in old.attributes and len(node.input) == 2
            ):  # of a mean or norm: later opsets take them as an input
                node.attribute.append(helper.make_attribute("axes", constants[node.input.pop()].tolist()))
            for attribute in list(node.attribute):
                if attribute.name not in old.attributes:
                    default = new.attributes[attribute.name].default_value
                    if attribute.name != "num_outputs" and attribute != default:  # redundant in a Split
                        raise ValueError(attribute.name)
                    node.attribute.remove(attribute)
        except (defs.SchemaError, KeyError, ValueError) as error:
            raise ValueError(f"opset {opset} has no {node.op_type} as this model needs it: {error}") from error
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for tensor in list(graph.initializer):
        if tensor.name not in used:
            graph.initializer.remove(tensor)
    for imported in content.opset_import:
        imported.version = opset if imported.domain == "" else imported.version


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
    """Load an ONNX file in onnxruntime on the CPU, as a function from tensor to tensor.

    ``threads``: how many it may use; 0: as many as there are cores.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([_OUTPUT], {_INPUT: images.numpy()})[0])

    return run


def _check_onnx(model: nn.Module, opset: int | None) -> None:
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"ONNX needs the packages onnx, onnxscript and onnxruntime: pip install '.[export]'; {error}"
        ) from error
    if opset is not None:
        if type(opset) is not int:
            raise TypeError(f"opset must be an integer, got {opset!r}")
        most = min(OPSETS[-1], onnx.defs.onnx_opset_version())
        if not OPSETS[0] <= opset <= most:
            raise ValueError(f"opset must be between {OPSETS[0]} and {most}, got {opset}")
    size = sum(4 * tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if size > _MOST_BYTES:
        raise ValueError(
            f"the model has {size / 2**30:.1f} GiB in float32, and one ONNX file holds 2; export it as pt2"
        )


def _check_operators(content: Any) -> None:
    """Refuse scatters and control flow, which static matrices do not need."""
    graphs = [content.graph, *content.functions]
    unwanted = {node.op_type for graph in graphs for node in graph.node if node.op_type.startswith(_UNWANTED)}
    if unwanted:
        raise ValueError(f"the ONNX graph has {', '.join(sorted(unwanted))}: a part of the model has no static form")
