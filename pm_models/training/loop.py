"""The training loop: epochs of steps, each epoch followed by an evaluation, driven by accelerate."""

import contextlib
import copy
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields

import numpy as np
import torch
from accelerate import Accelerator, DistributedType, skip_first_batches
from accelerate.utils import set_seed
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task.task import TrainingTask
from torch import Tensor, nn
from tqdm import tqdm

from ..data import IGNORED, tell_epoch
from ..data.loaders import images_and_targets
from ..files import write_atomically
from .evaluation import Evaluator, evaluate
from .recipe import EpochResult, Recipe, summary_csv
from .state import Progress, RunState, run_settings

_POLY_POWER = 0.9


def fit(
    task: TrainingTask,
    train_loader: Iterable[tuple[Tensor, Tensor]],
    eval_loader: Iterable[tuple[Tensor, Tensor]],
    recipe: Recipe,
    *,
    accelerator: Accelerator,
    state_dir: str | os.PathLike | None = None,
    settings: Mapping[str, object] | None = None,
    evaluator: Evaluator | None = None,
    recovery_interval: int = 0,
    summary: str | os.PathLike | None = None,
    name: str = "train",
) -> list[EpochResult]:
    """Train the task's model in place, evaluating after every epoch, with progress bars.

    Up to rounding, several processes do the same as one process with as many images per step: shuffles, augmentations
    (:class:`~pm_models.data.SeededImages`) and the strengths of mixup and cutmix are equal. What differs is which
    images these pair, because each process pairs its own, and what stochastic depth and dropout leave out.

    Args:
        task: from :func:`classification_task`, :func:`distillation_task` or a :class:`SegmentationTask`.
        train_loader: yields (images (B, C, H, W), targets (B,)), in segmentation (B, H, W).
        eval_loader: the loader that ``evaluator`` takes; if ``evaluator`` is given, this process's share of the images.
        recipe: how to train.
        accelerator: from :func:`make_accelerator`.
        state_dir: where to save the whole state after every epoch; the previous state is kept as ``<state_dir>.old``. A
            run continues from the newest state there or, with a warning, from the older one if the newest is damaged.
            ``None`` saves none.
        settings: other plain values that determine the run, by name, such as where its images are and how they are
            augmented. A run is only continued with the settings, recipe, model, losses, teacher, batch size, precision
            and number of processes that it began with.
        evaluator: called after every epoch with the model, ``eval_loader`` and ``accelerator=``; returns the fields of
            :class:`EpochResult` that it measures. ``None``: :func:`evaluate`.
        recovery_interval: also save the state after this many optimiser steps within an epoch; 0: only after epochs.
        summary: CSV file for the results of all epochs so far, with the columns of timm's ``train.py``.
        name: label of the progress bars.

    Returns:
        One result per epoch, including those before a continuation.

    Raises:
        ValueError: ``train_loader`` is empty, or the state belongs to a run with other settings, which are named.
        OSError: a state or the summary cannot be written; the previous state is intact.
        FloatingPointError: the loss is no longer finite.
    """
    if len(train_loader) == 0:
        raise ValueError("train_loader is empty: expected at least one batch of (images, targets)")
    set_seed(recipe.seed)
    accelerator.free_memory()  # an earlier run's objects must not become part of this run's state
    began = {} if state_dir is None else run_settings(recipe, settings or {}, task, train_loader, accelerator)
    state = RunState(state_dir, began, task, accelerator)
    trainer = _Trainer(task, train_loader, recipe, accelerator)
    if evaluator is None:
        evaluator, eval_loader = evaluate, accelerator.prepare(eval_loader)
    progress = state.load()
    if accelerator.log_with:
        accelerator.init_trackers("")
    results = progress.results
    for epoch in range(len(results), recipe.epochs):
        label = f"{name} {epoch + 1}/{recipe.epochs}"
        trained = trainer.train_epoch(epoch, progress, label, state, recovery_interval)
        measured = evaluator(trainer.evaluated_model, eval_loader, accelerator=accelerator)
        known = {field.name: measured[field.name] for field in fields(EpochResult) if field.name in measured}
        results.append(EpochResult(epoch=epoch + 1, **trained, **known))
        _report(results[-1], label, accelerator)
        _write_summary(results, summary, accelerator)
        progress = Progress(results)
        state.save(progress)
    _write_summary(results, summary, accelerator)  # also if no epoch was left to run
    accelerator.wait_for_everyone()
    trainer.leave_weights()
    return results


