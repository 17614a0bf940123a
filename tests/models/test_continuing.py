"""A run continues with what it began with, and names in one line what is not."""

import copy
import hashlib
import json
import os
import re

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import images_for, plan_for, small_vit
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from pm_models import Segmenter, compress, load_pretrained, save_pretrained
from pm_models.cli import main
from pm_models.training import (
    Recipe,
    SegmentationTask,
    classification_task,
    distillation_task,
    fit,
    make_accelerator,
)

# --- In Python: what fit is given.

DENSE = {"depth": 2, "num_classes": 7}


def run(state, *, images=16, batch=4, shuffle=True, model=DENSE, plan=None, options=None, task=None, teacher=0, **more):
    """A run of one epoch, whose state stays where it is."""
    torch.manual_seed(0)
    dense = small_vit(**model)
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(images, 3, 28, 20), torch.randint(0, 7, (images,)))
    student = dense
    if plan is not None:
        torch.manual_seed(2)
        student = compress(dense, plan_for(dense, **plan), **options or {})
    student.blocks[0].requires_grad_(more.pop("trains", True))
    if teacher is None:
        lesson = classification_task(student, **task or {})
    else:
        with torch.no_grad():
            dense = copy.deepcopy(dense)
            dense.norm.bias += teacher
        lesson = distillation_task(student, dense, **task or {})
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = make_accelerator(cpu=True, mixed_precision=more.pop("precision", "no"))
    recipe = Recipe(**{"epochs": 1, "lr": 1e-3} | more.pop("recipe", {}))
    loader = DataLoader(data, batch, shuffle=shuffle, num_workers=more.pop("workers", 0))
    return fit(lesson, loader, DataLoader(data, 8), recipe, accelerator=accelerator, state_dir=state, **more)


PLAN = {"keep_rate": 0.4, "prune_rate": 0.3}
DIFFERENCES = {
    "batch size": ({}, {"batch": 8}, "batch_size 4 -> 8, batches 4 -> 2"),
    "images": ({}, {"images": 18}, "images 16 -> 18, batches 4 -> 5"),
    "order": ({}, {"shuffle": False}, "sampler RandomSampler -> SequentialSampler"),
    "precision": ({}, {"precision": "bf16"}, "mixed_precision no -> bf16"),
    "recipe": ({}, {"recipe": {"epochs": 2, "seed": 3}}, "epochs 1 -> 2, seed 0 -> 3"),
    "smoothing": ({"teacher": None}, {"task": {"smoothing": 0.1}}, "criterion.label_smoothing 0.0 -> 0.1"),
    "alpha": ({}, {"task": {"alpha": 3.5}}, "distill_loss_weight 0.14.* -> 0.5"),
    "temperature": ({}, {"task": {"temperature": 2.0}}, "temperature 20.0 -> 2.0"),
    "teacher": ({}, {"teacher": 0.5}, r"teacher\.weights [0-9a-f]+ -> [0-9a-f]+"),
    "no teacher": (
        {},
        {"teacher": None},
        r"task LogitDistillationTask -> ClassificationTask, teacher\.weights [0-9a-f]+ -> None",
    ),
    "depth": ({}, {"model": DENSE | {"depth": 3}}, r"blocks\.2\.\S+ absent -> float32 \(.*, and \d+ more"),
    "width": ({}, {"model": DENSE | {"embed_dim": 48}}, r"cls_token float32 \(1, 1, 32\) -> float32 \(1, 1, 48\)"),
    "heads": ({}, {"model": DENSE | {"num_heads": 4}}, r"blocks\.0\.attn\.num_heads 2 -> 4"),
    "random depth": (
        {"model": DENSE | {"drop_path_rate": 0.1}},
        {"model": DENSE | {"drop_path_rate": 0.2}},
        r"blocks\.1\.drop_path1\.drop_prob 0\.1\d* -> 0\.2",
    ),
    "what trains": ({}, {"trains": False}, r"blocks\.0\.norm1\.weight float32 \(32,\) -> float32 \(32,\), frozen"),
    "compression": ({}, {"plan": PLAN}, r"stages\.0\.merge absent -> float32"),
    "plan": (
        {"plan": PLAN},
        {"plan": PLAN | {"row_weights": "average"}},
        r"plan tokens \((\d+, \d+)\), [0-9a-f]+ -> tokens \(\1\), [0-9a-f]+",
    ),
    "size bias": ({"plan": PLAN}, {"options": {"size_bias": True}}, "size_bias False -> True"),
    "shortcut": ({"plan": PLAN}, {"options": {"shortcut": "all"}}, "shortcut pruned -> all"),
    "matrices": (
        {"plan": PLAN},
        {"options": {"train_matrices": None}},
        r"stages\.0\.merge float32 \((\d+,)\) -> (absent|float32 \(\1\), frozen)",
    ),
    "settings": (
        {"settings": {"crop": 0.5, "model_kwargs": {"a": 1}, "size": (2, 3)}},
        {"settings": {"crop": 0.7, "model_kwargs": {"a": 1, "b": 2}, "size": (2, 3)}},
        r"crop 0\.5 -> 0\.7, model_kwargs\.b absent -> 2",
    ),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_a_run_with_other_settings_is_refused(tmp_path, capsys, difference):
    began, now, message = DIFFERENCES[difference]
    results = run(tmp_path / "state", **began)
    content = (tmp_path / "state" / "progress.txt").read_bytes()
    with pytest.raises(ValueError, match=r"holds an unfinished run that began with .*; continue it with that") as error:
        run(tmp_path / "state", **began | now)
    assert re.search(rf"\({message}", str(error.value)), error.value
    assert len(str(error.value).splitlines()) == 1
    assert (tmp_path / "state" / "progress.txt").read_bytes() == content
    assert run(tmp_path / "state", **began) == results
    assert "continuing after epoch 1 of 1" in capsys.readouterr().out


def test_what_decides_nothing_may_be_another(tmp_path):
    results = run(tmp_path / "state", settings={"data": "here"})
    (tmp_path / "state").rename(tmp_path / "moved")
    more = {"workers": 2, "recovery_interval": 3, "name": "other", "summary": tmp_path / "summary.csv"}
    assert run(tmp_path / "moved", settings={"data": "here"}, **more) == results


def test_a_segmentation_run_with_another_loss_is_refused(tmp_path):
    def run(alpha, classes):
        encoder = small_vit(depth=1, num_classes=0)
        model, teacher = (Segmenter(copy.deepcopy(encoder), classes, decoder="linear") for _ in range(2))
        data = TensorDataset(images_for(encoder, 4), torch.randint(0, 3, (4, 28, 20)))
        task = SegmentationTask(model, teacher, alpha=alpha)
        options = {"evaluator": lambda *_, **__: {"top1": 0.0}, "state_dir": tmp_path / "state"}
        fit(task, DataLoader(data, 2), [], Recipe(epochs=1, lr=1e-3), accelerator=make_accelerator(cpu=True), **options)

    run(1.0, 3)
    with pytest.raises(ValueError, match=r"alpha 1\.0 -> 0\.5"):
        run(0.5, 3)
    with pytest.raises(ValueError, match=r"decoder\.head\.weight float32 \(3, 32\) -> float32 \(4, 32\)"):
        run(1.0, 4)


def rewritten(state, change):
    """The state with other content in its progress file, under a digest that is right."""
    path = state / "progress.txt"
    values = json.loads(path.read_bytes().partition(b"\n")[2])
    change(values)
    content = json.dumps(values).encode()
    path.write_bytes(f"{hashlib.sha256(content).hexdigest()}\n".encode() + content)


@pytest.mark.parametrize("older", [True, False], ids=["older", "newer"])
def test_a_state_of_another_version_is_refused(tmp_path, older):
    run(tmp_path / "state")

    def change(values):
        if older:  # as it was written before settings were
            values["recipe"] = values.pop("began")["recipe"]
            del values["format"]
        else:
            values["format"] += 1

    rewritten(tmp_path / "state", change)
    message = (
        r"^\S+state holds an unfinished run of another version of pm-vit; finish it with that version, or delete it"
    )
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "state")


