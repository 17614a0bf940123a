"""Train, compress and fine-tune on real images, and write accuracy against throughput to a result file.

``python -m bench.accuracy DATA --work FOLDER`` does what ``FOLDER`` does not hold yet: a stopped run continues. DATA
is CIFAR-10 as an image folder, ``train/<class>/*`` and ``test/<class>/*``; with ``--task segmentation`` it is CamVid,
``images/{train,val,test}/*`` and ``labels/{train,val,test}/*``. ``--task parts`` compares plans from other scores and
each argument of Prune and Merge, on CIFAR-10 and untrained. With ``--task fidelity`` it is both, in this order:
a pretrained model's answers are compared before and after compression, with no training and distilled; with ``--task
schedules`` on training images and untrained, by every schedule that adaptive merging could have. The throughputs are
measured last, in one process. With ``--only``, several processes can share the runs between them.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from timm.models.vision_transformer import VisionTransformer

from ..results import FOLDER
from .camvid import CamVid
from .cifar10 import Cifar10
from .runs import CAMVID, CIFAR10, Setting, classification_runs, part_runs, segmentation_runs

if TYPE_CHECKING:
    from .pretrained import Saliency

# Images of CIFAR-10 and of CamVid that answers are compared on.
_PAIRS = {"fidelity": (120, 80), "schedules": (240, 160)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="+", help="folder of CIFAR-10, or of CamVid, or both for fidelity")
    parser.add_argument("--work", type=Path, required=True, help="folder for models, states and finished runs")
    parser.add_argument(
        "--task", choices=("classification", "parts", "segmentation", *_PAIRS), default="classification"
    )
    parser.add_argument("--results", type=Path, default=FOLDER, help="write <device>/<study>.json here")
    parser.add_argument("--setting", choices={**CIFAR10, **CAMVID}, help="model and training (the device's)")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of the fine-tuning (%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="runs whose names begin so, in this order")
    parser.add_argument("--measure", action="store_true", help="train nothing more: measure what there is")
    parser.add_argument("--model", type=Path, help="wheel or ONNX file of the pretrained model (downloaded)")
    options = parser.parse_args()
    if len(options.data) != (2 if options.task in _PAIRS else 1):
        parser.error(f"--task {options.task} does not take {len(options.data)} folders of data")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = options.setting or device
    if options.task in _PAIRS:
        from .fidelity import Fidelity, fidelity_runs, schedule_runs  # this and what is pretrained alone need onnx

        trying = options.task == "schedules"
        work, split = (options.work / "schedules", "train") if trying else (options.work, "test")
        study = Fidelity(_pretrained(options), options.data, _PAIRS[options.task], work, device, split)
        runs, file = (schedule_runs(), "fidelity_schedules") if trying else (fidelity_runs(), "fidelity_pretrained")
    elif options.task == "segmentation":
        setting = CAMVID[name]
        study = CamVid(setting, options.data[0], options.work, device, _encoder(options, setting))
        runs, file = segmentation_runs(setting, options.seeds), "segmentation_camvid"
    else:
        setting = CIFAR10[name]
        study = Cifar10(setting, options.data[0], options.work, device, _encoder(options, setting))
        runs, file = classification_runs(setting, options.seeds), "accuracy_cifar10"
        if options.task == "parts":
            runs, file = part_runs(options.seeds), "parts_cifar10"
    if not options.measure:
        chosen = [run for wanted in options.only or [""] for run in runs if run.name.startswith(wanted)]
        for run in chosen:
            study.test(run)
        for run in chosen if options.task != "parts" else ():
            study.do(run)
    if not options.only:
        suffix = name.removeprefix(device).replace("-", "_")
        study.measure(options.results / device / f"{file}{suffix}.json", runs)


def _encoder(options: argparse.Namespace, setting: Setting) -> VisionTransformer | None:
    """What a study starts from; ``None``: from random weights."""
    return _pretrained(options, setting.image).encoder if setting.pretrained else None


def _pretrained(options: argparse.Namespace, *image: int) -> "Saliency":
    from . import pretrained

    options.work.mkdir(parents=True, exist_ok=True)
    return pretrained.load(options.model or pretrained.fetch(options.work), *image)


if __name__ == "__main__":
    main()
