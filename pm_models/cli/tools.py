"""The commands that need no data set: export, show, bench, report and demo."""

import json
import os
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.cbook import get_sample_data
from PIL import ImageOps

from ..adaptive_plan import AdaptivePlan
from ..budget import LatencyTable, measure_latency
from ..checkpoints import CONFIG_NAME
from ..compression import plan_from
from ..data import read_image, read_sample
from ..export import export_model
from ..files import check_writable, write_atomically
from ..loading import load_model
from ..measure import alternate, throughput
from ..models import Model, compression_of, encoder_of, input_size, tokens_of, uncompressed
from ..plan import CompressionPlan
from ..report import report_page
from ..tables import format_table
from ..visualize import save_cluster_picture, save_latency_picture, save_plan_picture
from .commands import dense_of
from .options import Bench, Demo, Export, Report, Show

_PIXELS = 448  # longer side of an image that a plan is drawn over


def demo(options: Demo) -> None:
    from ..demo import run_demo  # only the demo needs scikit-learn

    run_demo(options.output, seed=options.seed)


def export(options: Export) -> None:
    _check_new(options.output)
    model = load_model(options.model)
    on_cpu = options.format == "onnx" or options.device == "cpu" or not torch.cuda.is_available()
    device = torch.device("cpu" if on_cpu else "cuda")
    model.to(device)
    written = partial(export_model, format=options.format, opset=options.opset)
    files = {"exported": written(model, options.output)}
    like = next(model.parameters())
    dtype = torch.float32 if options.format == "onnx" else like.dtype
    images = torch.randn(options.batch_size, *input_size(model), device=device, dtype=dtype)
    print(f"{options.output}: logits within {files['exported'].max_error:.2g} of the model's greatest")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        if compression_of(model) is not None:
            print("exporting the uncompressed model too, to compare the speed")
            with torch.inference_mode(False):
                files["dense"] = written(model.uncompressed().to(device), Path(folder) / "dense")
        calls = {name: partial(file.run, images) for name, file in files.items()}
        seconds = {name: statistics.median(times) for name, times in alternate(calls, 5, not on_cpu).items()}
    speed = f"{len(images) / seconds['exported']:.0f} images/s at batch {len(images)} on {device.type}"
    if "dense" in seconds:
        speed += f", {seconds['dense'] / seconds['exported']:.2f} times as fast as the uncompressed model's file"
    print(speed)


def show(options: Show) -> None:
    plan = _plan_of(options.plan)
    count = len(options.images)
    outputs = [options.output]
    if count > 1:
        outputs = [options.output.with_stem(f"{options.output.stem}-{index + 1}") for index in range(count)]
    print(plan)
    if isinstance(plan, AdaptivePlan):
        if not options.images or not (options.plan / CONFIG_NAME).is_file():
            raise ValueError(
                f"{options.plan} is an adaptive plan, which merges different tokens in each image: to draw them, give "
                "the folder of a model, and images"
            )
        model = load_model(options.plan).eval()
        samples = [read_sample(path, model) for path in options.images]
        saves = [partial(save_cluster_picture, model, image=sample.image, picture=sample.picture) for sample in samples]
    else:
        pictures = [_under_plan(path, plan) for path in options.images] or [None]
        saves = [partial(save_plan_picture, plan, image=picture) for picture in pictures]
    for output, save in zip(outputs, saves, strict=True):
        save(output)
        print(f"picture: {output}")


def bench(options: Bench) -> None:
    model = load_model(options.model, option="MODEL").eval()
    plain = uncompressed(model)
    device = torch.device("cuda" if options.device == "auto" and torch.cuda.is_available() else "cpu")
    for part in {model, plain}:
        part.to(device)
    dtype = torch.bfloat16 if options.amp else None
    tables: dict[int, LatencyTable] = {}
    measured: dict[int, float] = {}
    for batch in options.batch_size:
        images = torch.randn(batch, *input_size(model), device=device)
        with torch.autocast(device.type, dtype, enabled=options.amp):
            tables[batch] = measure_latency(plain, images)
            if plain is not model:
                speed = throughput({"plain": plain, "compressed": model}, images)
                measured[batch] = speed["compressed"] / speed["plain"]
        print(_latency_report(batch, tables[batch], device.type, measured.get(batch)))
    save_latency_picture(
        {batch: (table.tokens, _speeds(table)) for batch, table in tables.items()},
        options.output,
        {batch: (statistics.mean(tokens_of(model)), speed) for batch, speed in measured.items()},
    )
    print(f"picture: {options.output}")
    if options.results_file is not None:
        results = {
            "model": str(options.model),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "batches": {
                batch: table._asdict() | {"compressed": measured.get(batch)} for batch, table in tables.items()
            },
        }
        write_atomically(options.results_file, json.dumps(results, indent=2).encode())


