"""Tables and plots from the result files, and the README's tables.

    python -m bench.report

rewrites bench/results/README.md, the plots beside the result files, and the tables of the README. A file that was
edited after it was written, or measured on other kernels than these, is said to be so.
"""

import statistics
from collections.abc import Iterator
from pathlib import Path

from . import results

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
ACCURACY_FILE, ACCURACY_14_FILE = "accuracy_cifar10.json", "accuracy_cifar10_14x14.json"
SEGMENTATION_FILE, TRUST_FILE = "segmentation_camvid.json", "trust.json"
MODEL_PEERS = ("dense_autotuned", "dense_eager", "literal", "ideal", "tome", "evit", "dynamicvit", "local_merge")
SPEED, ACCURACY = "table of bench/results", "accuracy of bench/results"
SEGMENTATION, TRUST = "segmentation of bench/results", "trust of bench/results"
_END = "<!-- end -->"
_TRIED = {  # what the tests of a promise try
    "test_kernels": "random inputs of the kernels, against float64",
    "test_configurations": "configurations of the kernels, against float64",
    "test_numerics": "numbers at their edge: infinite, not a number, cancelling",
    "test_plans": "random plans, and models of them, against their equations",
    "test_determinism": "runs repeated, split and threaded otherwise",
    "test_bad_files": "files truncated, changed, foreign or hostile",
    "test_a_killed_command_leaves_what_loads": "commands killed at random moments",
    "test_a_full_disk_is_an_error_that_says_so": "commands on a full disk",
}
_OF_A_MODEL = ("method", "keep_rate", "variant", "gmacs", "speedup", "activation_bytes")


def devices(folder: Path = results.FOLDER) -> list[Path]:
    """The folders of results, GPUs first."""
    found = [path for path in folder.iterdir() if (path / "model.json").exists()]
    return sorted(found, key=lambda path: (path.name == "cpu", path.name))


