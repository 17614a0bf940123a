"""The command line killed outright, in the middle of anything: what is left continues to the same end."""

import random
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Started

from pm_models import load_pretrained

KILLS = 2


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that cannot be caught")
def test_a_killed_run_continues_as_if_it_had_not_been(tmp_path):
    data = tmp_path / "data"
    noise = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cats", "dogs"):
            (data / split / name).mkdir(parents=True)
            for index in range(24):
                pixels = noise.integers(0, 255, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(data / split / name / f"{index}.png")
    command = [
        "train", data, "--model", "vit_tiny_patch16_224", "--img-size", "16",
        "--model-kwargs", "patch_size=8", "depth=3", "-b", "4", "-j", "0", "--device", "cpu", "--epochs", "5",
        "--warmup-epochs", "1", "--model-ema", "--recovery-interval", "1", "--output",
    ]  # fmt: skip

    def start(name):
        return Started(*command, tmp_path / name)

    whole = start("whole")
    state, delays = tmp_path / "killed" / "state", random.Random(0)
    for _ in range(KILLS):
        before = state.stat().st_mtime_ns if state.exists() else 0
        run = start("killed")
        deadline = time.monotonic() + 120
        while not (state.exists() and state.stat().st_mtime_ns != before) and run.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(delays.uniform(0, 0.3))
        run.send_signal(signal.SIGKILL)
        run.communicate()
        assert run.returncode == -signal.SIGKILL, "the run ended before it was killed"
    last = start("killed")
    out, err = last.communicate(timeout=300)
    assert last.returncode == 0, err
    assert "continuing after" in out
    whole.communicate(timeout=300)
    assert whole.returncode == 0
    expected, found = (load_pretrained(tmp_path / name).state_dict() for name in ("whole", "killed"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }
