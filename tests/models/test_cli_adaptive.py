"""``pm-vit compress`` and ``finetune`` with ``--adaptive``: without data, to a budget, and on the way to training."""

import json
import re

import numpy as np
import pytest
from helpers import plan_for, small_vit
from PIL import Image

from pm_models import AdaptivePlan, Segmenter, budget, compress, load_pretrained, save_pretrained
from pm_models.budget import LatencyTable
from pm_models.cli import main
from pm_models.measure import count_gmacs

SIZE = (3, 32, 32)
MODEL = ["--model", "vit_tiny_patch16_224", "--img-size", "32"]
SHAPE = ["--model-kwargs", "patch_size=4", "embed_dim=32", "depth=4", "num_heads=2"]
COMMON = ["-b", "4", "--device", "cpu"]


def run(capsys, command, *arguments):
    status = main([str(argument) for argument in (command, *arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def dense(tmp_path):
    save_pretrained(small_vit(img_size=32, depth=4), tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def data(tmp_path):
    random = np.random.default_rng(0)
    for split in ("train", "validation"):
        for name in map(str, range(7)):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            pixels = random.integers(0, 255, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / split / name / "0.png")
    return tmp_path / "data"


def test_a_named_model(capsys, tmp_path):
    output = tmp_path / "fast"
    status, out, err = run(capsys, "compress", *MODEL, *SHAPE, *COMMON, "--adaptive", "--output", output)
    assert status == 0, err
    assert "pm-vit: warning: vit_tiny_patch16_224 has random weights" in err
    assert {path.name for path in output.iterdir()} == {"README.md", "config.json", "model.safetensors", "plan.json"}
    model = load_pretrained(output)
    dense = model.uncompressed()
    assert dense.num_classes == 1000
    assert model.plan == AdaptivePlan.load(output / "plan.json") == AdaptivePlan.for_model(dense)
    before, after = (count_gmacs(part, SIZE) for part in (dense, model))
    assert 0.6 * before < after <= 0.62 * before
    assert repr(model.plan) in out
    assert f"GMACs per image: {before:.4g} before, {after:.4g} after ({after / before:.1%})" in out
    assert f"compressed model: {output}; next: pm-vit show {output} IMAGE" in out


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_gmacs(capsys, dense, tmp_path, share):
    whole = count_gmacs(load_pretrained(dense), SIZE)
    arguments = ["--model", dense, *COMMON, "--adaptive", "--target-gmacs", share * whole]
    status, out, err = run(capsys, "compress", *arguments, "--output", tmp_path / "fast")
    assert status == 0, err
    found = count_gmacs(load_pretrained(tmp_path / "fast"), SIZE)
    assert (share - 0.03) * whole < found <= share * whole
    assert f"adaptive merging for {share * whole:g} GMACs: {found:.4g}" in out
    assert "warning" not in err


def test_speed(capsys, dense, monkeypatch, tmp_path):
    """Of a device that is slower than the table says; the table alone would choose other tokens."""
    table = LatencyTable(tokens=(2, 65), seconds=(0.5, 6.0), rest=0.5)

    def speed(plan):
        return 1 + 0.7 * (table.speedup(plan) - 1)

    monkeypatch.setattr(budget, "measure_latency", lambda model, images: table)
    monkeypatch.setattr(budget, "_speedup", lambda model, compressed, images: speed(compressed.plan))
    arguments = ["--model", dense, *COMMON, "--adaptive", "--target-speedup", "1.5", "--output", tmp_path / "fast"]
    status, out, err = run(capsys, "compress", *arguments)
    assert status == 0, err
    plan = load_pretrained(tmp_path / "fast").plan
    plans = AdaptivePlan.candidates(load_pretrained(dense))
    assert plan in plans
    assert abs(speed(plan) - 1.5) <= min(abs(speed(other) - 1.5) for other in plans) + 0.015
    told = f"adaptive merging for 1.5 times the speed: {speed(plan):.3f} times, measured at batch 4 on cpu"
    assert told in out


def test_a_segmenter(capsys, tmp_path):
    common = ["--task", "segmentation", *COMMON, "--adaptive"]
    status, _, err = run(capsys, "compress", *MODEL, *SHAPE, *common, "--num-classes", "3", "--output", tmp_path / "a")
    assert status == 0, err
    first = load_pretrained(tmp_path / "a")
    assert isinstance(first, Segmenter)
    assert first.num_classes == 3
    whole = count_gmacs(first.uncompressed(), SIZE)
    assert count_gmacs(first, SIZE) <= 0.62 * whole
    save_pretrained(first.uncompressed(), tmp_path / "dense")
    arguments = ["--model", tmp_path / "dense", *common, "--target-gmacs", 0.8 * whole, "--output", tmp_path / "b"]
    status, _, err = run(capsys, "compress", *arguments)
    assert status == 0, err
    second = load_pretrained(tmp_path / "b")
    assert 0.77 * whole < count_gmacs(second, SIZE) <= 0.8 * whole
    assert sum(second.encoder.plan.tokens) > sum(first.encoder.plan.tokens)
    status, _, err = run(capsys, "compress", *MODEL, *SHAPE, *common, "--output", tmp_path / "c")
    assert status == 2
    assert "--num-classes must be given for a Segmenter on vit_tiny_patch16_224, because there is no data" in err
    status, _, err = run(capsys, "compress", "--model", tmp_path / "dense", *COMMON, "--adaptive", "--output", tmp_path)
    assert status == 2
    assert "holds a Segmenter: give --task segmentation" in err


def test_a_model_that_is_compressed_already(capsys, tmp_path):
    model = small_vit(img_size=32, depth=4)
    save_pretrained(compress(model, plan_for(model)), tmp_path / "static")
    arguments = ["--model", tmp_path / "static", *COMMON, "--adaptive", "--output", tmp_path / "fast"]
    status, _, err = run(capsys, "compress", *arguments)
    assert status == 0, err
    assert load_pretrained(tmp_path / "fast").plan == AdaptivePlan.for_model(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-gmacs", "1e-9"], "target_gmacs must be at least .*, with the fewest tokens, got 1e-09"),
        (["--target-speedup", "0.9"], "target_speedup must be above 1, got 0.9"),
        (["--stages", "0-1"], "--stages cannot be given with --adaptive, which takes only --target-gmacs or"),
        (["--keep-rate", "0.5"], "--keep-rate cannot be given with --adaptive"),
        (["--shortcut=pruned", "--alloc", "global", "--score-batches", "16"],  # as they are without
         "--score-batches, --allocation, --shortcut cannot be given with --adaptive"),
        (["--score-batches", "3", "--merge-site", "attention", "--train-matrices", "none", "--allocation", "layer",
          "--segments", "nearest", "--row-weights", "average", "--shortcut", "all", "--score-decay", "0"],
         "--score-decay, --score-batches, --allocation, --row-weights, --segments, --train-matrices, --shortcut, "
         "--merge-site cannot be given with --adaptive"),
    ],
)  # fmt: skip
def test_mistakes(capsys, dense, tmp_path, arguments, message):
    arguments = ["--model", dense, *COMMON, "--adaptive", *arguments, "--output", tmp_path / "out"]
    status, _, err = run(capsys, "compress", *arguments)
    assert (status, len(err.splitlines())) == (2, 1)
    assert re.search(f"pm-vit compress: error: {message}", err), err
    assert not (tmp_path / "out").exists()


def test_a_file_with_rates(capsys, dense, tmp_path):
    """--adaptive on the command line comes before a file's rates, such as those of the shipped recipes."""
    arguments = ["--model", dense, *COMMON, "--output", tmp_path / "fast"]
    status, _, err = run(capsys, "compress", *arguments, "--config", "deit_small", "--adaptive")
    assert status == 0, err
    assert isinstance(load_pretrained(tmp_path / "fast").plan, AdaptivePlan)
    for text, given, named in (
        ("keep_rate: 0.5", [], "--keep-rate"),
        ("segments: raster", ["--merge-site", "block"], "--segments, --merge-site"),  # their defaults
    ):
        (tmp_path / "both.yaml").write_text(f"adaptive: true\n{text}\n")
        arguments = ["--model", dense, *COMMON, "--output", tmp_path / "again", "--config", tmp_path / "both.yaml"]
        status, _, err = run(capsys, "compress", *arguments, *given)
        assert (status, len(err.splitlines())) == (2, 1)
        assert f"error: {named} cannot be given with --adaptive" in err


def test_finetune_compresses_first(capsys, data, dense, tmp_path):
    """Stopped and started again it plans nothing anew, and refuses another way to compress."""
    arguments = [data, "--model", dense, *COMMON, "-j", "0", "--epochs", "1", "--output", tmp_path / "tuned"]
    status, out, err = run(capsys, "finetune", *arguments, "--adaptive")
    assert status == 0, err
    model = load_pretrained(dense)
    tuned, compressed = load_pretrained(tmp_path / "tuned"), load_pretrained(tmp_path / "tuned" / "compressed")
    assert tuned.plan == compressed.plan == AdaptivePlan.for_model(model)
    weights, changed = model.state_dict(), tuned.state_dict()
    assert all((compressed.state_dict()[name] == weights[name]).all() for name in weights)
    assert any((changed[name] != weights[name]).any() for name in weights)
    rows = json.loads((tmp_path / "tuned" / "training.json").read_text())["models"]
    assert rows["finetune"]["tokens"] == list(tuned.plan.tokens)
    assert rows["dense"]["tokens"] == [65] * 4

    (tmp_path / "tuned" / "config.json").unlink()  # as if it had been stopped just before its end
    began = "holds an unfinished run that began with"
    rates = ["--keep-rate", "0.5", "--prune-rate", "0.1"]
    for given, message in (
        (rates, r"adaptive=True, keep_rate=None, .*adaptive True -> False"),
        (["--adaptive", "--target-gmacs", "0.001"], r"target_gmacs None -> 0\.001"),
        (["--adaptive", "--seed", "4"], "seed 0 -> 4"),
    ):
        status, _, err = run(capsys, "finetune", *arguments, *given)
        assert status == 2
        assert re.search(f"{began} .*{message}", err), err
    for given in (["--adaptive"], []):
        status, out, err = run(capsys, "finetune", *arguments, *given)
        assert status == 0, err
        assert "GMACs per image" not in out
        (tmp_path / "tuned" / "config.json").unlink()
