"""Train, compress and fine-tune on CIFAR-10, and write accuracy against throughput to a result file.

``python -m bench.accuracy DATA --work FOLDER`` does what ``FOLDER`` does not hold yet: a stopped run continues. DATA is
an image folder: ``train/<class>/*`` and ``test/<class>/*``. The throughputs are measured last, in one process. With
``--only``, several processes can share the runs between them.
"""

import argparse
from pathlib import Path

import torch

from ..results import FOLDER
from .curve import Study
from .runs import SETTINGS, all_runs


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="image folder with train/ and test/")
    parser.add_argument("--work", type=Path, required=True, help="folder for models, states and finished runs")
    parser.add_argument("--results", type=Path, default=FOLDER, help="write <device>/accuracy_cifar10.json here")
    parser.add_argument("--setting", choices=SETTINGS, help="model and training (the device's: cpu or cuda)")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of the fine-tuning (%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="runs whose names begin so, in this order")
    parser.add_argument("--measure", action="store_true", help="train nothing more: measure what there is")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setting = SETTINGS[options.setting or device]
    study = Study(setting, options.data, options.work, device)
    runs = all_runs(setting, options.seeds)
    if not options.measure:
        for name in options.only or [""]:
            for run in runs:
                if run.name.startswith(name):
                    study.do(run)
    if not options.only:
        suffix = options.setting.removeprefix(device).replace("-", "_") if options.setting else ""
        study.measure(options.results / device / f"accuracy_cifar10{suffix}.json", runs)


if __name__ == "__main__":
    main()