def model_table(content: dict) -> str:
    """Markdown: throughput of the compressed model and its ratio to each peer, and in training its memory."""
    peers = [peer for peer in MODEL_PEERS if any(peer in record["peers"] for record in content["records"])]
    lines = [
        "| case | images/s | " + " | ".join(f"to {peer}" for peer in peers) + " | memory to dense |",
        "|---|" + "---:|" * (len(peers) + 2),
    ]
    for record in content["records"]:
        ours, memory = record["ours_ms"], record["memory"]
        ratios = [f"{record['peers'][peer] / ours:.2f}x" if peer in record["peers"] else "" for peer in peers]
        share = f"{memory['ours'] / memory['dense_eager']:.2f}x" if memory else ""
        cells = [record["case"], f"{1e3 * record['shape'][0] / ours:.0f}", *ratios, share]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def op_table(content: dict) -> str:
    """Markdown: each case's time, its share of the floor, the fastest peer, and the errors."""
    lines = [
        "| case | ms | floor, ms | of the floor | fastest peer | its ms | ratio | error to its |",
        "|---|---:|---:|---:|---|---:|---:|---:|",
    ]
    for record in content["records"]:
        ours, floor, errors = record["ours_ms"], record["roofline_ms"], record["errors"]
        peers = {peer: value for peer, value in record["peers"].items() if peer in errors}
        best = min(peers, key=peers.get)
        cells = [
            record["case"], f"{ours:.3f}", f"{floor:.3f}", f"{floor / ours:.0%}", best, f"{peers[best]:.3f}",
            f"{peers[best] / ours:.2f}x", f"{errors['ours'] / errors[best]:.2f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def trust_tables(content: dict) -> str:
    """Markdown: errors against float64 beside PyTorch's, the cases that each test tried, all tests by versions."""
    lines = ["| op | dtype | error against float64 | PyTorch's own |", "|---|---|---:|---:|"]
    cases: dict[str, int] = {}
    failed: set[str] = set()
    versions = ["", "| versions | tests | skipped | passed |", "|---|---:|---:|---|"]
    for record in content["records"]:
        if "op" in record:
            lines.append(f"| {record['op']} | {record['dtype']} | {record['ours']:.1e} | {record['pytorch']:.1e} |")
        elif "versions" in record:
            cells = [record["versions"], str(record["tests"]), str(record["skipped"]), yes(record["passed"])]
            versions.append("| " + " | ".join(cells) + " |")
        else:
            name = record["test"].split("[")[0]
            cases[name] = cases.get(name, 0) + record["cases"]
            failed |= {name} if not record["passed"] else set()
    lines += ["", "| test | cases | passed |", "|---|---:|---|"]
    lines += [f"| {name} | {count} | {yes(name not in failed)} |" for name, count in sorted(cases.items())]
    return "\n".join(lines + versions) + "\n"


def yes(value: bool) -> str:
    return "yes" if value else "no"


def traffic_table(content: dict) -> str:
    """Markdown: rows that each transition moves, per image, and the fewest that it could."""
    lines = ["| boundary | state | rows | nonzeros | moved | least | ratio |", "|---:|" + "---:|" * 6]
    for record in content["traffic"]:
        moved, least = record["moved_rows"], record["least_rows"]
        names = ("boundary", "state", "rows", "nonzeros")
        cells = [*(str(record[name]) for name in names), f"{moved:.0f}", f"{least}", f"{moved / least:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def segmentation_table(content: dict) -> str:
    """Markdown: speed, memory and mIoU of each model, the mean of its seeds, and its drop to the dense one."""
    lines = [
        "| model | GMACs | speed | activations in training | mIoU before fine-tuning | fine-tuned "
        "| to dense fine-tuned alike | seeds |",
        "|---|" + "---:|" * 7,
    ]
    models = accuracies(content["records"], "miou")
    dense = models["dense"]
    for name, model in models.items():
        cells = [
            name, f"{model['gmacs']:.3g}", f"{model['speedup']:.2f}x",
            f"{model['activation_bytes'] / dense['activation_bytes']:.2f}x", f"{model['miou_before']:.2f}%",
            f"{model['miou']:.2f}%", f"{model['miou'] - dense['miou']:+.2f}", str(model["seeds"]),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def accuracy_table(content: dict, variants: bool = True) -> str:
    """Markdown: speed and accuracy of each model, the mean of its seeds, and its drop to the dense one."""
    lines = [
        "| model | GMACs | speed | top-1 before fine-tuning | fine-tuned | to dense fine-tuned alike | seeds |",
        "|---|" + "---:|" * 6,
    ]
    models = accuracies(content["records"])
    dense = models["dense"]["top1"]
    for name, model in models.items():
        if model["variant"] and not variants:
            continue
        cells = [
            name, f"{model['gmacs']:.3g}", f"{model['speedup']:.2f}x", f"{model['top1_before']:.2f}%",
            f"{model['top1']:.2f}%", f"{model['top1'] - dense:+.2f}", str(model["seeds"]),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def accuracies(records: list[dict], quality: str = "top1") -> dict[str, dict]:
    """Each model by name, with the means of its seeds; variants last."""
    groups: dict[str, list[dict]] = {}
    for record in records:
        parts = [record["method"].replace("_", " ")]
        parts += [f"{record['keep_rate']:g}"] if record["keep_rate"] else []
        parts += [f"{record['image']} px"] if record["image"] else []
        name = " ".join(parts) + (f", {record['variant']}" if record["variant"] else "")
        groups.setdefault(name, []).append(record)
    ordered = sorted(groups.items(), key=lambda item: bool(item[1][0]["variant"]))
    return {
        name: {
            **{key: found[0][key] for key in _OF_A_MODEL if key in found[0]},
            **{key: statistics.mean(record[key] for record in found) for key in (f"{quality}_before", quality)},
            "seeds": len(found),
        }
        for name, found in ordered
    }


def segmentation_note(content: dict) -> str:
    """What was trained, in a sentence or two."""
    setting = content["setting"]
    patches = (setting["image"] // setting["patch"]) ** 2
    return (
        f"CamVid, a Segmenter of {setting['depth']} blocks of width {setting['width']} on {patches} patches and a mask "
        f"transformer of {setting['decoder_depth']}: {setting['epochs']} epochs from scratch, then "
        f"{setting['tune_epochs']} epochs of fine-tuning for every model, the dense one too, distilling from the dense "
        f"one; prune rate 0.1. mIoU is of the test images, by sliding windows. Speed is that of the whole model in "
        f"inference on {setting['batch']} windows, over the dense model's. Local merge is the first step of ALGM at "
        "the same GMACs."
    )


def accuracy_note(content: dict) -> str:
    """What was trained, in a sentence or two."""
    setting, trained = content["setting"], content["dense_epochs"][-1]
    patches = (setting["image"] // setting["patch"]) ** 2
    return (
        f"CIFAR-10, a ViT of {setting['depth']} blocks of width {setting['width']} on {patches} patches and a class "
        f"token: {setting['epochs']} epochs from scratch ({trained['top1']:.2f}%), then "
        f"{setting['tune_epochs']} epochs of fine-tuning for every model, the dense one too, distilling from the dense "
        f"one; prune rate 0.1. Speed is that of inference at batch {setting['batch']}, over the dense model's."
    )


def origin(content: dict, wrong: str) -> str:
    """What was measured, when, on what, and the commits of the runs in it where they were made before."""
    facts = [content["device"]]
    facts += [f"driver {content['driver']}"] if "driver" in content else [f"{content['threads']} threads"]
    facts += [f"{name} {content[name]}" for name in ("torch", "triton", "timm")]
    text = f"{', '.join(facts)}, commit {content['commit']}, {content['date'][:10]}."
    commits = sorted({record["commit"] for record in content["records"] if "commit" in record})
    text += f" The runs in it are of commits {', '.join(commits)}." if commits else ""
    return text + (f" **This file was {wrong}.**" if wrong else "")


def readme_block(folder: Path = results.FOLDER) -> str:
    """The README's table: of a GPU where one was measured, else of the CPU."""
    first = devices(folder)[0]
    content, wrong = results.read(first / "model.json")
    return f"{model_table(content)}\n{origin(content, wrong)}\n{_not_on_a_gpu(first)}"


def _not_on_a_gpu(device: Path) -> str:
    return "\nNo figure here was measured on a GPU.\n" if device.name == "cpu" else ""


def accuracy_block(folder: Path = results.FOLDER) -> str:
    """The README's other table, likewise."""
    found = [path for device in devices(folder) if (path := device / ACCURACY_FILE).exists()]
    if not found:
        return "Not measured yet.\n"
    content, wrong = results.read(found[0])
    picture = (found[0].parent / "accuracy.png").relative_to(ROOT)
    table = accuracy_table(content, variants=False)
    origins = f"{accuracy_note(content)} {origin(content, wrong)}\n{_not_on_a_gpu(found[0].parent)}"
    return f"{table}\n{origins}\n![Accuracy against speed]({picture})\n"


def segmentation_block(folder: Path = results.FOLDER) -> str:
    """The README's third table, likewise."""
    found = [path for device in devices(folder) if (path := device / SEGMENTATION_FILE).exists()]
    if not found:
        return "Not measured yet.\n"
    content, wrong = results.read(found[0])
    picture = (found[0].parent / "segmentation.png").relative_to(ROOT)
    origins = f"{segmentation_note(content)} {origin(content, wrong)}\n{_not_on_a_gpu(found[0].parent)}"
    return f"{segmentation_table(content)}\n{origins}\n![What the models see]({picture})\n"


def trust_block(folder: Path = results.FOLDER) -> str:
    """The README's last table, likewise: what was tried for each promise."""
    found = [path for device in devices(folder) if (path := device / TRUST_FILE).exists()]
    if not found:
        return "Not measured yet.\n"
    content, wrong = results.read(found[0])
    tried: dict[str, list[dict]] = {}
    for record in content["records"]:
        if "test" in record:
            module, test = record["test"].split("[")[0].split("::")
            name = module.split(".")[-1]
            tried.setdefault(_TRIED.get(test, _TRIED.get(name, name)), []).append(record)
        elif "versions" in record:
            tried[f"the tests on {record['versions']}"] = [{"cases": record["tests"], **record}]
    lines = ["| tried | times | passed |", "|---|---:|---|"]
    for name, records in tried.items():
        passed = yes(all(record["passed"] for record in records))
        lines.append(f"| {name} | {sum(record['cases'] for record in records):,} | {passed} |")
    return "\n".join(lines) + f"\n\n{origin(content, wrong)}\n{_not_on_a_gpu(found[0].parent)}"


def with_table(readme: str, marker: str, block: str) -> str:
    """The README's text with the table after a marker replaced."""
    before, rest = readme.split(f"<!-- {marker} -->\n")
    _, after = rest.split(_END, 1)
    return f"{before}<!-- {marker} -->\n{block}{_END}{after}"


def whole_report(folder: Path) -> str:
    """Markdown: every table of every device, with its plots."""
    return "\n".join(
        ["# Results", "", "Written by `python -m bench.report` from the files beside it.", *_sections(folder)]
    )


def _sections(folder: Path) -> Iterator[str]:
    for device in devices(folder):
        yield f"\n## {device.name}"
        for file in (ACCURACY_FILE, ACCURACY_14_FILE):
            if not (device / file).exists():
                continue
            content, wrong = results.read(device / file)
            setting = " --setting cpu-14x14" if file == ACCURACY_14_FILE else ""
            yield (
                f"\n### accuracy\n\n`python -m bench.accuracy DATA --work FOLDER{setting}`: {accuracy_note(content)} "
                f"{origin(content, wrong)}\n\n{accuracy_table(content)}"
            )
            yield f"![Accuracy against speed]({device.name}/{Path(file).stem.replace('_cifar10', '')}.png)\n"
        if (device / SEGMENTATION_FILE).exists():
            content, wrong = results.read(device / SEGMENTATION_FILE)
            yield (
                f"\n### segmentation\n\n`python -m bench.accuracy DATA --task segmentation --work FOLDER`: "
                f"{segmentation_note(content)} {origin(content, wrong)}\n\n{segmentation_table(content)}"
            )
            yield f"![What the models see]({device.name}/segmentation.png)\n"
            yield f"![The plan of keep rate 0.7]({device.name}/segmentation_plan.png)\n"
        if (device / TRUST_FILE).exists():
            content, wrong = results.read(device / TRUST_FILE)
            yield f"\n### trust\n\n`python -m bench.trust`. {origin(content, wrong)}\n\n{trust_tables(content)}"
        for suite, table in (("model", model_table), ("attention", op_table), ("transition", op_table)):
            path = device / f"{suite}.json"
            if not path.exists():
                continue
            content, wrong = results.read(path)
            yield f"\n### {suite}\n\n{origin(content, wrong)}\n\n{table(content)}"
            if suite == "model":
                settings = content["records"][0]["settings"]
                listed = ", ".join(f"{name} {value:g}" for name, value in settings.items())
                yield f"Settings at which GMACs match ours: {listed} (tome: tokens a block; the others: keep rate).\n"
            if "traffic" in content:
                yield f"Rows through memory, per image:\n\n{traffic_table(content)}"
            for plot in PLOTS:
                if plot.suite == suite:
                    yield f"![{plot.title}]({device.name}/{plot.file})\n"


class Plot:
    """A picture of one suite's records."""

    def __init__(self, suite: str, file: str, title: str) -> None:
        self.suite, self.file, self.title = suite, file, title

    def draw(self, records: list[dict], path: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        getattr(self, f"_{self.file.removesuffix('.png').removesuffix('_14x14')}")(axes, records)
        axes.set_title(self.title)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
        figure.savefig(path, dpi=110, metadata={"Software": None})
        plt.close(figure)

    @staticmethod
    def _speedup(axes: object, records: list[dict]) -> None:
        peers = [peer for peer in MODEL_PEERS if any(peer in record["peers"] for record in records)]
        for index, record in enumerate(records):
            values = [record["peers"].get(peer, 0) / record["ours_ms"] for peer in peers]
            places = [place + 0.8 * (index / len(records) - 0.5) for place in range(len(peers))]
            axes.bar(places, values, 0.8 / len(records), align="edge", label=record["case"])
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(peers)), peers)
        axes.set_ylabel("times as fast as the peer")

    @staticmethod
    def _throughput(axes: object, records: list[dict]) -> None:
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

    @staticmethod
    def _tokens(axes: object, records: list[dict]) -> None:
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

    @staticmethod
    def _floor(axes: object, records: list[dict]) -> None:
        names = [record["case"] for record in records]
        axes.barh(names, [record["roofline_ms"] / record["ours_ms"] for record in records])
        axes.axvline(1, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_xlabel("share of the floor that bytes and FLOPs set")

    @staticmethod
    def _accuracy(axes: object, records: list[dict]) -> None:
        models = accuracies(records)
        methods = {model["method"]: None for model in models.values() if model["method"] != "dense"}
        for method in methods:
            found = [model for model in models.values() if model["method"] == method and not model["variant"]]
            found.sort(key=lambda model: model["speedup"])
            style = "o-" if method == "prune_and_merge" else "o:"
            points = [(model["speedup"], model["top1"]) for model in found]
            axes.plot(*zip(*points, strict=True), style, label=method.replace("_", " "))
        axes.axhline(models["dense"]["top1"], color="black", linewidth=0.8)
        axes.plot(1, models["dense"]["top1"], "ks", label="dense, fine-tuned alike")
        axes.set_xlabel("times as fast as the dense model in inference")
        axes.set_ylabel("top-1 accuracy after fine-tuning (%)")


PLOTS = (
    Plot("accuracy_cifar10", "accuracy.png", "Accuracy against speed on CIFAR-10, 8 x 8 patches"),
    Plot("accuracy_cifar10_14x14", "accuracy_14x14.png", "Accuracy against speed on CIFAR-10, 14 x 14 patches"),
    Plot("model", "speedup.png", "Compressed deit_small beside its peers"),
    Plot("model", "throughput.png", "Throughput against batch"),
    Plot("attention", "tokens.png", "Attention, forward, against tokens"),
    Plot("transition", "floor.png", "Transitions beside the floor"),
)


def main() -> None:
    for device in devices():
        for plot in PLOTS:
            path = device / f"{plot.suite}.json"
            if path.exists():
                plot.draw(results.read(path)[0]["records"], device / plot.file)
    (results.FOLDER / "README.md").write_text(whole_report(results.FOLDER) + "\n", encoding="utf-8")
    text = with_table(README.read_text(encoding="utf-8"), SPEED, readme_block())
    text = with_table(text, ACCURACY, accuracy_block())
    text = with_table(text, SEGMENTATION, segmentation_block())
    README.write_text(with_table(text, TRUST, trust_block()), encoding="utf-8")


if __name__ == "__main__":
    main()