def test_a_state_that_does_not_load_is_told_in_one_line(tmp_path):
    run(tmp_path / "state")
    (tmp_path / "state" / "optimizer.bin").unlink()
    rewritten(tmp_path / "state", lambda values: values["files"].pop("optimizer.bin"))
    with pytest.raises(ValueError, match=r"^\S+state cannot be continued from \([^\n]*\); delete it to start anew$"):
        run(tmp_path / "state")


# --- On the command line.

SMALL = ["-j", "0", "-b", "4", "--epochs", "1", "--device", "cpu"]


@pytest.fixture
def data(tmp_path):
    """Eight pictures of cats and dogs to train on and to evaluate on; ``other`` has nine."""
    for root, count in (("data", 4), ("other", 5)):
        for split in ("train", "val"):
            for name in ("cats", "dogs"):
                (tmp_path / root / split / name).mkdir(parents=True)
                for index in range(count):
                    pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy()
                    Image.fromarray(pixels).save(tmp_path / root / split / name / f"{index}.png")
    torch.manual_seed(0)
    model = small_vit(img_size=32, patch_size=8, depth=2, num_classes=2)
    save_pretrained(model, tmp_path / "dense")
    save_pretrained(model, tmp_path / "copy")
    return tmp_path


def command(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    AcceleratorState._reset_state(reset_partial_state=True)
    return status, captured.out, captured.err


def stopped(capsys, monkeypatch, *arguments):
    """A run that is stopped when all is done but to save the model."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("pm_models.cli.commands.save_pretrained", interrupted)
        status, _, err = command(capsys, *arguments)
    assert status == 130, err


TRAIN = ["--model", "vit_tiny_patch16_224", "--img-size", "32", "--warmup-epochs", "0", "--model-kwargs", "depth=1"]
CHANGES = {
    "batch": (["-b", "2"], "batch_size 4 -> 2, batches 2 -> 4"),
    "epochs": (["--epochs", "2"], "epochs 1 -> 2"),
    "other data": (["{}/other"], "data_dir {0}/data -> {0}/other, images 8 -> 10"),
    "splits": (["--train-split", "val"], "train_split train -> val"),
    "validation": (["--val-split", "train"], "val_split validation -> train"),
    "smoothing": (["--smoothing", "0.2"], "smoothing 0.1 -> 0.2, criterion.label_smoothing 0.1 -> 0.2"),
    "scale": (["--scale", "0.5", "1"], "scale None -> [0.5, 1.0]"),
    "flips": (["--hflip", "0", "--vflip", "0.5"], "hflip 0.5 -> 0.0, vflip 0.0 -> 0.5"),
    "policy": (["--aa", "rand-m9-mstd0.5-inc1"], "aa None -> rand-m9-mstd0.5-inc1"),
    "erasing": (["--reprob", "0.25"], "reprob 0.0 -> 0.25"),
    "no augmentation": (["--no-aug"], "no_aug False -> True"),
    "normalisation": (["--mean", "0", "0", "0"], "mean None -> [0.0, 0.0, 0.0]"),
    "mixup": (["--mixup", "0.5"], "mixup 0.0 -> 0.5"),
    "precision": (["--amp"], "mixed_precision no -> bf16"),
    "model": (["--model", "deit_tiny_patch16_224"], "model vit_tiny_patch16_224 -> deit_tiny_patch16_224"),
    "weights": (["--model", "{}/dense"], "model vit_tiny_patch16_224 -> {0}/dense, cls_token float32 (1, 1, 192) -> "),
    "arguments": (["--model-kwargs", "depth=1", "drop_path_rate=0.1"], "model_kwargs.drop_path_rate absent -> 0.1"),
    "depth": (["--model-kwargs", "depth=2"], "model_kwargs.depth 1 -> 2, blocks.1."),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_command_line_refuses_other_settings(capsys, monkeypatch, data, change):
    arguments = ["train", *TRAIN, *SMALL, "--output", data / "out"]
    stopped(capsys, monkeypatch, *arguments, data / "data")
    changed, message = CHANGES[change]
    changed = [part.format(data) for part in changed]
    images = [] if change == "other data" else [data / "data"]
    status, _, err = command(capsys, *arguments, *images, *changed)
    assert status == 2
    assert err.startswith(f"pm-vit train: error: {data}/out/state holds an unfinished run that began with ")
    assert f"({message.format(data)}" in err
    assert len(err.splitlines()) == 1
    monkeypatch.chdir(data)  # other ways to say the same, and what decides nothing
    incidental = ["-j", "1", "--device", "auto", "--recovery-interval", "2", "--grad-checkpointing", "--lr-base", "3"]
    status, out, err = command(capsys, *arguments, "data", *incidental, "--lr", "5e-4", "--output", "out")
    assert status == 0, err
    assert f"continuing after epoch 1 of 1, from out{os.sep}state" in out


def test_finetune_refuses_other_settings(capsys, monkeypatch, data):
    arguments = ["finetune", data / "data", "--model", data / "dense", *SMALL, "--output", data / "out"]
    rates = ["--keep-rate", "0.5", "--prune-rate", "0.2", "--score-batches", "2"]
    assert command(capsys, *arguments, *rates, "--seed", "5")[0] == 0
    (data / "out" / "config.json").unlink()
    plan = load_pretrained(data / "out" / "compressed").plan
    began = f"pm-vit finetune: error: {data}/out/compressed holds an unfinished run that began with "
    for changed, message in (
        (["--keep-rate", "0.7"], "keep_rate 0.5 -> 0.7"),
        (["--score-batches", "1", "--stages", "0-1"], "score_batches 2 -> 1, stages None -> [[0, 1]]"),
        (["--model", data / "copy"], f"model {data}/dense -> {data}/copy"),
        (["--seed", "6"], "seed 5 -> 6"),
        (["--amp"], "mixed_precision no -> bf16"),
    ):
        status, _, err = command(capsys, *arguments, *rates, "--seed", "5", *changed)
        assert status == 2
        assert err.startswith(began)
        assert err.endswith(f"({message})\n")
    arguments += ["--seed", "5"]
    status, _, err = command(capsys, *arguments, "--model", data / "copy")  # also where no rate is given again
    assert (status, err.startswith(began)) == (2, True)
    stopped(capsys, monkeypatch, *arguments, *rates)
    for changed, message in (
        (["--distill-alpha", "0.5"], "distill_alpha 1.0 -> 0.5, "),
        (["--distill-temperature", "3"], "distill_temperature 20.0 -> 3.0, temperature 20.0 -> 3.0)"),
        (["--teacher", data / "dense"], f"teacher None -> {data}/dense)"),
        (["--smoothing", "0.1"], "smoothing 0.0 -> 0.1, criterion.label_smoothing 0.0 -> 0.1)"),
    ):
        status, _, err = command(capsys, *arguments, *rates, *changed)
        assert status == 2
        assert err.startswith(f"pm-vit finetune: error: {data}/out/state holds an unfinished run that began with ")
        assert f"({message}" in err
    status, out, err = command(capsys, *arguments)
    assert status == 0, err
    assert "continuing after epoch 1 of 1" in out
    assert load_pretrained(data / "out").plan == plan
