"""Training, distillation and evaluation of classifiers and Segmenters, on timm's parts, driven by accelerate."""

from .devices import launched_processes, make_accelerator
from .evaluation import Evaluator, Measures, evaluate, evaluate_segmentation, measures, predicted_classes
from .loop import fit
from .losses import IGNORED, SegmentationTask, classification_task, distillation_task, segmentation_loss
from .recipe import SCHEDULES, EpochResult, Recipe

__all__ = [
    "IGNORED", "SCHEDULES", "EpochResult", "Evaluator", "Measures", "Recipe", "SegmentationTask",
    "classification_task", "distillation_task", "evaluate", "evaluate_segmentation", "fit", "launched_processes",
    "make_accelerator", "measures", "predicted_classes", "segmentation_loss",
]  # fmt: skip
