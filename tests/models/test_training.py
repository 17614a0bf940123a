"""Losses against formulas, continuing a killed run, evaluation counts, and errors."""

import collections
import contextlib
import copy
import dataclasses
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from covering import pairs
from helpers import images_for, plan_for, small_vit
from timm.models import group_parameters
from torch.utils.data import DataLoader, TensorDataset

from pm_models import Segmenter, compress
from pm_models.training import (
    Recipe,
    classification_task,
    distillation_task,
    evaluate,
    fit,
    make_accelerator,
)


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


class Recorded(contextlib.AbstractContextManager):
    """What reaches the task in each step, and the weights that it meets there."""

    def __init__(self, task):
        self.images, self.targets, self.weights = [], [], []
        self._hook = task.register_forward_pre_hook(self._keep)

    def _keep(self, task, batch):
        self.images.append(batch[0].clone())
        self.targets.append(batch[1].clone())
        self.weights.append([parameter.detach().clone() for parameter in task.trainable_module.parameters()])

    def __exit__(self, *_):
        self._hook.remove()


def in_order(model, images, batch):
    data = TensorDataset(images_for(model, images), torch.randint(0, 7, (images,)))
    return DataLoader(data, batch), DataLoader(data, 10), data


def weights_of(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_accumulated_gradients_are_those_of_one_batch(accelerator):
    """Steps of the optimiser from 4 + 4 + 4 and 4 + 3 images, the rest of an epoch, by plain PyTorch."""
    start = small_vit(depth=1)
    train, evaluation, data = in_order(start, 19, 4)
    recipe = Recipe(epochs=2, lr=1e-2, opt="sgd", weight_decay=0.0, clip_grad=None, grad_accum_steps=3)
    model, expected = copy.deepcopy(start), copy.deepcopy(start).train()
    fit(classification_task(model), train, evaluation, recipe, accelerator=accelerator)
    optimizer = torch.optim.SGD(expected.parameters(), momentum=0.9, nesterov=True)
    images, targets = data.tensors
    parts = [[slice(0, 4), slice(4, 8), slice(8, 12)], [slice(12, 16), slice(16, 19)]]
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 + math.cos(math.pi * step / 4)) / 2
        losses = [F.cross_entropy(expected(images[part]), targets[part]) for part in parts[step % 2]]
        optimizer.zero_grad()
        (sum(losses) / len(losses)).backward()
        optimizer.step()
    torch.testing.assert_close(weights_of(model), weights_of(expected), rtol=1e-5, atol=1e-6)


def test_the_moving_average_is_evaluated_and_left_in_the_model(accelerator):
    start = small_vit(depth=1)
    train, evaluation, _ = in_order(start, 24, 8)
    plain = Recipe(epochs=2, lr=1e-3, opt="sgd")
    task = classification_task(copy.deepcopy(start))
    with Recorded(task) as steps:
        fit(task, train, evaluation, plain, accelerator=accelerator)
    after = [torch.cat([value.flatten() for value in values]) for values in steps.weights[1:]]
    after.append(weights_of(task.trainable_module))
    average = after[0]
    for weights in after[1:]:
        average = 0.9 * average + 0.1 * weights
    task = classification_task(copy.deepcopy(start))
    results = fit(task, train, evaluation, dataclasses.replace(plain, model_ema_decay=0.9), accelerator=accelerator)
    torch.testing.assert_close(weights_of(task.trainable_module), average, rtol=1e-5, atol=1e-6)
    assert not task.has_ema()
    found = evaluate(task.trainable_module, evaluation, accelerator=accelerator)
    assert (results[-1].loss, results[-1].top1) == (found["loss"], found["top1"])


