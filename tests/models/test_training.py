"""Losses against formulas, continuing a killed run, evaluation counts, and errors."""

import contextlib
import copy
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from helpers import images_for, plan_for, small_vit
from torch.utils.data import DataLoader, TensorDataset

from pm_models import compress
from pm_models.training import Recipe, classification_task, distillation_task, evaluate, fit, make_accelerator


@pytest.fixture
def accelerator():
    return make_accelerator(cpu=True)


def loaders(model, images=24, batch=8):
    data = TensorDataset(images_for(model, images), torch.randint(0, 7, (images,)))
    return DataLoader(data, batch, shuffle=True), DataLoader(data, 10)


def test_distillation_loss_is_the_papers():
    teacher = small_vit()
    student = compress(teacher, plan_for(teacher))
    images, targets = images_for(teacher), torch.randint(0, 7, (3,))
    result = distillation_task(student, teacher, alpha=0.8, temperature=20.0)(images, targets)
    student_log, teacher_log = (F.log_softmax(model(images).double() / 20, dim=-1) for model in (student, teacher))
    divergence = (teacher_log.exp() * (teacher_log - student_log)).mean()  # over batch and classes
    expected = F.cross_entropy(student(images), targets).double() + 0.8 * 400 * divergence
    torch.testing.assert_close(result["loss"].double(), expected, rtol=1e-4, atol=1e-6)
    result["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_training_lowers_the_loss_and_reports_it(accelerator, tmp_path):
    model = small_vit(depth=2)
    train, evaluation = loaders(model)
    task = classification_task(model)
    before = evaluate(model, evaluation, accelerator=accelerator)
    results = fit(task, train, evaluation, Recipe(epochs=8, lr=3e-3), accelerator=accelerator)
    after = evaluate(task.trainable_module, evaluation, accelerator=accelerator)
    assert task.trainable_module is model
    assert after["loss"] < before["loss"]
    assert [result.epoch for result in results] == list(range(1, 9))
    assert results[-1].top1 == pytest.approx(after["top1"])
    assert results[-1].train_loss < results[0].train_loss


class KilledError(Exception):
    pass


def killed_after(model, steps, data, recipe, accelerator, **options):
    """A run that dies in the forward after so many steps."""
    task = classification_task(copy.deepcopy(model))
    calls = 0

    def die(*_):
        nonlocal calls
        calls += 1
        if calls == steps + 1:
            raise KilledError

    task.register_forward_hook(die)
    with pytest.raises(KilledError):
        fit(task, *data, recipe, accelerator=accelerator, **options)


def same_run(results, expected, task, whole):
    assert [(r.train_loss, r.train_top1, r.top1) for r in results] == [
        (r.train_loss, r.train_top1, r.top1) for r in expected
    ]
    pairs = zip(task.trainable_module.parameters(), whole.trainable_module.parameters(), strict=True)
    assert all(torch.equal(continued, uninterrupted) for continued, uninterrupted in pairs)


@pytest.mark.parametrize("happened", ["", "while replacing the state", "newest damaged", "progress damaged"])
@pytest.mark.parametrize(("steps", "interval"), [(7, 0), (7, 2), (8, 1), (5, 1), (1, 2)])
def test_a_stopped_run_continues_as_if_it_had_not_been(accelerator, tmp_path, steps, interval, happened):
    """Three steps an epoch, with random depth, stopped anywhere: the same losses and the same weights, bit for bit."""
    start = small_vit(depth=2, drop_path_rate=0.2)
    data = loaders(start)
    recipe = Recipe(epochs=4, lr=1e-3, warmup_epochs=1)
    whole = classification_task(copy.deepcopy(start))
    expected = fit(whole, *data, recipe, accelerator=accelerator, state_dir=tmp_path / "whole")
    state, old = tmp_path / "state", tmp_path / "state.old"
    options = {"state_dir": state, "recovery_interval": interval}
    killed_after(start, steps, data, recipe, accelerator, **options)
    task, warned = classification_task(copy.deepcopy(start)), contextlib.nullcontext()
    if happened == "while replacing the state" and state.exists():
        shutil.rmtree(old, ignore_errors=True)
        state.rename(old)
        shutil.copytree(old, tmp_path / "state.new")
    elif happened and old.exists():
        damaged = state / ("progress.txt" if happened == "progress damaged" else "model.safetensors")
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 16
        damaged.write_bytes(content)
        warned = pytest.warns(UserWarning, match=r"state is damaged; continuing from .*state\.old, the state before it")
    with warned:
        results = fit(task, *data, recipe, accelerator=accelerator, **options)
    same_run(results, expected, task, whole)
    assert not (tmp_path / "state.new").exists()


def test_nothing_is_continued_where_every_state_is_damaged(accelerator, tmp_path):
    model = small_vit(depth=1)
    recipe = Recipe(epochs=1, lr=1e-3)
    fit(classification_task(model), *loaders(model), recipe, accelerator=accelerator, state_dir=tmp_path / "s")
    (tmp_path / "s" / "optimizer.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be continued from: damaged; delete it to start anew"):
        fit(classification_task(model), *loaders(model), recipe, accelerator=accelerator, state_dir=tmp_path / "s")


def test_a_state_of_another_recipe_is_refused(accelerator, tmp_path):
    model = small_vit(depth=1)
    data = loaders(model)
    fit(classification_task(model), *data, Recipe(epochs=1, lr=1e-3), accelerator=accelerator, state_dir=tmp_path / "s")
    with pytest.raises(ValueError, match="holds an unfinished run that began with epochs=1, lr=0.001; continue"):
        fit(
            classification_task(model),
            *data,
            Recipe(epochs=2, lr=2e-3),
            accelerator=accelerator,
            state_dir=tmp_path / "s",
        )


def test_evaluation_counts_every_image_once(accelerator):
    model = small_vit()
    images, targets = images_for(model, 23), torch.randint(0, 7, (23,))
    result = evaluate(model, DataLoader(TensorDataset(images, targets), 5), accelerator=accelerator)
    with torch.no_grad():
        logits = model(images)
    rank = (logits > logits.gather(1, targets[:, None])).sum(dim=1)
    assert result["images"] == 23
    assert result["top1"] == pytest.approx(100 * (rank < 1).float().mean().item(), abs=1e-4)
    assert result["top5"] == pytest.approx(100 * (rank < 5).float().mean().item(), abs=1e-4)
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)


def test_errors(accelerator):
    model = small_vit(depth=1)
    train, evaluation = loaders(model)
    with pytest.raises(ValueError, match="train_loader is empty"):
        fit(classification_task(model), [], evaluation, Recipe(epochs=1, lr=1.0), accelerator=accelerator)
    with pytest.raises(ValueError, match="loader is empty"):
        evaluate(model, [], accelerator=accelerator)
    with torch.no_grad():
        model.head.weight.fill_(math.inf)
    with pytest.raises(
        FloatingPointError, match="the loss became nan in epoch 1, step 1; a lower learning rate than 1.0"
    ):
        fit(classification_task(model), train, evaluation, Recipe(epochs=1, lr=1.0), accelerator=accelerator)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"lr": math.nan}, "lr must be above 0, got nan"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0, got -1.0"),
        ({"warmup_epochs": 3}, "warmup_epochs must be at least 0 and below epochs = 3, got 3"),
        ({"clip_grad": 0.0}, "clip_grad must be above 0, got 0.0"),
    ],
)
def test_bad_recipes(change, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**({"epochs": 3, "lr": 1e-3} | change))
