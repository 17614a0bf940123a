"""The study of accuracy against speed: every kind of run, on a handful of images, and what the report makes of it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from bench import report, results, tables
from bench.accuracy.camvid import CLASSES, CamVid
from bench.accuracy.cifar10 import Cifar10
from bench.accuracy.runs import (
    CAMVID,
    CIFAR10,
    Run,
    Setting,
    classification_runs,
    new_encoder,
    part_runs,
    segmentation_runs,
)
from bench.accuracy.scoring import attention_received, evenly_spread
from bench.accuracy.study import Study
from pm_models import PMVisionTransformer
from pm_models.measure import count_gmacs

TINY = Setting(
    image=16, patch=4, width=16, depth=3, heads=2, batch=8, epochs=3, lr=1e-3, tune_epochs=1, tune_lr=1e-4,
    smaller_images=(12,), score_batches=2,
)  # fmt: skip
TINY_CAMVID = Setting(
    image=16, patch=4, width=16, depth=3, heads=2, batch=4, epochs=3, lr=1e-3, tune_epochs=1, tune_lr=1e-4,
    score_batches=2, decoder_depth=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _in_one_process(monkeypatch):
    monkeypatch.setattr(Study, "workers", 0)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("accuracy")
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cats", "dogs"):
            folder = root / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(8):
                Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return root


@pytest.fixture
def study(root):
    return Cifar10(TINY, root / "data", root / "work", "cpu")


@pytest.fixture(scope="module")
def camvid_root(tmp_path_factory):
    """Eight images to train on, four of the others: the left half of class 3, the right of class 5, the top void."""
    root = tmp_path_factory.mktemp("camvid")
    labels = np.full((24, 32), 3, np.uint8)
    labels[:, 16:] = 5
    labels[:3] = 11
    image = np.repeat(40 * labels[..., None], 3, axis=2)
    for split in ("train", "val", "test"):
        for kind, content in (("images", image), ("labels", labels)):
            (root / "data" / kind / split).mkdir(parents=True)
            for index in range(8 if split == "train" else 4):
                Image.fromarray(content).save(root / "data" / kind / split / f"{index}.png")
    return root


@pytest.fixture
def camvid(camvid_root):
    return CamVid(TINY_CAMVID, camvid_root / "data", camvid_root / "work", "cpu")


def test_every_run_has_a_name_of_its_own():
    classified = [classification_runs(setting, 3) for setting in (*CIFAR10.values(), TINY)]
    for runs in [*classified, *(segmentation_runs(setting, 3) for setting in CAMVID.values()), part_runs(3)]:
        names = [run.name for run in runs]
        assert len(set(names)) == len(names)
        assert "dense-seed0" in names
        assert {"prune_and_merge-keep0.7-seed2", "random_scores-keep0.7-seed2"} & set(names)
    for setting in CAMVID.values():
        assert setting.image // setting.patch % 2 == 0  # windows of 2 x 2 patches


def test_the_runs_are_what_they_are_called(study):
    gmacs = {}
    for run in classification_runs(TINY, 1):
        model = study.build(run)
        gmacs[run.name] = count_gmacs(model, (3, 16, 16))
        if isinstance(model, PMVisionTransformer):
            assert (model.size_bias, model.merge_site) == (
                run.compress.get("size_bias", False), run.compress.get("merge_site", "block"),
            )  # fmt: skip
    dense = gmacs["dense-seed0"]
    ours = [gmacs[f"prune_and_merge-keep{rate}-seed0"] for rate in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)]
    assert ours == sorted(ours)
    assert ours[-1] < dense
    assert gmacs["smaller_images-12px-seed0"] < 0.75 * dense
    for peer in ("tome", "evit", "random_scores"):
        assert gmacs[f"{peer}-keep0.6-seed0"] == pytest.approx(ours[2], rel=0.15)


def test_a_study_from_training_to_the_report(study, tmp_path, monkeypatch, capsys):
    runs = [
        Run("dense"), Run("dense", seed=1), Run("prune_and_merge", 0.5), Run("prune_and_merge", 0.5, seed=1),
        Run("prune_and_merge", 0.6, "size bias", {}, {"size_bias": True}), Run("smaller_images", image=12),
        Run("tome", 0.6), Run("evit", 0.6), Run("random_scores", 0.6),
    ]  # fmt: skip
    for run in runs:
        study.do(run)
    monkeypatch.setattr("bench.accuracy.cifar10.distillation_task", None)
    for run in runs:
        study.do(run)  # nothing is done twice
    monkeypatch.setattr("bench.accuracy.study.describe", lambda _: {"device": "cpu: x", "threads": 1})
    path = tmp_path / "cpu" / report.ACCURACY_FILE
    study.measure(path, [*runs, Run("tome", 0.4)], rounds=1)
    content, wrong = results.read(path)
    assert not wrong
    assert [record["name"] for record in content["records"]] == [run.name for run in runs]
    assert len(content["dense_epochs"]) == 3
    for record in content["records"]:
        assert 0 <= record["top1_before"] <= 100
        assert record["top1"] == record["epochs"][-1]["top1"]
        assert record["speedup"] > 0
    rows = tables.accuracy_table(content).splitlines()[2:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == [
        "dense", "prune and merge 0.5", "smaller images 12 px", "tome 0.6", "evit 0.6", "random scores 0.6",
        "prune and merge 0.6, size bias",
    ]  # fmt: skip
    top1 = [record["top1"] for record in content["records"]]
    drop = sum(top1[2:4]) / 2 - sum(top1[:2]) / 2
    assert rows[1].endswith(f"| {drop:+.2f} | 2 |")
    assert "of 3 blocks of width 16 on 16 patches" in report.training_note(report.ACCURACY_NOTE, content)
    report.ACCURACY_SECTION.pictures[0].save(content["records"], tmp_path)
    assert (tmp_path / "accuracy.png").is_file()
    assert json.loads(path.read_text())["setting"]["width"] == 16


def test_a_pretrained_model_is_compressed_before_anything_is_trained(root, tmp_path, monkeypatch):
    """From an encoder that is there; what was not fine-tuned has no figure for it."""
    setting = replace(TINY, pretrained=True, tune_images=9)
    encoder = new_encoder(TINY, num_classes=0)
    study = Cifar10(setting, root / "data", tmp_path / "work", "cpu", encoder)
    fresh = study.new_model()
    assert fresh.num_classes == 10
    assert all(
        torch.equal(weight, encoder.state_dict()[name])
        for name, weight in fresh.state_dict().items()
        if not name.startswith("head.")
    )
    runs = [run for run in classification_runs(setting, 1) if run.keep_rate in (None, 0.6)]
    assert [run.method for run in runs] == ["dense", "adaptive", "prune_and_merge", "tome", "evit", "merge_and_carry"]
    for run in runs:
        study.test(run)
    for run in runs[:2]:
        study.do(run)
    assert len(study.loaders(0, setting.tune_images)[0]) == 1  # of 8; the ninth makes no batch
    monkeypatch.setattr("bench.accuracy.study.describe", lambda _: {"device": "cpu: x", "threads": 1})
    path = tmp_path / "cpu" / report.PRETRAINED_FILE
    study.measure(path, runs, rounds=1)
    content, _ = results.read(path)
    ours = {record["method"]: record["gmacs"] for record in content["records"]}
    assert ours["adaptive"] <= ours["prune_and_merge"]
    rows = {row.split(" | ")[0].strip("| "): row.split(" | ") for row in tables.pretrained_table(content).splitlines()}
    assert rows["adaptive 0.6"][5].endswith("%")
    assert rows["tome 0.6"][5].strip() == ""
    assert rows["dense"][4] == "+0.00"
    for picture in report.SECTIONS[0].pictures:
        picture.save(content["records"], tmp_path)
        assert (tmp_path / picture.file).is_file()


def test_what_scores_are_worth(root, tmp_path, monkeypatch):
    """All runs of it, from their plans to the table."""
    study = Cifar10(TINY, root / "data", root / "work", "cpu")
    runs = part_runs(1)
    for run in runs:
        study.test(run)
    monkeypatch.setattr("bench.accuracy.study.describe", lambda _: {"device": "cpu: x", "threads": 1})
    path = tmp_path / "cpu" / report.PARTS_FILE
    study.measure(path, runs, rounds=1)
    rows = tables.parts_table(results.read(path)[0]).splitlines()
    assert len(rows) == 2 + len({run.name.rsplit("-seed", 1)[0] for run in runs})
    assert [row.split(" | ")[0] for row in rows if row.endswith("| 3 |")] == ["| random scores 0.7"]


def test_attention_received_is_timms():
    model, images = new_encoder(TINY, num_classes=3).eval(), torch.randn(6, 3, 16, 16)
    found = attention_received(model, [(batch, None) for batch in images.split(3)], 2)
    received = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, inputs, out: received.append(out.double()))
    model(images)
    assert found.shape == (3, 16)
    for ours, attention in zip(found, received, strict=True):
        expected = [attention[:, :, :, key].mean().item() for key in range(1, 17)]
        assert ours.tolist() == pytest.approx(expected, rel=1e-5)
    assert not any(block.attn._forward_pre_hooks for block in model.blocks)


@pytest.mark.parametrize("kept", [16, 49, 72])
def test_even_scores_keep_as_many_everywhere(kept):
    scores = evenly_spread(2, (12, 12))
    assert torch.equal(scores[0], scores[1])
    chosen = torch.zeros(144)
    chosen[scores[0].topk(kept).indices] = 1
    for part in chosen.view(2, 6, 2, 6).sum(dim=(1, 3)).flatten():
        assert part == pytest.approx(kept / 4, abs=2)


def test_a_study_of_segmentation(camvid, tmp_path, monkeypatch):
    runs = segmentation_runs(TINY_CAMVID, 1)
    for run in runs:
        camvid.do(run)
    monkeypatch.setattr("bench.accuracy.study.describe", lambda _: {"device": "cpu: x", "threads": 1})
    path = tmp_path / "cpu" / report.SEGMENTATION_FILE
    camvid.measure(path, runs, rounds=1)
    content, wrong = results.read(path)
    assert not wrong
    records = {record["name"]: record for record in content["records"]}
    assert list(records) == [run.name for run in runs]
    dense = records["dense-seed0"]
    for name, record in records.items():
        assert 0 <= record["miou"] <= 100
        if name != "dense-seed0":
            assert record["gmacs"] < dense["gmacs"]
            assert record["activation_bytes"] < dense["activation_bytes"]
        if record["method"] == "local_merge":
            ours = records[name.replace("local_merge", "prune_and_merge")]
            assert record["gmacs"] == pytest.approx(ours["gmacs"], rel=0.2)
    assert {file.name for file in path.parent.iterdir()} == {
        path.name, "segmentation_camvid.png", "segmentation_camvid_plan.png",
    }  # fmt: skip
    rows = tables.segmentation_table(content).splitlines()[2:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == [
        "dense", "prune and merge 0.8", "prune and merge 0.7", "prune and merge 0.5", "merge and carry 0.5",
        "merge and carry 0.7", "merge and carry 0.8", "local merge 0.8", "local merge 0.7", "local merge 0.5",
    ]  # fmt: skip
    drop = records["prune_and_merge-keep0.7-seed0"]["miou"] - dense["miou"]
    assert f"| {drop:+.2f} |" in rows[2]
    assert "of 3 blocks of width 16 on 16 patches" in report.training_note(report.SEGMENTATION_NOTE, content)


def test_a_pretrained_encoder_is_segmented_with_by_every_method(camvid_root, tmp_path):
    setting = replace(TINY_CAMVID, epochs=1, pretrained=True, decoder="linear", layer_decay=0.5, warmup_epochs=0)
    encoder = new_encoder(TINY_CAMVID, num_classes=0)
    study = CamVid(setting, camvid_root / "data", tmp_path / "work", "cpu", encoder)
    fresh = study.new_model()
    assert fresh.options["decoder"] == "linear"
    assert all(torch.equal(weight, encoder.state_dict()[name]) for name, weight in fresh.encoder.state_dict().items())
    runs = [run for run in segmentation_runs(setting, 1) if run.keep_rate in (None, 0.7)]
    assert [run.method for run in runs[1:]] == ["adaptive", "prune_and_merge", "tome", "local_merge", "merge_and_carry"]
    images, gmacs = torch.randn(2, 3, 16, 16), {}
    for run in runs:
        model = study.build(run)
        gmacs[run.method] = count_gmacs(model, (3, 16, 16))
        assert model(images).shape == (2, CLASSES, 16, 16)
        assert model.decoder is not study.dense.decoder  # fine-tuning leaves the dense model as it is
    assert gmacs["tome"] == pytest.approx(gmacs["prune_and_merge"], rel=0.2)


def test_the_tiny_segmenter_learns(camvid):
    """What the study measures is what is in the data: two classes of eleven."""
    found = camvid.evaluate(camvid.dense, camvid.test_loader(), accelerator=camvid.accelerator)
    assert len(found["iou"]) == CLASSES
    assert found["iou"][3] is not None
    assert found["iou"][5] is not None
