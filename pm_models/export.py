"""Models as files that run without this package: ONNX, ``torch.export`` and AOTInductor."""

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
OPSETS = range(17, 24)  # of ONNX: the first has LayerNormalization, the last is PyTorch's newest
_LOWEST_OPSET = 18  # that PyTorch exports to
_MOST_BYTES = 2**31 - 2**24  # of one ONNX file
_UNWANTED = ("Scatter", "Loop", "Scan", "If")  # what servers of ONNX are slow at, or lack
_INPUT, _OUTPUT = "images", "logits"


class Exported(NamedTuple):
    """A file that was written, and how its results differ from the model's.

    Args:
        path: the file.
        run: the file, loaded: images (B, 3, H, W) to logits, for any batch.
        max_error: the greatest difference to the model's logits over the greatest of these, or over 1 where all are 0,
            on random images.
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
        opset: of ONNX, from 17 to 23; older runtimes need lower ones. ``None``: PyTorch's choice.

    Raises:
        TypeError: ``opset`` is no integer.
        ValueError: ``format`` is unknown, ``opset`` is out of range or not for this format or model, the model gives
            logits that are not a number, it is too large for one ONNX file, or its graph holds an operator that ONNX
            is not to have.
        ImportError: a package for ONNX is missing.
        RuntimeError: the file's results differ from the model's by more than ``tolerance``.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(map(repr, FORMATS))}, got {format!r}")
    if batch_size < 2:
        raise ValueError(f"batch_size must be at least 2, as a batch of 1 would be the only one, got {batch_size}")
    if opset is not None and format != "onnx":
        raise ValueError(f"opset must be None for format {format!r}, as it is ONNX's, got {opset}")
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
        written = folder / f"model{FORMATS[format]}"  # AOTInductor insists on the name's end
        run = writers[format](model, images[:-1], written)
        error = _difference(run(images), expected)
        if not error <= tolerance:
            raise RuntimeError(
                f"the {format} file gives other logits than the model: they differ by {error:.3g} of the greatest, "
                f"expected at most {tolerance:g}; nothing is written"
            )
        allow_default_mode(written)
        os.replace(written, path)
    return Exported(path, run, error)


def _difference(found: Tensor, expected: Tensor) -> float:
    """The greatest difference over the greatest finite value; infinities differ from all but themselves."""
    greatest = expected.abs().nan_to_num(posinf=0.0).max()
    # Equal values differ by 0: the difference of infinities is no number.
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
        # Runtimes refuse a file whose format is newer than they are, whatever its opset.
        content.ir_version = min(content.ir_version, onnx.helper.find_min_ir_version_for(content.opset_import))
        onnx.save(content, str(path))
    try:
        run = load_onnx(path)
        run(images)
    except Exception as error:  # onnxruntime has no class of its own for its errors
        told = str(error).strip().splitlines()[0]
        raise ValueError(
            f"onnxruntime {onnxruntime.__version__} cannot run the file with opset {opset or 'by default'}; nothing is "
            f"written: {told}"
        ) from error
    return run


def _lower(content: Any, opset: int) -> None:
    """Change the graph to an opset below those that PyTorch exports to, 17.

    PyTorch itself would have it converted by onnx, which cannot convert what some models need, and in others leaves
    attributes that the opset does not have.

    Raises:
        ValueError: an operator of the graph has no form in it.
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
            if "axes" in old.attributes and len(node.input) == 2:  # of a mean or norm: they became an input
                node.attribute.append(helper.make_attribute("axes", constants[node.input.pop()].tolist()))
            for attribute in list(node.attribute):
                if attribute.name not in old.attributes:
                    default = new.attributes[attribute.name].default_value
                    if attribute.name != "num_outputs" and attribute != default:  # which a Split has anyway
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
    """Refuse what static matrices have no need for."""
    graphs = [content.graph, *content.functions]
    unwanted = {node.op_type for graph in graphs for node in graph.node if node.op_type.startswith(_UNWANTED)}
    if unwanted:
        raise ValueError(f"the ONNX graph has {', '.join(sorted(unwanted))}: a part of the model has no static form")