class _Trainer:
    """A task's model with optimiser, schedule and loader, prepared for the devices, to be trained epoch by epoch."""

    def __init__(
        self, task: TrainingTask, loader: Iterable[tuple[Tensor, Tensor]], recipe: Recipe, accelerator: Accelerator
    ) -> None:
        self.task, self.recipe, self.accelerator = task, recipe, accelerator
        model = task.trainable_module
        sharded = accelerator.distributed_type == DistributedType.FSDP
        if sharded and recipe.model_ema_decay is not None:
            raise ValueError("model_ema_decay must be None under FSDP: no process has all weights to average")
        self.whole_model = copy.deepcopy(model) if sharded else None
        if recipe.model_ema_decay is not None:
            task.setup_ema(decay=recipe.model_ema_decay)
        self.mixup = None
        if recipe.mixup or recipe.cutmix:
            self.mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=model.num_classes)
        optimizer = create_optimizer_v2(
            model, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay
        )
        self.model, self.optimizer, self.loader = accelerator.prepare(model, optimizer, loader)
        task.trainable_module = self.model
        task.to(accelerator.device)
        self.steps = len(self.loader)  # per epoch, one batch each
        self.updates = math.ceil(self.steps / recipe.grad_accum_steps)  # per epoch; the last may have fewer batches
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched=recipe.sched,
            decay_rate=_POLY_POWER,
            num_epochs=recipe.epochs,
            warmup_epochs=recipe.warmup_epochs,
            warmup_lr=recipe.lr * 1e-3 if recipe.warmup_lr is None else recipe.warmup_lr,
            min_lr=recipe.min_lr,
            updates_per_epoch=self.updates,
            step_on_epochs=False,
        )

    @property
    def evaluated_model(self) -> nn.Module:
        return self.task.trainable_module_ema.module if self.task.has_ema() else self.model

    def train_epoch(self, epoch: int, progress: Progress, label: str, state: RunState, recovery_interval: int) -> dict:
        """Train an epoch from where ``progress`` is; returns the fields of EpochResult that training measures."""
        self.task.train()
        trained_before, start, speed = progress.loss.count, time.perf_counter(), 0.0
        # Some samplers use the global generators, which must be equal in all processes and in a continued run.
        set_seed(self.recipe.seed + epoch)
        batches = skip_first_batches(self.loader, progress.steps) if progress.steps else self.loader
        tell_epoch(batches, epoch)
        hidden = not self.accelerator.is_local_main_process
        bar = tqdm(batches, label, total=self.steps, initial=progress.steps, leave=False, disable=hidden)
        for step, batch in enumerate(bar, progress.steps):
            images, targets = images_and_targets(batch)
            loss, top1 = self._accumulate_gradients(epoch, step, images, targets)
            progress.loss.update(loss, len(images))
            progress.top1.update(top1, len(images))
            trained = progress.loss.count - trained_before
            speed = trained * self.accelerator.num_processes / (time.perf_counter() - start)
            bar.set_postfix_str(
                f"loss {progress.loss.avg:.3f}, accuracy {progress.top1.avg:.1f}%, {speed:.0f} images/s"
            )
            if not self._ends_group(step):
                continue
            update = step // self.recipe.grad_accum_steps + 1
            self._update_weights(epoch * self.updates + update)
            if recovery_interval and update % recovery_interval == 0 and update < self.updates:
                progress.steps = step + 1
                state.save(progress)
        return {
            "train_loss": progress.loss.avg,
            "train_top1": progress.top1.avg,
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            "images_per_second": speed,
        }

    def _ends_group(self, step: int) -> bool:
        """Whether the optimiser steps after this batch, because it ends a group of batches or the epoch."""
        return (step + 1) % self.recipe.grad_accum_steps == 0 or step + 1 == self.steps

    def _accumulate_gradients(self, epoch: int, step: int, images: Tensor, targets: Tensor) -> tuple[float, float]:
        """Forward and backward of a batch; returns loss and accuracy (percent) over all processes."""
        accelerator, recipe = self.accelerator, self.recipe
        group, group_start = recipe.grad_accum_steps, step // recipe.grad_accum_steps * recipe.grad_accum_steps
        # Each step is seeded by its number, so that a continued run draws the same numbers.
        number = epoch * self.steps + step
        torch.manual_seed(_step_seed(recipe.seed, number, accelerator.process_index))
        self.scheduler.step_update(epoch * self.updates + step // group)
        mixed_targets = targets
        if self.mixup is not None:
            if len(images) % 2:
                raise ValueError(f"mixup and cutmix pair a batch's images: expected an even number, got {len(images)}")
            np.random.seed(_step_seed(recipe.seed, number, 0))  # the same in all processes
            images, mixed_targets = self.mixup(images, targets)
        with contextlib.nullcontext() if self._ends_group(step) else accelerator.no_sync(self.model):
            with accelerator.autocast():
                result = self.task(images, mixed_targets)
            loss = accelerator.reduce(result["loss"].detach(), "mean").item()
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss became {loss} in epoch {epoch + 1}, step {step + 1}; a lower learning "
                    f"rate than {recipe.lr} or more warm-up epochs than {recipe.warmup_epochs} may help"
                )
            # accelerate's own accumulation would divide by the group size even if the epoch ends within a group.
            accelerator.backward(result["loss"] / min(group, self.steps - group_start))
        hits, counted = accelerator.reduce(_hits(result["output"].detach(), targets), "sum").tolist()
        return loss, 100 * hits / max(counted, 1)

    def _update_weights(self, update: int) -> None:
        """Take optimiser step number ``update``."""
        if self.recipe.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.task.update_ema(update)

    def leave_weights(self) -> None:
        """Put the trained or averaged weights into the task's model, unwrapped as it was before it was prepared."""
        task, accelerator = self.task, self.accelerator
        if self.whole_model is not None:  # only the first process gets the weights, and saves them
            weights = accelerator.get_state_dict(self.model)
            if accelerator.is_main_process:
                self.whole_model.load_state_dict(weights)
            task.trainable_module = self.whole_model.to(accelerator.device)
        else:
            task.trainable_module = accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if task.has_ema():
            task.trainable_module.load_state_dict(task.trainable_module_ema.module.state_dict())
            del task.trainable_module_ema


