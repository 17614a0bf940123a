"""``pm-vit show`` and ``bench``: pictures of plans, tokens against latency."""

import json
import re

import numpy as np
import pytest
import torch
from helpers import plan_for, small_vit
from PIL import Image

from pm_models import AdaptivePlan, Segmenter, compress, load_pretrained, save_pretrained
from pm_models.cli import main, tools
from pm_models.data import read_sample
from pm_models.visualize import cluster_figure


@pytest.fixture
def saved(tmp_path):
    model = small_vit(depth=2)
    model = compress(model, plan_for(model))
    save_pretrained(model, tmp_path / "model")
    save_pretrained(model.uncompressed(), tmp_path / "dense")
    model.plan.save(tmp_path / "plan.json")
    Image.fromarray(np.full((50, 90, 3), 255, np.uint8)).save(tmp_path / "white.png")
    (tmp_path / "text.png").write_text("no picture")
    adaptive = compress(model.uncompressed(), AdaptivePlan.for_model(model.uncompressed(), gmacs=0.7))
    save_pretrained(adaptive, tmp_path / "adaptive")
    save_pretrained(Segmenter(adaptive, 3), tmp_path / "segmenter")
    adaptive.plan.save(tmp_path / "adaptive.json")
    noise = np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
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


@pytest.mark.parametrize("folder", ["adaptive", "segmenter"])
def test_show_what_merges(capsys, saved, monkeypatch, folder):
    figures, figure = [], tools.save_cluster_picture

    def draw(model, path, image, picture):
        figures.append((cluster_figure(model, image, picture), image, picture))
        figure(model, path, image, picture)

    monkeypatch.setattr(tools, "save_cluster_picture", draw)
    arguments = [saved / folder, saved / "noise.png", saved / "white.png", "--output", saved / "merging.png"]
    status, out, err = run(capsys, "show", *arguments)
    assert status == 0, err
    model = load_pretrained(saved / folder)
    encoder = getattr(model, "encoder", model)
    assert repr(encoder.plan) in out
    assert [line.split("/")[-1] for line in out.splitlines()[-2:]] == ["merging-1.png", "merging-2.png"]
    assert all(Image.open(saved / f"merging-{index}.png").width > 300 for index in (1, 2))
    for (drawn, image, picture), name in zip(figures, ("noise.png", "white.png"), strict=True):
        sample = read_sample(saved / name, model)
        assert torch.equal(image, sample.image)
        np.testing.assert_array_equal(picture, sample.picture)
        titles = [panel.get_title() for panel in drawn.axes if panel.images]
        merges = encoder.plan.merges.items()
        assert titles == ["36 tokens", *(f"before block {block}: {left} tokens" for block, left in merges)]


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
        (("show", "{0}/plan.json", "{0}/text.png"), "text.png is not a readable image"),
        (("show", "{0}/plan.json", "{0}/none.png"), "No such file.*none.png"),
        (("show", "{0}/adaptive"), "adaptive is an adaptive plan, .* give the folder of a model, and images"),
        (("show", "{0}/adaptive.json", "{0}/white.png"), "adaptive.json is an adaptive plan, .* the folder of a model"),
        (("show", "{0}/adaptive", "{0}/white.png", "{0}/text.png"), "text.png is not a readable image"),
        (("show", "{0}/segmenter", "{0}/none.png"), "No such file.*none.png"),
        (("bench", "vit_tny_patch16_224"), "is neither a saved folder nor a timm model; did you mean vit_tiny_patch16"),
        (("bench", "resnet10t"), "must be a timm VisionTransformer.*got ResNet"),
        (("bench", "{0}"), "is not a saved model: expected config.json"),
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
