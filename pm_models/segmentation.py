"""Semantic segmentation in one place: data from :mod:`pm_models.data`, measures from :mod:`pm_models.training`."""

from .data import (
    IGNORED,
    LAYOUTS,
    Sample,
    SegmentationImages,
    evaluation_transform,
    make_evaluation_loader,
    make_scoring_loader,
    make_training_loader,
    sample_images,
    training_transform,
)
from .training import Measures, evaluate_segmentation, measures, predicted_classes

__all__ = [
    "IGNORED", "LAYOUTS", "Measures", "Sample", "SegmentationImages", "evaluate_segmentation", "evaluation_transform",
    "make_evaluation_loader", "make_scoring_loader", "make_training_loader", "measures", "predicted_classes",
    "sample_images", "training_transform",
]  # fmt: skip