def report(options: Report) -> None:
    if options.output.is_dir():
        raise IsADirectoryError(f"--output {options.output} is a folder, expected a file or nothing")
    check_writable(options.output, "--output")
    model = load_model(options.model).eval()
    if compression_of(model) is None:
        raise ValueError(f"{options.model} holds an uncompressed model, which has no plan")
    dense, dense_is = _dense_of(options, model)
    paths = [path.absolute() for path in options.images or [Path(get_sample_data("grace_hopper.jpg", asfileobj=False))]]
    folder = os.path.commonpath([path.parent for path in paths])
    samples = {str(path.relative_to(folder)): read_sample(path, model) for path in paths}
    device = torch.device("cuda" if options.device == "auto" and torch.cuda.is_available() else "cpu")
    for part in filter(None, (model, dense)):
        part.to(device)
    page = report_page(
        model, samples, name=str(options.model), dense=dense, dense_is=dense_is, batches=options.batch_size
    )
    write_atomically(options.output, page.encode())
    print(f"report: {options.output}")


def _dense_of(options: Report, model: Model) -> tuple[Model | None, str]:
    """The model to compare with, and which it is, or why there is none."""
    if options.dense is None:
        if (dense := dense_of(options.model, model)) is not None:
            return dense, "the model as it was before compression"
        return None, (
            f"{options.model} is fine-tuned, and does not hold the model as it was before; --dense takes its folder"
        )
    dense = load_model(options.dense).eval()
    given, expected = (
        (type(encoder_of(each)), {name: value.shape for name, value in each.state_dict().items()})
        for each in (dense, uncompressed(model))
    )
    if given != expected:
        raise ValueError(f"--dense {options.dense} holds another model than {options.model} was before compression")
    return dense, f"the model of {options.dense}"


def _speeds(table: LatencyTable) -> list[float]:
    """The speed for each number of tokens in every block, as a multiple of that on all tokens."""
    return [(table.rest + table.seconds[-1]) / (table.rest + seconds) for seconds in table.seconds]


def _latency_report(batch: int, table: LatencyTable, device: str, compressed: float | None) -> str:
    rows = [("tokens", "ms", "images/s", "speed")]
    for tokens, seconds, speed in zip(table.tokens, table.seconds, _speeds(table), strict=True):
        whole = table.rest + seconds
        rows.append((str(tokens), f"{1e3 * whole:.3g}", f"{batch / whole:.0f}", f"{speed:.2f}x"))
    text = f"batch {batch} on {device}, tokens in every block:\n{format_table(rows)}"
    return text if compressed is None else f"{text}\nthe compressed model: {compressed:.2f}x"


def _plan_of(path: Path) -> CompressionPlan | AdaptivePlan:
    """The plan in a file, or that of the model in a folder."""
    if path.is_dir():
        if (path / "plan.json").is_file():
            path = path / "plan.json"
        elif (path / CONFIG_NAME).is_file():
            compression = compression_of(load_model(path))
            if compression is None:
                raise ValueError(f"{path} holds an uncompressed model, which has no plan")
            return compression.plan
        else:
            raise FileNotFoundError(f"{path} holds neither a plan.json nor a model")
    return plan_from(path)


def _under_plan(path: Path, plan: CompressionPlan) -> np.ndarray:
    """The centre of an image in the shape of the plan's grid, (height, width, 3), from 0 to 1."""
    height, width = plan.grid
    scale = _PIXELS / max(height, width)
    return np.asarray(ImageOps.fit(read_image(path), (round(scale * width), round(scale * height)))) / 255


def _check_new(output: Path) -> None:
    if output.exists():
        raise FileExistsError(f"{output} exists already; choose another --output, or delete it")
