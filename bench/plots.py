"""Plots of result files, each a function that draws records into axes."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from .results import MODEL_PEERS, means


def save_maps(pictures: Sequence[np.ndarray], maps: Mapping[str, Sequence[np.ndarray]], path: Path) -> None:
    """A PNG file with a row for each picture (H, W, 3), and a column for each name's maps (H, W), all from 0 to 1."""
    from matplotlib.figure import Figure

    columns = {"image": pictures} | {name.replace("_", " "): found for name, found in maps.items()}
    figure = Figure(figsize=(1.9 * len(columns), 2 * len(pictures)), layout="constrained")
    panels = figure.subplots(len(pictures), len(columns), squeeze=False)
    for column, (name, shown) in zip(panels.T, columns.items(), strict=True):
        column[0].set_title(name, fontsize=9)
        for panel, values in zip(column, shown, strict=True):
            panel.imshow(values, cmap="magma", vmin=0, vmax=1)
            panel.set_axis_off()
    figure.savefig(path, dpi=75, metadata={"Software": None})


def save(draw: Callable[[object, list[dict]], None], records: list[dict], title: str, path: Path) -> None:
    """The picture that ``draw`` makes of the records, as a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    draw(axes, records)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def speedups(axes: object, records: list[dict]) -> None:
    peers = [peer for peer in MODEL_PEERS if any(peer in record["peers"] for record in records)]
    for index, record in enumerate(records):
        values = [record["peers"].get(peer, 0) / record["ours_ms"] for peer in peers]
        places = [place + 0.8 * (index / len(records) - 0.5) for place in range(len(peers))]
        axes.bar(places, values, 0.8 / len(records), align="edge", label=record["case"])
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(peers)), peers)
    axes.set_ylabel("times as fast as the peer")


def throughputs(axes: object, records: list[dict]) -> None:
    kinds = sorted({(record["case"].rsplit("/", 1)[0], record["dtype"]) for record in records})
    for case, dtype in kinds:
        chosen = [r for r in records if r["case"].startswith(case + "/") and r["dtype"] == dtype]
        batches = [record["shape"][0] for record in chosen]
        for name, style in (("ours", "o-"), ("dense_eager", "o:")):
            times = [record["ours_ms"] if name == "ours" else record["peers"][name] for record in chosen]
            speeds = [1e3 * batch / value for batch, value in zip(batches, times, strict=True)]
            axes.plot(batches, speeds, style, label=f"{case} {dtype}, {name}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("batch")
    axes.set_ylabel("images/s")


def times_by_tokens(axes: object, records: list[dict]) -> None:
    chosen = [record for record in records if record["case"].startswith("attention_forward")]
    names = ["ours", *{name: None for record in chosen for name in record["peers"]}]
    for name in names:
        points = [
            (record["shape"][1], record["ours_ms"] if name == "ours" else record["peers"].get(name))
            for record in chosen
        ]
        points = [point for point in points if point[1] is not None]
        axes.plot(*zip(*points, strict=True), "o-" if name == "ours" else "o:", label=name)
    axes.plot([r["shape"][1] for r in chosen], [r["roofline_ms"] for r in chosen], "k--", label="floor")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("ms")


def shares_of_the_floor(axes: object, records: list[dict]) -> None:
    names = [record["case"] for record in records]
    axes.barh(names, [record["roofline_ms"] / record["ours_ms"] for record in records])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("share of the floor that bytes and FLOPs set")


def accuracy_by_speed(
    axes: object, records: list[dict], field: str = "quality", when: str = "after fine-tuning"
) -> None:
    """Those models that the ``field`` of :func:`bench.results.means` is known of."""
    models = {name: model for name, model in means(records).items() if not math.isnan(model[field])}
    methods = {model["method"]: None for model in models.values() if model["method"] != "dense"}
    for method in methods:
        found = [model for model in models.values() if model["method"] == method and not model["variant"]]
        found.sort(key=lambda model: model["speedup"])
        style = "o-" if method in ("prune_and_merge", "adaptive") else "o:"
        points = [(model["speedup"], model[field]) for model in found]
        axes.plot(*zip(*points, strict=True), style, label=method.replace("_", " "))
    if "dense" in models:
        axes.axhline(models["dense"][field], color="black", linewidth=0.8)
        axes.plot(1, models["dense"][field], "ks", label=f"dense, {when}")
    axes.set_xlabel("times as fast as the dense model in inference")
    axes.set_ylabel(f"top-1 accuracy, {when} (%)")


def iou_by_speed(axes: object, records: list[dict]) -> None:
    """Each method's maps against the dense model's, at every share of the GMACs."""
    dense, *others = sorted(records, key=lambda record: (-record["share"], -record["iou"]))
    for method in dict.fromkeys(record["method"] for record in others):
        found = sorted(
            (record["encoder_speedup"], 100 * record["iou"]) for record in others if record["method"] == method
        )
        style = "o-" if method in ("adaptive", "prune_and_merge") else "o:"
        axes.plot(*zip(*found, strict=True), style, label=method.replace("_", " "))
    axes.plot(dense["encoder_speedup"], 100 * dense["iou"], "ks", label="dense")
    axes.set_xlabel("times as fast as the dense encoder in inference")
    axes.set_ylabel("IoU with the dense model's map (%)")
