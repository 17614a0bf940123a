"""Training, distillation and evaluation of classifiers, on timm's parts, driven by accelerate."""

import contextlib
import copy
import csv
import hashlib
import io
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration, DistributedType, skip_first_batches
from accelerate.utils import is_tensorboard_available, set_seed
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, LogitDistillationTask
from timm.task.task import TrainingTask
from timm.utils import AverageMeter, accuracy
from torch import Tensor, nn
from tqdm import tqdm

from .data import tell_epoch
from .files import write_atomically
from .run_settings import refuse_other_settings, run_settings

IGNORED = 255  # the label of pixels that are neither trained on nor counted

Evaluator = Callable[..., dict[str, float]]
SCHEDULES = ("cosine", "poly")
_POLY_POWER = 0.9
_PROGRESS = "progress.txt"  # a digest, and JSON after it
_EMA = "ema.safetensors"
_STATE_FORMAT = 2


@dataclass(frozen=True)
class Recipe:
    """How to train. The fields are named as timm's ``train.py`` names its flags.

    Args:
        epochs: passes over the data.
        lr: peak learning rate.
        weight_decay: not applied to biases, norms, tokens, positions, merge and reconstruct matrices.
        warmup_epochs: epochs of linear warm-up from ``warmup_lr``, part of ``epochs``; then ``sched`` to ``min_lr``.
        warmup_lr: learning rate of the first step; ``None``: a thousandth of ``lr``.
        min_lr: learning rate at the end.
        clip_grad: largest gradient norm; ``None`` does not clip.
        opt: timm's name of the optimiser.
        sched: ``"cosine"``, or ``"poly"``, a polynomial of degree 0.9 in what is left, as Segmenter is trained.
        layer_decay: the learning rate of block ``l`` is that of block ``l + 1`` times this; ``None``: all the same.
        grad_accum_steps: batches whose gradients make one step of the optimiser.
        model_ema_decay: keep an exponential moving average of the weights, which is what is evaluated and what is left
            in the model at the end; ``None`` keeps none.
        mixup: alpha of mixup; 0 does not mix.
        cutmix: alpha of cutmix, in half of the batches where ``mixup`` is above 0 too; 0 does not cut.
        seed: of the shuffles, augmentations and random depth.
    """

    epochs: int
    lr: float
    weight_decay: float = 0.05
    warmup_epochs: int = 0
    warmup_lr: float | None = None
    min_lr: float = 0.0
    clip_grad: float | None = 1.0
    opt: str = "adamw"
    sched: str = "cosine"
    layer_decay: float | None = None
    grad_accum_steps: int = 1
    model_ema_decay: float | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("lr", self.lr > 0, "above 0"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("warmup_epochs", 0 <= self.warmup_epochs < self.epochs, f"at least 0 and below epochs = {self.epochs}"),
            ("warmup_lr", self.warmup_lr is None or self.warmup_lr >= 0, "at least 0"),
            ("min_lr", 0 <= self.min_lr <= self.lr, f"at least 0 and at most lr = {self.lr}"),
            ("clip_grad", self.clip_grad is None or self.clip_grad > 0, "above 0"),
            ("sched", self.sched in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            ("layer_decay", self.layer_decay is None or 0 < self.layer_decay <= 1, "above 0 and at most 1"),
            ("grad_accum_steps", self.grad_accum_steps >= 1, "at least 1"),
            ("model_ema_decay", self.model_ema_decay is None or 0 < self.model_ema_decay < 1, "above 0 and below 1"),
            ("mixup", self.mixup >= 0, "at least 0"),
            ("cutmix", self.cutmix >= 0, "at least 0"),
        ):
            if not valid:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")


@dataclass(frozen=True)
class EpochResult:
    """One epoch of training, and the evaluation after it; accuracies in percent, ``lr`` that of the last step.

    In segmentation accuracies are of pixels, ``loss`` and ``top5`` are not measured, and ``miou`` and ``macc`` are.
    """

    epoch: int
    train_loss: float
    train_top1: float
    images_per_second: float
    lr: float
    top1: float
    loss: float | None = None
    top5: float | None = None
    miou: float | None = None
    macc: float | None = None


def make_accelerator(
    *, mixed_precision: str = "no", cpu: bool = False, tensorboard: str | os.PathLike | None = None
) -> Accelerator:
    """accelerate's engine, shuffling by seed and epoch alone, so that a continued run sees the same batches.

    The processes that torchrun or another launcher started form a group, on CPUs too.

    Args:
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``.
        cpu: stay on the CPU where there is a GPU.
        tensorboard: folder for TensorBoard's logs of every epoch; ``None`` writes none.

    Raises:
        ImportError: ``tensorboard`` is given, but not installed.
        ValueError: the launcher started processes that cannot form a group on this device.
    """
    if tensorboard is not None and not is_tensorboard_available():
        raise ImportError("logs for TensorBoard need the package tensorboard: pip install tensorboard")
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        cpu=cpu or not torch.accelerator.is_available(),  # accelerate groups processes on CPUs only where it is told to
        log_with=None if tensorboard is None else "tensorboard",
        project_dir=tensorboard,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    if accelerator.num_processes < launched_processes():
        raise ValueError(
            f"{launched_processes()} processes were launched, but form no group on {accelerator.device.type}; run one, "
            "or give --device cpu (cpu=True)"
        )
    return accelerator


def launched_processes() -> int:
    """How many processes torchrun or another launcher of PyTorch's started, of which this is one."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def classification_task(model: nn.Module, *, smoothing: float = 0.0) -> TrainingTask:
    """Cross-entropy on the targets, with label smoothing."""
    return ClassificationTask(model, criterion=nn.CrossEntropyLoss(label_smoothing=smoothing), verbose=False)


def distillation_task(
    student: nn.Module, teacher: nn.Module, *, alpha: float = 1.0, temperature: float = 20.0, smoothing: float = 0.0
) -> TrainingTask:
    """Soft distillation: cross-entropy + ``alpha * T^2 * KL(teacher || student)`` at temperature ``T``.

    The divergence is averaged over the batch and the classes, as in the code of the paper (arXiv 2503.23455).
    """
    return LogitDistillationTask(
        student,
        teacher,
        criterion=nn.CrossEntropyLoss(label_smoothing=smoothing),
        task_loss_weight=1.0,
        # timm averages the divergence over the batch alone.
        distill_loss_weight=alpha / student.num_classes,
        temperature=temperature,
        verbose=False,
    )


class SegmentationTask(TrainingTask):
    """Cross-entropy of every labelled pixel, and soft distillation of every pixel where there is a teacher.

    The divergence is averaged over pixels and classes, as :func:`distillation_task` averages over images and classes. A
    batch without any label has a cross-entropy of 0.

    Args:
        student: images (B, C, H, W) to logits (B, classes, H, W).
        teacher: likewise; frozen.
        alpha: weight of the distillation.
        temperature: its temperature.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None = None, *, alpha: float = 1.0, temperature: float = 20.0
    ) -> None:
        super().__init__(verbose=False)
        self.trainable_module = student
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False)
        self.alpha, self.temperature = alpha, temperature

    def train(self, mode: bool = True) -> "SegmentationTask":
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Images and targets (B, H, W); the output is (B * H * W, classes)."""
        found = self.trainable_module(input)
        loss, logits = segmentation_loss(found, target, shared=self.training), _by_pixel(found)
        if self.teacher is not None:
            with torch.no_grad():
                wanted = (_by_pixel(self.teacher(input)) / self.temperature).log_softmax(dim=1)
            softened = (logits / self.temperature).log_softmax(dim=1)
            divergence = F.kl_div(softened, wanted, reduction="batchmean", log_target=True) / logits.shape[1]
            loss = loss + self.alpha * self.temperature**2 * divergence
        return {"loss": loss, "output": logits}


def segmentation_loss(logits: Tensor, targets: Tensor, *, shared: bool = False) -> Tensor:
    """Cross-entropy of logits (B, classes, H, W), the mean over the labelled of targets (B, H, W); 0 without any.

    ``shared``: over the labelled of all processes' targets, so that the mean of their losses is the loss of all images.
    """
    labelled, processes = (targets != IGNORED).sum(), 1
    if shared and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(labelled)
        processes = torch.distributed.get_world_size()
    total = F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
    return total * processes / labelled.clamp_min(1)


def _by_pixel(logits: Tensor) -> Tensor:
    """(B, classes, H, W) to (B * H * W, classes) in float32."""
    return logits.float().movedim(1, -1).flatten(0, 2)


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

    Several processes do what one does with as many images a step, up to rounding: they share out its shuffles, its
    augmentation (:class:`~pm_models.data.SeededImages`), and how much mixup and cutmix mix. Which images these pair,
    each process its own, and what random depth and dropout leave out, are other draws.

    Args:
        task: from :func:`classification_task`, :func:`distillation_task` or a :class:`SegmentationTask`.
        train_loader: yields (images (B, C, H, W), targets (B,)), in segmentation (B, H, W).
        eval_loader: what ``evaluator`` takes: where one is given, this process's share of the images.
        recipe: how to train.
        accelerator: from :func:`make_accelerator`.
        state_dir: where the whole state is kept after every epoch, replaced as one, and the state before it as
            ``<state_dir>.old``; a state found there is continued from, the older one with a warning where the newer
            one is damaged. ``None`` keeps none.
        settings: what else decides the run, by name, as plain values: where its images are, how they are augmented. It
            is kept with the state, which is continued with the same alone: the same settings, recipe, model, losses,
            teacher, images in a batch, precision and number of processes.
        evaluator: called after every epoch with the model, ``eval_loader`` and ``accelerator=``; gives the fields of
            :class:`EpochResult` that it measures. ``None``: :func:`evaluate`.
        recovery_interval: also keep the state after every so many steps of the optimiser within an epoch; 0 does not.
        summary: a CSV file with the results of all epochs so far, in the columns of timm's ``train.py``.
        name: shown before the progress.

    Returns:
        One result per epoch, those before a continuation included.

    Raises:
        ValueError: ``train_loader`` is empty, or the state is of a run with other settings, which are named.
        OSError: a state or the summary cannot be written; the state before it is still whole.
        FloatingPointError: the loss is no longer finite.
    """
    if len(train_loader) == 0:
        raise ValueError("train_loader is empty: expected at least one batch of (images, targets)")
    set_seed(recipe.seed)
    accelerator.free_memory()  # what an earlier run prepared is not part of this run's state
    student = task.trainable_module
    began = {}
    if state_dir is not None:
        began = run_settings(asdict(recipe), settings or {}, task, train_loader, accelerator)
    mix = _mix(recipe, student)
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if sharded and recipe.model_ema_decay is not None:
        raise ValueError("model_ema_decay must be None under FSDP: no process has all weights to average")
    whole = copy.deepcopy(student) if sharded else None
    if recipe.model_ema_decay is not None:
        task.setup_ema(decay=recipe.model_ema_decay)
    optimizer = create_optimizer_v2(
        student, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay
    )
    model, optimizer, train_loader = accelerator.prepare(student, optimizer, train_loader)
    if evaluator is None:
        eval_loader = accelerator.prepare(eval_loader)
    task.trainable_module = model
    task.to(accelerator.device)
    steps, group = len(train_loader), recipe.grad_accum_steps
    updates = math.ceil(steps / group)  # of an epoch; the last may be of fewer batches
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=recipe.sched,
        decay_rate=_POLY_POWER,
        num_epochs=recipe.epochs,
        warmup_epochs=recipe.warmup_epochs,
        warmup_lr=recipe.lr * 1e-3 if recipe.warmup_lr is None else recipe.warmup_lr,
        min_lr=recipe.min_lr,
        updates_per_epoch=updates,
        step_on_epochs=False,
    )
    progress = _load_state(accelerator, state_dir, began, task)
    if accelerator.log_with:
        accelerator.init_trackers("")
    results = progress.results
    for epoch in range(len(results), recipe.epochs):
        label = f"{name} {epoch + 1}/{recipe.epochs}"
        task.train()
        loss, top1, speed = progress.loss, progress.top1, 0.0
        done, before = progress.steps, loss.count
        start = time.perf_counter()
        # Some samplers draw from the generators that all share: in every process alike, and in a continued run again.
        set_seed(recipe.seed + epoch)
        batches = skip_first_batches(train_loader, done) if done else train_loader
        tell_epoch(batches, epoch)
        bar = tqdm(
            batches, label, total=steps, initial=done, leave=False, disable=not accelerator.is_local_main_process
        )
        for step, (images, targets) in enumerate(bar, done):
            # What is random in a step is told by its number, so that a continued run draws as it would have.
            seed = _step_seed(recipe.seed, epoch * steps + step, accelerator.process_index)
            torch.manual_seed(seed)
            update = epoch * updates + step // group
            scheduler.step_update(update)
            wanted = targets
            if mix is not None:
                if len(images) % 2:
                    raise ValueError(
                        f"mixup and cutmix pair a batch's images: expected an even number, got {len(images)}"
                    )
                numpy.random.seed(_step_seed(recipe.seed, epoch * steps + step, 0))  # in all processes alike
                images, wanted = mix(images, targets)
            ends_group = (step + 1) % group == 0 or step + 1 == steps
            with contextlib.nullcontext() if ends_group else accelerator.no_sync(model):
                with accelerator.autocast():
                    result = task(images, wanted)
                loss_value = accelerator.reduce(result["loss"].detach(), "mean").item()
                if not math.isfinite(loss_value):
                    raise FloatingPointError(
                        f"the loss became {loss_value} in epoch {epoch + 1}, step {step + 1}; a lower learning "
                        f"rate than {recipe.lr} or more warm-up epochs than {recipe.warmup_epochs} may help"
                    )
                # The batches of this step of the optimiser, of which the last of an epoch may have fewer.
                accelerator.backward(result["loss"] / min(group, steps - step // group * group))
            loss.update(loss_value, len(images))
            hits, counted = accelerator.reduce(_hits(result["output"].detach(), targets), "sum").tolist()
            top1.update(100 * hits / max(counted, 1), len(images))
            speed = (loss.count - before) * accelerator.num_processes / (time.perf_counter() - start)
            bar.set_postfix_str(f"loss {loss.avg:.3f}, accuracy {top1.avg:.1f}%, {speed:.0f} images/s")
            if not ends_group:
                continue
            if recipe.clip_grad is not None:
                accelerator.clip_grad_norm_(model.parameters(), recipe.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema(update + 1)
            if recovery_interval and (step // group + 1) % recovery_interval == 0 and step + 1 < steps:
                _save_state(accelerator, state_dir, began, task, _Progress(results, step + 1, loss, top1))
        bar.close()
        measured = (evaluator or evaluate)(
            task.trainable_module_ema.module if task.has_ema() else model, eval_loader, accelerator=accelerator
        )
        known = {field.name: measured[field.name] for field in fields(EpochResult) if field.name in measured}
        lr = max(parameters["lr"] for parameters in optimizer.param_groups)
        results.append(EpochResult(epoch + 1, loss.avg, top1.avg, speed, lr, **known))
        mean_iou = f", mIoU {known['miou']:.2f}%" if "miou" in known else ""
        accelerator.print(
            f"{label}: loss {loss.avg:.4f}, accuracy {top1.avg:.2f}% in training, {known['top1']:.2f}% in "
            f"evaluation{mean_iou}, {speed:.0f} images/s"
        )
        if summary is not None and accelerator.is_main_process:
            write_atomically(summary, _summary(results).encode())
        logged = {name: value for name, value in asdict(results[-1]).items() if value is not None and name != "epoch"}
        accelerator.log(logged, step=epoch + 1)
        progress = _Progress(results)
        _save_state(accelerator, state_dir, began, task, progress)
    if summary is not None and accelerator.is_main_process:  # a run that was stopped before its last line, too
        write_atomically(summary, _summary(results).encode())
    accelerator.wait_for_everyone()
    if sharded:  # the first process gets the weights, and saves them
        weights = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            whole.load_state_dict(weights)
        task.trainable_module = whole.to(accelerator.device)
    else:
        task.trainable_module = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if task.has_ema():
        task.trainable_module.load_state_dict(task.trainable_module_ema.module.state_dict())
        del task.trainable_module_ema
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


def _hits(logits: Tensor, targets: Tensor) -> Tensor:
    """How many targets the logits (targets, classes) name, and how many there are; in segmentation, with a label."""
    counted = targets != IGNORED if targets.dim() > 1 else torch.ones_like(targets, dtype=torch.bool)
    hits = (logits.argmax(dim=1) == targets.flatten()) & counted.flatten()
    return torch.stack([hits.sum(), counted.sum()])


def _mix(recipe: Recipe, model: nn.Module) -> Mixup | None:
    """timm's mixup and cutmix, which turn targets (B,) into (B, classes)."""
    if not (recipe.mixup or recipe.cutmix):
        return None
    return Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=model.num_classes)


def _summary(results: list[EpochResult]) -> str:
    """CSV with the columns that timm's ``train.py`` writes, and the speed."""
    columns = {
        "epoch": "epoch",
        "train_loss": "train_loss",
        "train_top1": "train_top1",
        "eval_loss": "loss",
        "eval_top1": "top1",
        "eval_top5": "top5",
        "lr": "lr",
        "samples_per_sec": "images_per_second",
    }
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if any(result.miou is not None for result in results):
        columns |= {"eval_miou": "miou", "eval_macc": "macc"}
    columns = {
        name: field for name, field in columns.items() if any(getattr(result, field) is not None for result in results)
    }
    writer.writerow(columns)
    writer.writerows([getattr(result, field) for field in columns.values()] for result in results)
    return text.getvalue()


class _Progress:
    """How far a run is: the epochs behind it, and the steps of the next one with their averages."""

    def __init__(
        self,
        results: list[EpochResult],
        steps: int = 0,
        loss: AverageMeter | None = None,
        top1: AverageMeter | None = None,
    ) -> None:
        self.results, self.steps = results, steps
        self.loss, self.top1 = loss or AverageMeter(), top1 or AverageMeter()

    def to_dict(self) -> dict:
        meters = {name: vars(getattr(self, name)) for name in ("loss", "top1")}
        return {"results": [asdict(result) for result in self.results], "steps": self.steps, **meters}

    @classmethod
    def from_dict(cls, values: dict) -> "_Progress":
        progress = cls([EpochResult(**result) for result in values["results"]], values["steps"])
        for name in ("loss", "top1"):
            vars(getattr(progress, name)).update(values[name])
        return progress


def _step_seed(seed: int, step: int, process: int) -> int:
    return int(numpy.random.SeedSequence([seed, step, process]).generate_state(1)[0])


def _save_state(
    accelerator: Accelerator,
    state_dir: str | os.PathLike | None,
    began: dict[str, dict],
    task: TrainingTask,
    progress: _Progress,
) -> None:
    """Write the state beside the last one, then let it take its place: at every moment one of them is whole."""
    if state_dir is None:
        return
    state = Path(state_dir)
    new, old = state.with_name(f"{state.name}.new"), state.with_name(f"{state.name}.old")
    if accelerator.is_main_process:
        shutil.rmtree(new, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(new))
        if accelerator.is_main_process and task.has_ema():
            save_model(task.trainable_module_ema.module, str(new / _EMA))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            values = {"format": _STATE_FORMAT, "began": began, "files": _digests(new), **progress.to_dict()}
            content = json.dumps(values, indent=2).encode()
            write_atomically(new / _PROGRESS, f"{hashlib.sha256(content).hexdigest()}\n".encode() + content)
    except (OSError, SafetensorError, RuntimeError) as error:  # where the disk is full, torch says RuntimeError
        shutil.rmtree(new, ignore_errors=True)
        raise OSError(f"the state could not be written to {new}; the one before it is untouched: {error}") from error
    if accelerator.is_main_process:
        if state.exists():
            shutil.rmtree(old, ignore_errors=True)
            state.rename(old)
        new.rename(state)
    accelerator.wait_for_everyone()


def _load_state(
    accelerator: Accelerator, state_dir: str | os.PathLike | None, began: dict[str, dict], task: TrainingTask
) -> _Progress:
    """Load the newest whole state; a run that begins where there is none.

    Raises:
        ValueError: the state is of a run with other settings, of another version, or every state there is is damaged.
    """
    if state_dir is None:
        return _Progress([])
    state = Path(state_dir)
    damaged = []
    for folder in (state, state.with_name(f"{state.name}.old")):
        if not folder.exists():
            continue
        content = _whole_state(folder)
        if content is None:
            damaged.append(folder)
            continue
        if content.get("format") != _STATE_FORMAT:
            raise ValueError(
                f"{state} holds an unfinished run of another version of pm-vit; finish it with that version, or delete "
                "it to start anew"
            )
        refuse_other_settings(content["began"], began, state)
        if damaged:
            warnings.warn(f"{damaged[0]} is damaged; continuing from {folder}, the state before it", stacklevel=3)
        try:
            accelerator.load_state(str(folder))
            if task.has_ema():
                load_model(task.trainable_module_ema.module, folder / _EMA)
        except Exception as error:  # torch, accelerate and pickle raise a dozen kinds
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{folder} cannot be continued from ({reason}); delete it to start anew") from error
        progress = _Progress.from_dict(content)
        where = f"epoch {len(progress.results)}" + (f" and {progress.steps} steps" if progress.steps else "")
        accelerator.print(f"continuing after {where} of {began['recipe']['epochs']}, from {folder}")
        return progress
    if damaged:
        raise ValueError(
            f"{' and '.join(map(str, damaged))} cannot be continued from: damaged; delete it to start anew"
        )
    return _Progress([])


def _whole_state(folder: Path) -> dict | None:
    """What a state's progress file says, where it and every other file are as they were written."""
    try:
        digest, _, content = (folder / _PROGRESS).read_bytes().partition(b"\n")
    except OSError:
        return None
    if digest.decode(errors="replace") != hashlib.sha256(content).hexdigest():
        return None
    values = json.loads(content)
    return values if values["files"] == _digests(folder) else None


def _digests(folder: Path) -> dict[str, str]:
    """Of every file of a state but the progress file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != _PROGRESS:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(2**24):
                    digest.update(chunk)
            found[str(path.relative_to(folder))] = digest.hexdigest()
    return found
