"""Commands killed at random moments, or on a full disk: what is left loads or is not there, and they then end well."""

import itertools
import random
import re
import signal
import time

import numpy as np
import pytest
import torch
from covering import REST
from helpers import plan_for, small_vit
from PIL import Image
from processes import Started

from pm_models import compress, load_pretrained, save_pretrained
from pm_models.export import load_onnx

resource = pytest.importorskip("resource", reason="a system without limits for processes")
pytestmark = [
    pytest.mark.fuzz,
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that cannot be caught"),
]
KILLS = {"few": 1, "many": 13}  # of each command


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images, a dense and a compressed model."""
    root = tmp_path_factory.mktemp("place")
    noise = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cats", "dogs"):
            (root / "data" / split / name).mkdir(parents=True)
            for index in range(12):
                pixels = noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / "data" / split / name / f"{index}.png")
    dense = small_vit(img_size=32, patch_size=8, depth=3, num_classes=2)
    save_pretrained(dense, root / "dense")
    save_pretrained(compress(dense, plan_for(dense)), root / "compressed")
    Started("show", root).communicate()  # the first process waits for what the others have: the imports
    return root


COMMON = ["-b", "4", "-j", "0", "--device", "cpu"]
COMMANDS = {
    "train": [
        "{0}/data", "--model", "{0}/dense", *COMMON, "--epochs", "3", "--warmup-epochs", "1",
        "--recovery-interval", "1",
    ],
    "compress": ["{0}/data", "--model", "{0}/dense", *COMMON, "--keep-rate", "0.5", "--prune-rate", "0.2"],
    "finetune": ["{0}/data", "--model", "{0}/compressed", *COMMON, "--epochs", "3", "--recovery-interval", "1"],
    "export": ["--model", "{0}/compressed", "--format", "onnx", "-b", "2"],
}  # fmt: skip

OF_A_QUICK_RUN = [pytest.param(command, marks=REST if command == "export" else ()) for command in COMMANDS]


def start(command, place, output, largest_file=None):
    run = Started(command, *(argument.format(place) for argument in COMMANDS[command]), "--output", output)
    if largest_file is not None:
        resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (largest_file, largest_file))
    return run


def check_what_is_left(command, output, *, finished):
    """Whole or not there; a whole one runs."""
    images = torch.zeros(2, 3, 32, 32)
    if command == "export":
        assert output.is_file() or not finished
        if output.is_file():
            load_onnx(output)(images)
        return
    assert (output / "config.json").is_file() or not finished
    if (output / "config.json").is_file():
        with torch.inference_mode():
            assert load_pretrained(output)(images).isfinite().all()


@pytest.mark.parametrize("command", OF_A_QUICK_RUN)
def test_a_killed_command_leaves_what_loads(command, place, tmp_path, tries, record_property):
    began = time.monotonic()
    whole = start(command, place, tmp_path / "whole")
    _, error = whole.communicate(timeout=300)
    assert whole.returncode == 0, error
    duration = time.monotonic() - began
    check_what_is_left(command, tmp_path / "whole", finished=True)
    delays, killed = random.Random(command), 0
    outputs = (tmp_path / f"killed{index}" for index in itertools.count())
    output = next(outputs)
    while killed < KILLS[tries]:
        run = start(command, place, output)
        time.sleep(delays.uniform(0.3, 1.0) * duration)
        run.send_signal(signal.SIGKILL)
        _, error = run.communicate()
        assert run.returncode in (0, -signal.SIGKILL), error
        killed += run.returncode != 0
        check_what_is_left(command, output, finished=run.returncode == 0)
        if run.returncode == 0 or (output / "config.json").is_file() or output.is_file():  # another one, from the start
            output = next(outputs)
    run = start(command, place, output)
    _, error = run.communicate(timeout=300)
    assert run.returncode == 0, error
    check_what_is_left(command, output, finished=True)
    names = {path.name for path in (tmp_path / "whole").glob("*")}  # none for a file
    assert {path.name for path in output.glob("*")} == names
    assert not list(tmp_path.glob(f".{output.name}.*"))
    record_property("cases", killed)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs limits for a process of one's own")
@pytest.mark.parametrize("command", OF_A_QUICK_RUN)
def test_a_full_disk_is_an_error_that_says_so(command, place, tmp_path, tries, record_property):
    """No file may grow past a limit, which acts as a disk does that is full."""
    sizes, failed = random.Random(command), 0
    outputs = (tmp_path / f"full{index}" for index in itertools.count())
    output = next(outputs)
    while failed < KILLS[tries]:
        run = start(command, place, output, largest_file=int(2 ** sizes.uniform(8, 18)))
        _, error = run.communicate(timeout=300)
        check_what_is_left(command, output, finished=run.returncode == 0)
        if run.returncode == 0:  # it was large enough
            output = next(outputs)
        else:
            failed += 1
            assert "Traceback" not in error
            assert re.search(rf"pm-vit {command}: error: .*(written|too large|No space)", error), error
    run = start(command, place, output)
    _, error = run.communicate(timeout=300)
    assert run.returncode == 0, error
    check_what_is_left(command, output, finished=True)
    record_property("cases", failed)