def _step_seed(seed: int, step: int, process: int) -> int:
    return int(np.random.SeedSequence([seed, step, process]).generate_state(1)[0])


def _hits(logits: Tensor, targets: Tensor) -> Tensor:
    """How many targets the logits (targets, classes) hit, and how many targets count: labelled ones in segmentation."""
    counted = targets != IGNORED if targets.dim() > 1 else torch.ones_like(targets, dtype=torch.bool)
    hits = (logits.argmax(dim=1) == targets.flatten()) & counted.flatten()
    return torch.stack([hits.sum(), counted.sum()])


def _report(result: EpochResult, label: str, accelerator: Accelerator) -> None:
    """Print an epoch's result, and log it where there are trackers."""
    mean_iou = "" if result.miou is None else f", mIoU {result.miou:.2f}%"
    accelerator.print(
        f"{label}: loss {result.train_loss:.4f}, accuracy {result.train_top1:.2f}% in training, {result.top1:.2f}% in "
        f"evaluation{mean_iou}, {result.images_per_second:.0f} images/s"
    )
    values = {name: value for name, value in asdict(result).items() if value is not None and name != "epoch"}
    accelerator.log(values, step=result.epoch)


def _write_summary(results: list[EpochResult], summary: str | os.PathLike | None, accelerator: Accelerator) -> None:
    if summary is not None and accelerator.is_main_process:
        write_atomically(summary, summary_csv(results).encode())
