"""Training losses as timm's tasks: cross-entropy and soft distillation, for images or for pixels."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.task import ClassificationTask, LogitDistillationTask
from timm.task.task import TrainingTask
from torch import Tensor, nn

from ..data import IGNORED


def classification_task(model: nn.Module, *, smoothing: float = 0.0) -> TrainingTask:
    """Cross-entropy on the targets, with label smoothing."""
    return ClassificationTask(model, criterion=nn.CrossEntropyLoss(label_smoothing=smoothing), verbose=False)


def distillation_task(
    student: nn.Module, teacher: nn.Module, *, alpha: float = 1.0, temperature: float = 20.0, smoothing: float = 0.0
) -> TrainingTask:
    """Soft distillation: cross-entropy + ``alpha * T^2 * KL(teacher || student)`` at temperature ``T``.

    The divergence is averaged over the batch and the classes, as in the code of the paper (arXiv 2503.23455).
    """
    classes: Any = student.num_classes
    return LogitDistillationTask(
        student,
        teacher,
        criterion=nn.CrossEntropyLoss(label_smoothing=smoothing),
        task_loss_weight=1.0,
        # timm averages the divergence over the batch alone.
        distill_loss_weight=alpha / classes,
        temperature=temperature,
        verbose=False,
    )


class SegmentationTask(TrainingTask):
    """Cross-entropy over labelled pixels and, with a teacher, soft distillation over all pixels.

    The divergence is averaged over pixels and classes, just as :func:`distillation_task` averages it over images and
    classes. The cross-entropy of a batch without labels is 0.

    Args:
        student: a model from images (B, C, H, W) to logits (B, classes, H, W).
        teacher: a model of the same form; it is frozen.
        alpha: weight of the distillation loss.
        temperature: temperature of the distillation.
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
        """The losses of images and targets (B, H, W); ``output`` is (B * H * W, classes)."""
        maps = self.trainable_module(input)
        loss, logits = segmentation_loss(maps, target, shared=self.training), _by_pixel(maps)
        if self.teacher is not None:
            with torch.no_grad():
                wanted = (_by_pixel(self.teacher(input)) / self.temperature).log_softmax(dim=1)
            own = (logits / self.temperature).log_softmax(dim=1)
            divergence = F.kl_div(own, wanted, reduction="batchmean", log_target=True) / logits.shape[1]
            loss = loss + self.alpha * self.temperature**2 * divergence
        return {"loss": loss, "output": logits}


def segmentation_loss(logits: Tensor, targets: Tensor, *, shared: bool = False) -> Tensor:
    """Mean cross-entropy of logits (B, classes, H, W) over the labelled pixels of targets (B, H, W); 0 without any.

    ``shared``: divide by the labelled pixels of all processes, so that the mean of their losses is the loss over all
    images.
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
