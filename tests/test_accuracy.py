"""The study of accuracy against speed: every kind of run, on a handful of images, and what the report makes of it."""

import json

import numpy as np
import pytest
from PIL import Image

from bench import report, results
from bench.accuracy.curve import Study
from bench.accuracy.runs import SETTINGS, Run, Setting, all_runs
from pm_models import PMVisionTransformer
from pm_models.measure import count_gmacs

TINY = Setting(
    image=16, patch=4, width=16, depth=3, heads=2, batch=8, epochs=3, lr=1e-3, tune_epochs=1, tune_lr=1e-4,
    smaller_images=(12,), score_batches=2,
)  # fmt: skip


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
    return Study(TINY, root / "data", root / "work", "cpu")


def test_every_run_has_a_name_of_its_own():
    for setting in (*SETTINGS.values(), TINY):
        names = [run.name for run in all_runs(setting, 3)]
        assert len(set(names)) == len(names)
        assert "dense-seed0" in names
        assert "prune_and_merge-keep0.6-seed2" in names


def test_the_runs_are_what_they_are_called(study):
    gmacs = {}
    for run in all_runs(TINY, 1):
        model = study.build(run)
        gmacs[run.name] = count_gmacs(model, (3, 16, 16))
        if isinstance(model, PMVisionTransformer):
            assert (model.size_bias, model.merge_site) == (
                run.compress.get("size_bias", False), run.compress.get("merge_site", "block"),
            )  # fmt: skip
    dense = gmacs["dense-seed0"]
    ours = [gmacs[f"prune_and_merge-keep{rate}-seed0"] for rate in (0.4, 0.5, 0.6, 0.7, 0.8)]
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
    monkeypatch.setattr("bench.accuracy.curve.distillation_task", None)
    for run in runs:
        study.do(run)  # nothing is done twice
    monkeypatch.setattr("bench.accuracy.curve.describe", lambda _: {"device": "cpu: x", "threads": 1})
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
    rows = report.accuracy_table(content).splitlines()[2:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == [
        "dense", "prune and merge 0.5", "smaller images 12 px", "tome 0.6", "evit 0.6", "random scores 0.6",
        "prune and merge 0.6, size bias",
    ]  # fmt: skip
    top1 = [record["top1"] for record in content["records"]]
    drop = sum(top1[2:4]) / 2 - sum(top1[:2]) / 2
    assert rows[1].endswith(f"| {drop:+.2f} | 2 |")
    assert "size bias" not in report.accuracy_table(content, variants=False)
    assert "of 3 blocks of width 16 on 16 patches" in report.accuracy_note(content)
    (plot,) = (plot for plot in report.PLOTS if plot.file == "accuracy.png")
    plot.draw(content["records"], tmp_path / "accuracy.png")
    assert json.loads(path.read_text())["setting"]["width"] == 16
