"""``pm-vit --task segmentation`` on small folders of images and label maps."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from helpers import published_segmenter
from PIL import Image

from pm_models import PMVisionTransformer, Segmenter, load_pretrained
from pm_models.cli import main
from pm_models.segmentation import SegmentationImages, evaluate_segmentation, make_evaluation_loader
from pm_models.training import Recipe, classification_task, fit, make_accelerator

COMMON = ["--task", "segmentation", "-j", "0", "-b", "4", "--device", "cpu"]
MODEL = ["--model", "vit_tiny_patch16_224", "--img-size", "32", "--num-classes", "3"]
SHAPE = ["--model-kwargs", "patch_size=8", "embed_dim=32", "depth=3", "num_heads=2"]
TRAINING = ["--epochs", "4", "--warmup-epochs", "1", "--lr", "3e-3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A left part in red, a right one in green or blue, labelled so, but for 7, which is void; sizes differ."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 5)):
        for index in range(count):
            width = 40 + 4 * index
            labels = np.zeros((36, width), np.uint8)
            labels[:, width // 3 :] = 1 + index % 2
            image = random.integers(0, 60, (36, width, 3), dtype=np.uint8)
            image[np.arange(36)[:, None], np.arange(width), labels] += 180
            labels[:4] = 7
            for folder, content in (("images", image), ("labels", labels)):
                path = root / folder / split / f"{index:02}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(content).save(path)
    return root


def run(capsys, command, *arguments):
    status = main([str(argument) for argument in (command, *arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def dense(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("dense") / "model"
    arguments = ["train", data, *MODEL, *SHAPE, *COMMON, *TRAINING, "--ignore-index", "7", "--output", output]
    assert main([str(argument) for argument in arguments]) == 0
    return output


def measured(folder, data, **options):
    images = SegmentationImages(data, "validation", num_classes=3, ignore_index=7)
    model = load_pretrained(folder)
    accelerator = make_accelerator(cpu=True)
    return evaluate_segmentation(
        model, make_evaluation_loader(images, model, workers=0), accelerator=accelerator, **options
    )


def test_train(data, dense):
    model = load_pretrained(dense)
    assert isinstance(model, Segmenter)
    assert (model.num_classes, model.image_size, model.options["decoder"]) == (3, (32, 32), "mask_transformer")
    names = {"README.md", "config.json", "model.safetensors", "training.json", "summary.csv", "predictions.png"}
    assert {path.name for path in dense.iterdir()} == names
    rows = list(csv.DictReader((dense / "summary.csv").open()))
    assert float(rows[-1]["eval_miou"]) > float(rows[0]["eval_miou"])
    expected = measured(dense, data)
    assert float(rows[-1]["eval_miou"]) == pytest.approx(expected.miou, abs=0.2)
    row = json.loads((dense / "training.json").read_text())["models"]["train"]
    assert row["miou"] == pytest.approx(expected.miou, abs=0.2)
    assert row["tokens"] == [17] * 3
    assert Image.open(dense / "predictions.png").width > 300


def test_compress_finetune_and_eval(capsys, data, dense, tmp_path):
    common = [*COMMON, "--ignore-index", "7"]
    rates = ["--keep-rate", "0.5", "--prune-rate", "0.1", "--score-batches", "2"]
    status, out, err = run(
        capsys, "compress", data, "--model", dense, *common, *rates, "--size-bias", "--output", tmp_path / "small"
    )
    assert status == 0, err
    assert f"next: pm-vit finetune {data} --task segmentation --model {tmp_path / 'small'}" in out
    encoder = load_pretrained(tmp_path / "small").encoder
    assert isinstance(encoder, PMVisionTransformer)
    assert encoder.size_bias
    again = [*common, *rates, "--size-bias", "--output", tmp_path / "again"]
    assert run(capsys, "compress", data, "--model", dense, *again)[0] == 0
    assert load_pretrained(tmp_path / "again").encoder.plan == encoder.plan

    tuned = tmp_path / "tuned"
    status, out, err = run(
        capsys, "finetune", data, "--model", tmp_path / "small", *common, "--epochs", "2", "--output", tuned
    )
    assert status == 0, err
    assert "mIoU" in out
    assert "dense" in out
    rows = json.loads((tuned / "training.json").read_text())["models"]
    assert rows["dense"]["miou"] == pytest.approx(measured(dense, data).miou, abs=0.2)
    assert rows["finetune"]["gmacs"] < rows["dense"]["gmacs"]
    expected = {"predictions.png", "accuracy.png", *(f"plan-{index}.png" for index in (1, 2, 3))}
    assert expected < {path.name for path in tuned.iterdir()}

    scales = ["--scales", "0.75", "1.5", "--flip", "--stride", "9", "--results-file", tmp_path / "results.json"]
    status, out, err = run(capsys, "eval", data, "--model", tuned, *common, *scales)
    assert status == 0, err
    found = measured(tuned, data, scales=(0.75, 1.5), flip=True, stride=9)
    result = json.loads((tmp_path / "results.json").read_text())
    assert (result["miou"], result["macc"], result["aacc"]) == pytest.approx(found[:3], abs=0.2)
    assert result["iou"] == pytest.approx(found.iou, abs=0.2)
    assert f"mIoU {result['miou']:.2f}%, mAcc {result['macc']:.2f}%, aAcc {result['aacc']:.2f}%" in out
    assert "IoU of each class: 0 " in out


def test_finetune_compresses_first(capsys, data, dense, tmp_path):
    budget = ["--target-gmacs", "0.001", "--prune-rate", "0.1", "--score-batches", "1", "--epochs", "1"]
    arguments = [data, "--model", dense, *COMMON, "--ignore-index", "7", *budget, "--output", tmp_path / "o"]
    status, _out, err = run(capsys, "finetune", *arguments)
    assert status == 0, err
    rows = json.loads((tmp_path / "o" / "training.json").read_text())["models"]
    assert 0.0009 < rows["finetune"]["gmacs"] <= 0.001


def test_a_published_segmenter(capsys, data, tmp_path):
    published_segmenter(tmp_path / "toy", size=(32, 32))
    status, out, err = run(capsys, "eval", data, "--model", tmp_path / "toy", *COMMON, "--ignore-index", "7")
    assert status == 0, err
    assert "mIoU" in out


def test_options_from_a_file(capsys, data, tmp_path):
    values = {"task": "segmentation", "ignore_index": 7, "epochs": 1, "warmup_epochs": 0, "sched": "poly"}
    values |= {"decoder": "linear", "scale": [0.75, 1.25], "opt": "sgd", "mean": [0.5] * 3}
    (tmp_path / "o.yaml").write_text(yaml.safe_dump(values))
    arguments = [data, *MODEL, *SHAPE, "-j", "0", "-b", "8", "--device", "cpu", "--config", tmp_path / "o.yaml"]
    status, _, err = run(capsys, "train", *arguments, "--output", tmp_path / "o")
    assert status == 0, err
    recipe = json.loads((tmp_path / "o" / "training.json").read_text())["recipe"]
    assert (recipe["sched"], recipe["opt"]) == ("poly", "sgd")
    assert load_pretrained(tmp_path / "o").options["decoder"] == "linear"
    (tmp_path / "o.yaml").write_text(yaml.safe_dump(values | {"mixup": 0.8}))
    status, _, err = run(capsys, "train", *arguments, "--output", tmp_path / "p")
    assert status == 2
    assert "mixup: no such option" in err


def test_the_shipped_recipe(capsys, data, dense, tmp_path):
    """With the data, a model and the folder it is the whole of both commands, here with fewer pixels and steps."""
    small = ["--config", "segmenter_small", "-j", "0", "-b", "8", "--device", "cpu", "--no-amp", "--epochs", "1"]
    small += ["--ignore-index", "7"]
    arguments = [data, *MODEL, *SHAPE, *small, "--output", tmp_path / "dense"]
    status, _, err = run(capsys, "train", *arguments)
    assert status == 0, err
    recipe = json.loads((tmp_path / "dense" / "training.json").read_text())["recipe"]
    assert (recipe["opt"], recipe["sched"], recipe["lr"], recipe["weight_decay"]) == ("momentum", "poly", 1e-3, 0.0)
    assert load_pretrained(tmp_path / "dense").options["decoder_dropout"] == 0.1
    arguments = [data, "--model", dense, *small, "--score-batches", "1", "--output", tmp_path / "tuned"]
    status, _, err = run(capsys, "finetune", *arguments)
    assert status == 0, err
    tokens = load_pretrained(tmp_path / "tuned").encoder.plan.tokens
    assert sum(tokens) == 3 + int(0.7 * 16 * 3)


@pytest.mark.parametrize("command", ["train", "compress", "finetune"])
def test_labels_that_cannot_be_learned_are_told_first(capsys, tmp_path, command):
    """Masks of 0 and 255, before the training, which is stopped here by an image that is broken."""
    for split in ("train", "val"):
        for index in range(2):
            for folder, content in (("images", np.zeros((36, 40, 3))), ("labels", np.eye(36, 40) * 255)):
                path = tmp_path / "data" / folder / split / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(content.astype(np.uint8)).save(path)
            if split == "train":
                (tmp_path / "data" / "images" / split / f"{index}.png").write_bytes(b"broken")
    arguments = [*MODEL, "--num-classes", "2", *SHAPE, *COMMON, "-b", "1"]
    if command != "train":
        arguments += ["--keep-rate", "0.5", "--prune-rate", "0.1", "--score-batches", "1"]
    status, _, err = run(capsys, command, tmp_path / "data", *arguments, "--output", tmp_path / "o")
    assert status == 2
    lines = [line for line in err.splitlines() if "random weights" not in line and line.startswith("pm-vit")]
    where = f"the 2 label maps in {tmp_path}/data/labels/train"
    assert lines[0] == f"pm-vit: warning: 1 of 2 classes never occur in {where}, and cannot be learned: 1"
    assert lines[1].startswith(f"pm-vit: warning: 2 of {where} hold only 0 and 255 (the first: ")
    assert re.search(r"images/train/\d.png is not a readable image", lines[2])
    assert len(lines) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_line(capsys, data, tmp_path, workers):
    shutil.copytree(data, tmp_path / "data")
    for path in (tmp_path / "data" / "images" / "train").iterdir():
        path.write_bytes(path.read_bytes()[:-200])
    arguments = [tmp_path / "data", *MODEL, *SHAPE, *COMMON, "--ignore-index", "7", "-j", workers, *TRAINING]
    status, _, err = run(capsys, "train", *arguments, "--output", tmp_path / "o")
    assert status == 2
    last = err.strip().splitlines()[-1]
    assert re.match(rf"pm-vit train: error: {tmp_path}/data/images/train/\d\d.png is not a readable image", last)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unknown_class_is_one_line(capsys, data, tmp_path, workers):
    arguments = [data, *MODEL, *SHAPE, *COMMON, "-j", workers, *TRAINING, "--output", tmp_path / "o"]
    status, _, err = run(capsys, "train", *arguments)
    assert status == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"pm-vit train: error: {data}")
    assert "has the class 7, expected 0 to 2" in last


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--num-classes", None], "num_classes must be given for"),
        (["--decoder-kwargs", "depht=2"], "--decoder-kwargs takes depth, heads, drop_path and dropout"),
        (["--decoder-kwargs", "heads=5"], "decoder_heads must divide the encoder's width 32, got 5"),
        (["--model", "vit_tny_patch16"], "is neither a saved folder nor a timm model"),
        (["--scale", "2", "1"], "scale must be two numbers above 0, the smaller first, got 2 and 1"),
        (["-b", "99"], "the data has 16 images, expected at least 99"),
        (["--val-split", "holdout"], "has no folder holdout"),
        (["--img-size", "20"], "img_size"),
    ],
)
def test_mistakes(capsys, data, tmp_path, change, message):
    arguments = [data, *MODEL, *SHAPE, *COMMON, *TRAINING, "--ignore-index", "7"]
    if change[-1] is None:
        place = arguments.index(change[0])
        arguments = arguments[:place] + arguments[place + 2 :]
    else:
        arguments += change
    status, _, err = run(capsys, "train", *arguments, "--output", tmp_path / "o")
    assert (status, len(err.strip().splitlines())) == (2, 1), err
    assert message in err
    assert not (tmp_path / "o").exists()


def test_models_and_data_of_another_task(capsys, data, dense, tmp_path):
    images = tmp_path / "images"
    for split in ("train", "val"):
        for name in ("a", "b"):
            (images / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(images / split / name / "0.png")
    status, _, err = run(capsys, "eval", images, "--model", dense, "-b", "1", "-j", "0", "--device", "cpu")
    assert status == 2
    assert "holds a Segmenter: give --task segmentation" in err
    arguments = ["--model", dense, *COMMON, "--num-classes", "4"]
    status, _, err = run(capsys, "eval", data, *arguments)
    assert status == 2
    assert "the data has 4 classes, but the model distinguishes 3" in err
    with pytest.raises(SystemExit):
        main(["train", str(data), *MODEL, *COMMON, "--mixup", "0.8", "--output", str(tmp_path / "o")])
    assert "unrecognized arguments: --mixup 0.8" in capsys.readouterr().err


def test_poly_falls_as_segmenter_is_trained():
    """The learning rate of step t of T is that of the start times (1 - t / T)^0.9."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    data = [(torch.randn(3), index % 2) for index in range(8)]
    loader = torch.utils.data.DataLoader(data, 2)
    recipe = Recipe(epochs=3, lr=0.1, opt="sgd", sched="poly")
    results = fit(classification_task(model), loader, loader, recipe, accelerator=make_accelerator(cpu=True))
    assert [result.lr for result in results] == pytest.approx([0.1 * (1 - step / 12) ** 0.9 for step in (3, 7, 11)])
    with pytest.raises(ValueError, match="sched must be one of cosine, poly, got step"):
        Recipe(epochs=3, lr=0.1, sched="step")
