"""``pm-vit show`` and ``bench``: pictures of plans, tokens against latency."""

import json
import re

import numpy as np
import pytest
from helpers import plan_for, small_vit
from PIL import Image

from pm_models import compress, save_pretrained
from pm_models.cli import main


@pytest.fixture
def saved(tmp_path):
    model = small_vit(depth=2)
    model = compress(model, plan_for(model))
    save_pretrained(model, tmp_path / "model")
    save_pretrained(model.uncompressed(), tmp_path / "dense")
    model.plan.save(tmp_path / "plan.json")
    Image.fromarray(np.full((50, 90, 3), 255, np.uint8)).save(tmp_path / "white.png")
    (tmp_path / "text.png").write_text("no picture")
    return tmp_path


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("plan", ["plan.json", "model"])
def test_show(capsys, saved, plan):
    status, out, _ = run(capsys, "show", saved / plan, "--output", saved / "bare.png")
    assert status == 0
    assert "7 x 5 patches" in out
    white = saved / "white.png"
    status, out, _ = run(capsys, "show", saved / plan, white, white, "--output", saved / "over.png")
    assert status == 0
    assert [line.split("/")[-1] for line in out.splitlines()[-2:]] == ["over-1.png", "over-2.png"]
    bare, over = (np.asarray(Image.open(saved / name).convert("L")) for name in ("bare.png", "over-1.png"))
    assert over.shape == bare.shape
    assert over.mean() > bare.mean()  # white shines through the tint


def test_bench(capsys, saved):
    results, picture = saved / "times.json", saved / "latency.png"
    status, out, _ = run(
        capsys, "bench", saved / "model", "-b", "1", "3", "--device", "cpu", "--results-file", results,
        "--output", picture,
    )  # fmt: skip
    assert status == 0
    found = json.loads(results.read_text())
    assert list(found["batches"]) == ["1", "3"]
    for batch, table in found["batches"].items():
        assert table["tokens"][-1] == 36
        assert table["compressed"] > 0
        assert f"batch {batch} on cpu" in out
        assert f"the compressed model: {table['compressed']:.2f}x" in out
        last = next(line.split() for line in out.splitlines() if line.startswith("36 "))
        assert last[-1] == "1.00x"
    assert Image.open(picture).size[0] > 100
    status, out, _ = run(capsys, "bench", saved / "dense", "-b", "2", "--device", "cpu", "--amp", "--output", picture)
    assert status == 0
    assert "the compressed model" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "{0}/nowhere.json"), "nowhere.json"),
        (("show", "{0}"), None),
        (("show", "{0}/dense"), "holds an uncompressed model, which has no plan"),
        (("show", "{0}/model/README.md"), "README.md"),
        (("show", "{0}/plan.json", "{0}/text.png"), "text.png is no image that can be read"),
        (("show", "{0}/plan.json", "{0}/none.png"), "No such file.*none.png"),
        (("bench", "vit_tny_patch16_224"), "is neither a saved folder nor a timm model; did you mean vit_tiny_patch16"),
        (("bench", "resnet10t"), "must be a timm VisionTransformer.*got ResNet"),
        (("bench", "{0}"), "is no saved model: expected config.json"),
    ],
)
def test_mistakes_are_one_line(capsys, saved, arguments, message):
    if message is None:  # the folder itself has a plan.json
        assert run(capsys, *(part.format(saved) for part in arguments), "--output", saved / "x.png")[0] == 0
        return
    before = sorted(saved.rglob("*"))
    status, _, error = run(capsys, *(part.format(saved) for part in arguments), "--output", saved / "out.png")
    assert status == 2
    assert len(error.strip().splitlines()) == 1
    assert re.search(message, error), error
    assert sorted(saved.rglob("*")) == before
