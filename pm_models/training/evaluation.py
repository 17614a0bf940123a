"""Evaluate models: loss and accuracy of a classifier, mIoU and accuracies of a Segmenter."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.utils import AverageMeter, accuracy
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix
from tqdm import tqdm

from ..data import IGNORED
from ..data.loaders import images_and_targets
from ..segmenter import Segmenter, predict

Evaluator = Callable[..., dict[str, float]]


def evaluate(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], *, accelerator: Accelerator
) -> dict[str, float]:
    """Loss and accuracy (percent) of a model on all images of a loader.

    Args:
        model: a model on the accelerator's device.
        loader: yields (images, targets); with several processes, prepared by the accelerator.
        accelerator: device, precision and processes.

    Returns:
        ``loss``, ``top1``, ``top5`` (with fewer than five classes, of as many as there are) and ``images``.

    Raises:
        ValueError: the loader is empty.
    """
    model.eval()
    loss, top1, top5 = AverageMeter(), AverageMeter(), AverageMeter()
    with torch.inference_mode(), accelerator.autocast():
        for batch in tqdm(loader, "evaluate", leave=False, disable=not accelerator.is_local_main_process):
            images, targets = images_and_targets(batch)
            logits = model(images.to(accelerator.device)).float()
            logits, targets = accelerator.gather_for_metrics((logits, targets.to(accelerator.device)))
            first, fifth = accuracy(logits, targets, topk=(1, min(5, logits.shape[1])))
            loss.update(F.cross_entropy(logits, targets).item(), len(targets))
            top1.update(first.item(), len(targets))
            top5.update(fifth.item(), len(targets))
    if loss.count == 0:
        raise ValueError("loader is empty: expected at least one batch of (images, targets)")
    return {"loss": loss.avg, "top1": top1.avg, "top5": top5.avg, "images": loss.count}


class Measures(NamedTuple):
    """Measures over all labelled pixels, in percent; means are over the classes that occur."""

    miou: float
    macc: float
    aacc: float
    iou: list[float | None]  # of each class; None where it neither occurs nor is predicted


def measures(confusion: Tensor) -> Measures:
    """Intersection over union and accuracies from a confusion matrix (labels, predictions).

    The mean IoU is over classes that occur in labels or predictions, the mean accuracy over those in labels.

    Raises:
        ValueError: no pixel has a label.
    """
    confusion = confusion.double()
    if confusion.sum() == 0:
        raise ValueError("no pixel has a label: all of them are ignored")
    hits, labelled, predicted = confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)
    union = labelled + predicted - hits
    iou = 100 * hits / union
    return Measures(
        miou=iou[union > 0].mean().item(),
        macc=(100 * hits / labelled)[labelled > 0].mean().item(),
        aacc=(100 * hits.sum() / confusion.sum()).item(),
        iou=[value if exists else None for value, exists in zip(iou.tolist(), (union > 0).tolist(), strict=True)],
    )


def evaluate_segmentation(
    model: Segmenter,
    images: Iterable[tuple[Tensor, Tensor]],
    *,
    accelerator: Accelerator,
    stride: int | None = None,
    scales: tuple[float, ...] = (1.0,),
    flip: bool = False,
) -> Measures:
    """mIoU and accuracies of a model, evaluated by sliding windows at the size of each image's labels.

    Args:
        model: a model on the accelerator's device.
        images: yields batches (images (B, 3, H, W), labels (B, h, w)), of one image each if sizes differ. With several
            processes each gets its share, and all return the measures over all images.
        accelerator: device, precision and processes.
        stride: see :func:`pm_models.segmenter.sliding_window`.
        scales: see :func:`pm_models.segmenter.predict`.
        flip: see :func:`pm_models.segmenter.predict`.

    Raises:
        ValueError: there are no images, or no pixel has a label.
    """
    model = accelerator.unwrap_model(model).eval()
    confusion = MulticlassConfusionMatrix(model.num_classes, ignore_index=IGNORED, validate_args=False)
    confusion.to(accelerator.device)
    with torch.inference_mode(), accelerator.autocast():
        for batch, labels in tqdm(images, "evaluate", leave=False, disable=not accelerator.is_local_main_process):
            labels = labels.to(accelerator.device)
            batch = batch.to(accelerator.device)
            logits = predict(model, batch, labels.shape[-2:], stride=stride, scales=scales, flip=flip)
            confusion.update(logits.argmax(dim=1), labels)
    return measures(accelerator.reduce(confusion.confmat, "sum").cpu())


def predicted_classes(model: Segmenter, image: Tensor, size: tuple[int, int]) -> np.ndarray:
    """The class of every pixel, (h, w) = ``size``, of a normalised image (3, H, W), by sliding windows."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        logits = predict(model.eval(), image[None].to(device), size)[0]
    return logits.argmax(dim=0).cpu().numpy()