def test_mixed_images_have_mixed_targets(accelerator):
    """Of every batch, image i is ``t * x_i + (1 - t) * x_-i`` where its target says so, or cut from both."""
    model = small_vit(depth=1)
    train, evaluation, data = in_order(model, 24, 8)
    task = classification_task(model)
    with Recorded(task) as steps:
        recipe = Recipe(epochs=6, lr=1e-4, mixup=0.8, cutmix=1.0)
        fit(task, train, evaluation, recipe, accelerator=accelerator)
    images, targets = data.tensors
    blended = cut = 0
    for step, (mixed, soft) in enumerate(zip(steps.images, steps.targets, strict=True)):
        part = slice(8 * (step % 3), 8 * (step % 3) + 8)
        own, other = images[part], images[part].flip(0)
        ones = F.one_hot(targets[part], 7).float()
        assert soft.shape == (8, 7)
        lam = ((soft - ones.flip(0)) * (ones - ones.flip(0))).sum() / (ones - ones.flip(0)).square().sum()
        torch.testing.assert_close(soft, lam * ones + (1 - lam) * ones.flip(0))
        if torch.allclose(mixed, lam * own + (1 - lam) * other, atol=1e-5):
            blended += 1
        else:
            assert ((mixed == own) | (mixed == other)).all()
            assert (mixed == own).float().mean().item() == pytest.approx(lam.item(), abs=1e-5)
            cut += 1
    assert blended > 2
    assert cut > 2


def test_odd_batches_cannot_be_mixed(accelerator):
    model = small_vit(depth=1)
    train, evaluation, _ = in_order(model, 6, 3)
    with pytest.raises(ValueError, match="mixup and cutmix pair a batch's images: expected an even number, got 3"):
        fit(classification_task(model), train, evaluation, Recipe(epochs=1, lr=1.0, mixup=0.1), accelerator=accelerator)


def test_layer_decay_slows_the_first_blocks_and_their_matrices(accelerator):
    dense = small_vit(depth=3)
    model = compress(dense, plan_for(dense))
    before = copy.deepcopy(model.state_dict())
    train, evaluation, _ = in_order(dense, 16, 8)
    recipe = Recipe(epochs=1, lr=1e-2, layer_decay=0.03, weight_decay=0.0)
    fit(classification_task(model), train, evaluation, recipe, accelerator=accelerator)
    moved = {name: (value - before[name]).abs().max() for name, value in model.state_dict().items()}
    for module in ("blocks.{}.mlp.fc1.weight", "stages.{}.merge"):
        first, second, last = (moved[module.format(block)] for block in range(3))
        assert 0 < first < 0.1 * second
        assert second < 0.1 * last
    assert moved["head.weight"] > moved["blocks.2.mlp.fc1.weight"]


def test_layer_decay_knows_a_segmenters_layers():
    """Its encoder's are the encoder's own, compressed or not, and the decoder comes after them."""
    dense = small_vit(depth=3)
    for encoder in (dense, compress(dense, plan_for(dense))):
        model = Segmenter(encoder, 4)
        alone, whole = (group_parameters(m, m.group_matcher(), reverse=True) for m in (encoder, model))
        decoder = {layer for name, layer in whole.items() if name.startswith("decoder.")}
        assert decoder == {max(whole.values())}
        layers = {name: layer for name, layer in alone.items() if not name.startswith("head.")}
        assert layers.items() <= {name.removeprefix("encoder."): layer for name, layer in whole.items()}.items()
        assert {layers["patch_embed.proj.weight"], layers["blocks.2.mlp.fc1.weight"]} == {0, 3}


def test_the_summary_has_every_epoch(accelerator, tmp_path):
    model = small_vit(depth=1)
    results = fit(
        classification_task(model), *loaders(model), Recipe(epochs=3, lr=1e-3), accelerator=accelerator,
        summary=tmp_path / "summary.csv",
    )  # fmt: skip
    header, *rows = (tmp_path / "summary.csv").read_text().splitlines()
    assert header == "epoch,train_loss,train_top1,eval_loss,eval_top1,eval_top5,lr,samples_per_sec"
    assert [[float(value) for value in row.split(",")] for row in rows] == [
        [r.epoch, r.train_loss, r.train_top1, r.loss, r.top1, r.top5, r.lr, r.images_per_second] for r in results
    ]


def test_logs_for_tensorboard(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model = small_vit(depth=1)
    accelerator = make_accelerator(cpu=True, tensorboard=tmp_path)
    results = fit(classification_task(model), *loaders(model), Recipe(epochs=2, lr=1e-3), accelerator=accelerator)
    accelerator.end_training()
    found = events.EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in found.Scalars("top1")] == [1, 2]
    assert [event.value for event in found.Scalars("train_loss")] == pytest.approx([r.train_loss for r in results])


