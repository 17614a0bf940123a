"""Load images with classes or label maps, from folders or timm's data sets, preprocessed for a model."""

from .classification import (
    FolderImages,
    calibration_loader,
    check_classes,
    check_same_classes,
    class_names,
    make_loader,
    open_dataset,
)
from .images import read_image, read_label_map
from .loaders import SeededImages, tell_epoch
from .samples import Sample, read_sample, sample_images
from .segmentation import (
    IGNORED,
    LAYOUTS,
    SegmentationImages,
    evaluation_transform,
    make_evaluation_loader,
    make_scoring_loader,
    make_training_loader,
    training_transform,
    warn_of_labels,
)

__all__ = [
    "IGNORED", "LAYOUTS", "FolderImages", "Sample", "SeededImages", "SegmentationImages", "calibration_loader",
    "check_classes", "check_same_classes", "class_names", "evaluation_transform",
    "make_evaluation_loader", "make_loader", "make_scoring_loader", "make_training_loader", "open_dataset",
    "read_image", "read_label_map", "read_sample", "sample_images", "tell_epoch", "training_transform",
    "warn_of_labels",
]  # fmt: skip
