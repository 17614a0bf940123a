"""How to train, and the results of each epoch."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, fields

SCHEDULES = ("cosine", "poly")


@dataclass(frozen=True)
class Recipe:
    """How to train. Fields have the names of the flags of timm's ``train.py``.

    Args:
        epochs: passes over the data.
        lr: peak learning rate.
        weight_decay: not applied to biases, norms, tokens, positions, merge and reconstruct matrices.
        warmup_epochs: epochs of linear warm-up from ``warmup_lr``, part of ``epochs``; then ``sched`` to ``min_lr``.
        warmup_lr: learning rate of the first step; ``None``: a thousandth of ``lr``.
        min_lr: learning rate at the end.
        clip_grad: largest gradient norm; ``None`` does not clip.
        opt: timm's name of the optimiser.
        sched: ``"cosine"``, or ``"poly"``, a polynomial of degree 0.9 in the remaining steps, as Segmenter uses it.
        layer_decay: learning rate of block ``l`` relative to that of block ``l + 1``; ``None``: all equal.
        grad_accum_steps: number of batches whose gradients make one optimiser step.
        model_ema_decay: keep an exponential moving average of the weights, which is evaluated and left in the model at
            the end; ``None`` keeps none.
        mixup: alpha of mixup; 0: no mixup.
        cutmix: alpha of cutmix, which gets half of the batches if ``mixup`` is used too; 0: no cutmix.
        seed: of shuffles, augmentations and stochastic depth.
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


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """Results of an epoch of training and the evaluation after it; accuracies in percent, ``lr`` of the last step.

    In segmentation, accuracies are over pixels; ``miou`` and ``macc`` are measured instead of ``loss`` and ``top5``.
    """

    epoch: int
    train_loss: float
    train_top1: float
    loss: float | None = None
    top1: float
    top5: float | None = None
    lr: float
    images_per_second: float
    miou: float | None = None
    macc: float | None = None


_TIMMS_NAMES = {"images_per_second": "samples_per_sec"} | {
    name: f"eval_{name}" for name in ("loss", "top1", "top5", "miou", "macc")
}


def summary_csv(results: Sequence[EpochResult]) -> str:
    """A CSV line for each epoch; the columns of measured values are named as in timm's ``train.py``."""
    names = [field.name for field in fields(EpochResult)]
    names = [name for name in names if any(getattr(result, name) is not None for result in results)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_TIMMS_NAMES.get(name, name) for name in names)
    writer.writerows([getattr(result, name) for name in names] for result in results)
    return text.getvalue()