def test_a_full_disk_ends_the_run_and_keeps_the_state_before(accelerator, tmp_path):
    """No file may grow past the limit, as where the disk is full: the run ends, and later continues."""
    resource = pytest.importorskip("resource")
    start = small_vit(depth=2)
    data = loaders(start)
    recipe = Recipe(epochs=3, lr=1e-3)
    whole = classification_task(copy.deepcopy(start))
    expected = fit(whole, *data, recipe, accelerator=accelerator)
    task, options = classification_task(copy.deepcopy(start)), {"state_dir": tmp_path / "state"}
    killed_after(start, 4, data, recipe, accelerator, **options)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name in ("model.safetensors", "optimizer.bin"):
        limit = (tmp_path / "state" / name).stat().st_size - 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(OSError, match=r"could not be written to .*state\.new; the one before it is untouched"):
                fit(classification_task(copy.deepcopy(start)), *data, recipe, accelerator=accelerator, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [path.name for path in tmp_path.iterdir()] == ["state"]
    results = fit(task, *data, recipe, accelerator=accelerator, **options)
    same_run(results, expected, task, whole)


Stop = collections.namedtuple("Stop", "steps interval")
MORE = {"model_ema_decay": 0.9, "grad_accum_steps": 2, "mixup": 0.8, "cutmix": 1.0}


@pytest.mark.parametrize(
    *pairs(
        stop=(Stop(7, 0), Stop(7, 2), Stop(8, 1), Stop(5, 1), Stop(1, 2)),
        happened=("", "while replacing the state", "newest damaged", "progress damaged"),
        more=(False, True),
    )
)
def test_a_stopped_run_continues_as_if_it_had_not_been(accelerator, tmp_path, stop, happened, more):
    """Three batches an epoch, with random depth, stopped anywhere: the same losses and weights, bit for bit."""
    steps, interval = stop
    start = small_vit(depth=2, drop_path_rate=0.2)
    data = loaders(start)
    recipe = Recipe(epochs=4, lr=1e-3, warmup_epochs=1, **(MORE if more else {}))
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


def test_launched_processes_without_a_group_are_refused(monkeypatch):
    make_accelerator(cpu=True)  # a group is formed, or none is, when the first is made
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"^2 processes were launched, but form no group on cpu; run one, or give"):
        make_accelerator(cpu=True)


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
        ({"warmup_lr": -1.0}, "warmup_lr must be at least 0, got -1.0"),
        ({"min_lr": 1.0}, "min_lr must be at least 0 and at most lr = 0.001, got 1.0"),
        ({"layer_decay": 1.5}, "layer_decay must be above 0 and at most 1, got 1.5"),
        ({"grad_accum_steps": 0}, "grad_accum_steps must be at least 1, got 0"),
        ({"model_ema_decay": 1.0}, "model_ema_decay must be above 0 and below 1, got 1.0"),
        ({"mixup": -0.1}, "mixup must be at least 0, got -0.1"),
        ({"cutmix": math.nan}, "cutmix must be at least 0, got nan"),
    ],
)
def test_bad_recipes(change, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**({"epochs": 3, "lr": 1e-3} | change))


@pytest.mark.parametrize("of", ["training", "evaluation"])
def test_batches_that_are_no_pairs_are_told(of):
    model = small_vit(depth=1)
    pairs = [(images_for(model, 4), torch.arange(4))] * 2
    dicts = [{"pixel_values": images, "labels": targets} for images, targets in pairs]
    loaders = (dicts, pairs) if of == "training" else (pairs, dicts)
    loaders = (DataLoader(loader, batch_size=None) for loader in loaders)
    message = (
        r"loader must yield batches \(images, targets\), a pair of tensors, got a dict with the keys 'pixel_values'"
    )
    with pytest.raises(TypeError, match=message):
        fit(classification_task(model), *loaders, Recipe(epochs=1, lr=1e-3), accelerator=make_accelerator(cpu=True))
