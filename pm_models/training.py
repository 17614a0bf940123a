"""Training, distillation and evaluation of classifiers, on timm's parts, driven by accelerate."""

import json
import math
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, LogitDistillationTask
from timm.task.task import TrainingTask
from timm.utils import AverageMeter, accuracy
from torch import Tensor, nn
from tqdm import tqdm

from .files import write_atomically

_PROGRESS = "progress.json"


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Args:
        epochs: passes over the data.
        lr: peak learning rate of AdamW.
        weight_decay: not applied to biases, norms, tokens, positions, merge and reconstruct matrices.
        warmup_epochs: epochs of linear warm-up, part of ``epochs``; then a cosine to 0.
        clip_grad: largest gradient norm; ``None`` does not clip.
        seed: of the shuffles, augmentations and random depth.
    """

    epochs: int
    lr: float
    weight_decay: float = 0.05
    warmup_epochs: int = 0
    clip_grad: float | None = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("lr", self.lr > 0, "above 0"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("warmup_epochs", 0 <= self.warmup_epochs < self.epochs, f"at least 0 and below epochs = {self.epochs}"),
            ("clip_grad", self.clip_grad is None or self.clip_grad > 0, "above 0"),
        ):
            if not valid:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")


@dataclass(frozen=True)
class EpochResult:
    """One epoch of training, and the evaluation after it."""

    epoch: int
    train_loss: float
    train_top1: float
    images_per_second: float
    top1: float
    top5: float


def make_accelerator(*, mixed_precision: str = "no", cpu: bool = False) -> Accelerator:
    """accelerate's engine, shuffling by seed and epoch alone, so that a continued run sees the same batches.

    Args:
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``.
        cpu: stay on the CPU where there is a GPU.
    """
    return Accelerator(
        mixed_precision=mixed_precision,
        cpu=cpu,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )


def classification_task(model: nn.Module, *, smoothing: float = 0.0) -> TrainingTask:
    """Cross-entropy on the targets, with label smoothing."""
    return ClassificationTask(model, criterion=nn.CrossEntropyLoss(label_smoothing=smoothing), verbose=False)


def distillation_task(
    student: nn.Module, teacher: nn.Module, *, alpha: float = 1.0, temperature: float = 20.0
) -> TrainingTask:
    """Soft distillation: cross-entropy + ``alpha * T^2 * KL(teacher || student)`` at temperature ``T``.

    The divergence is averaged over the batch and the classes, as in the code of the paper (arXiv 2503.23455).
    """
    return LogitDistillationTask(
        student,
        teacher,
        criterion=nn.CrossEntropyLoss(),
        task_loss_weight=1.0,
        # timm averages the divergence over the batch alone.
        distill_loss_weight=alpha / student.num_classes,
        temperature=temperature,
        verbose=False,
    )


def fit(
    task: TrainingTask,
    train_loader: Iterable[tuple[Tensor, Tensor]],
    eval_loader: Iterable[tuple[Tensor, Tensor]],
    recipe: Recipe,
    *,
    accelerator: Accelerator,
    state_dir: str | os.PathLike | None = None,
    name: str = "train",
) -> list[EpochResult]:
    """Train the task's model in place, evaluating after every epoch, with progress bars.

    Args:
        task: from :func:`classification_task` or :func:`distillation_task`.
        train_loader: yields (images (B, C, H, W), targets (B,)).
        eval_loader: likewise.
        recipe: how to train.
        accelerator: from :func:`make_accelerator`.
        state_dir: where the whole state is kept after every epoch, replaced as one; a state found there is
            continued from. ``None`` keeps none.
        name: shown before the progress.

    Returns:
        One result per epoch, those before a continuation included.

    Raises:
        ValueError: ``train_loader`` is empty, or the state was made by another recipe.
        FloatingPointError: the loss is no longer finite.
    """
    if len(train_loader) == 0:
        raise ValueError("train_loader is empty: expected at least one batch of (images, targets)")
    set_seed(recipe.seed)
    accelerator.free_memory()  # what an earlier run prepared is not part of this run's state
    student = task.trainable_module
    optimizer = create_optimizer_v2(student, opt="adamw", lr=recipe.lr, weight_decay=recipe.weight_decay)
    model, optimizer, train_loader, eval_loader = accelerator.prepare(student, optimizer, train_loader, eval_loader)
    task.trainable_module = model
    task.to(accelerator.device)
    steps = len(train_loader)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=recipe.epochs,
        warmup_epochs=recipe.warmup_epochs,
        warmup_lr=recipe.lr * 1e-3,
        updates_per_epoch=steps,
        step_on_epochs=False,
    )
    results = _load_state(accelerator, state_dir, recipe)
    for epoch in range(len(results), recipe.epochs):
        train_loader.set_epoch(epoch)
        label = f"{name} {epoch + 1}/{recipe.epochs}"
        task.train()
        loss, top1, speed = AverageMeter(), AverageMeter(), 0.0
        start = time.perf_counter()
        bar = tqdm(train_loader, label, leave=False, disable=not accelerator.is_local_main_process)
        for step, (images, targets) in enumerate(bar):
            scheduler.step_update(epoch * steps + step)
            with accelerator.autocast():
                result = task(images, targets)
            loss_value = accelerator.reduce(result["loss"].detach(), "mean").item()
            if not math.isfinite(loss_value):
                raise FloatingPointError(
                    f"the loss became {loss_value} in epoch {epoch + 1}, step {step + 1}; a lower learning "
                    f"rate than {recipe.lr} or more warm-up epochs than {recipe.warmup_epochs} may help"
                )
            accelerator.backward(result["loss"])
            if recipe.clip_grad is not None:
                accelerator.clip_grad_norm_(model.parameters(), recipe.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            loss.update(loss_value, len(images))
            (correct,) = accuracy(result["output"].detach(), targets)
            top1.update(accelerator.reduce(correct, "mean").item(), len(images))
            speed = loss.count * accelerator.num_processes / (time.perf_counter() - start)
            bar.set_postfix_str(f"loss {loss.avg:.3f}, accuracy {top1.avg:.1f}%, {speed:.0f} images/s")
        bar.close()
        evaluated = evaluate(model, eval_loader, accelerator=accelerator)
        results.append(EpochResult(epoch + 1, loss.avg, top1.avg, speed, evaluated["top1"], evaluated["top5"]))
        accelerator.print(
            f"{label}: loss {loss.avg:.4f}, accuracy {top1.avg:.2f}% in training, {evaluated['top1']:.2f}% in "
            f"evaluation, {speed:.0f} images/s"
        )
        _save_state(accelerator, state_dir, recipe, results)
    accelerator.wait_for_everyone()
    task.trainable_module = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    return results


def evaluate(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], *, accelerator: Accelerator
) -> dict[str, float]:
    """Loss and accuracy (percent) of a model on all images of a loader.

    Args:
        model: on the accelerator's device.
        loader: yields (images, targets); prepared by the accelerator where there are several processes.
        accelerator: device, precision and processes.

    Returns:
        ``loss``, ``top1``, ``top5`` (of as many classes as there are, up to five) and ``images``.

    Raises:
        ValueError: the loader is empty.
    """
    model.eval()
    loss, top1, top5 = AverageMeter(), AverageMeter(), AverageMeter()
    with torch.inference_mode(), accelerator.autocast():
        for images, targets in tqdm(loader, "evaluate", leave=False, disable=not accelerator.is_local_main_process):
            logits = model(images.to(accelerator.device)).float()
            logits, targets = accelerator.gather_for_metrics((logits, targets.to(accelerator.device)))
            first, fifth = accuracy(logits, targets, topk=(1, min(5, logits.shape[1])))
            loss.update(F.cross_entropy(logits, targets).item(), len(targets))
            top1.update(first.item(), len(targets))
            top5.update(fifth.item(), len(targets))
    if loss.count == 0:
        raise ValueError("loader is empty: expected at least one batch of (images, targets)")
    return {"loss": loss.avg, "top1": top1.avg, "top5": top5.avg, "images": loss.count}


def _save_state(
    accelerator: Accelerator, state_dir: str | os.PathLike | None, recipe: Recipe, results: list[EpochResult]
) -> None:
    """Write the state beside the old one, then let it take its place: at every moment one of them is whole."""
    if state_dir is None:
        return
    state = Path(state_dir)
    new, old = state.with_name(f"{state.name}.new"), state.with_name(f"{state.name}.old")
    if accelerator.is_main_process:
        shutil.rmtree(new, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(new))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        progress = {"recipe": asdict(recipe), "results": [asdict(result) for result in results]}
        write_atomically(new / _PROGRESS, json.dumps(progress, indent=2).encode())
        shutil.rmtree(old, ignore_errors=True)
        if state.exists():
            state.rename(old)
        new.rename(state)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def _load_state(accelerator: Accelerator, state_dir: str | os.PathLike | None, recipe: Recipe) -> list[EpochResult]:
    """Load the newest whole state; its results, or none where there is no state."""
    if state_dir is None:
        return []
    state = Path(state_dir)
    for folder in (state, state.with_name(f"{state.name}.old")):
        if not (folder / _PROGRESS).is_file():
            continue
        progress = json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))
        if progress["recipe"] != asdict(recipe):
            different = [name for name, value in asdict(recipe).items() if progress["recipe"].get(name) != value]
            began = ", ".join(f"{name}={progress['recipe'].get(name)}" for name in different)
            raise ValueError(
                f"{state} holds an unfinished run that began with {began}; continue it with that, or choose another "
                "output folder"
            )
        accelerator.load_state(str(folder))
        results = [EpochResult(**result) for result in progress["results"]]
        accelerator.print(f"continuing after epoch {len(results)} of {recipe.epochs}, from {folder}")
        return results
    return []
