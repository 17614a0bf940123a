"""Some images of a data set, to draw."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ..models import Model
from .classification import make_loader
from .loaders import normalisation
from .segmentation import SegmentationImages, make_evaluation_loader


class Sample(NamedTuple):
    """An image to draw, (H, W, 3) or grey (H, W), from 0 to 1; the same normalised, (C, H, W); its label or labels."""

    picture: np.ndarray
    image: Tensor
    labels: np.ndarray


def sample_images(dataset: Dataset, model: Model, count: int, **options: object) -> list[Sample]:
    """Some images from all over the data set, as the model is evaluated on them.

    Where the data set can only be read in order, they are its first.

    Args:
        dataset: of either kind.
        model: a classifier, or a Segmenter for :class:`SegmentationImages`.
        count: of the images; all where there are fewer.
        options: those of :func:`make_loader` or :func:`make_evaluation_loader`.
    """
    if isinstance(dataset, SegmentationImages):
        loader = make_evaluation_loader(dataset, model, workers=0, **options)
    else:
        loader = make_loader(dataset, model, batch_size=count, workers=0, **options)
    if isinstance(dataset, IterableDataset):
        chosen = zip(*next(iter(loader)), strict=True)
    else:
        count = min(count, len(dataset))
        chosen = (loader.dataset[index * len(dataset) // count] for index in range(count))
    mean, std = (torch.tensor(values)[:, None, None] for values in normalisation(model, options))
    return [
        Sample((image * std + mean).clamp(0, 1).movedim(0, -1).squeeze(-1).numpy(), image, np.asarray(labels))
        for image, labels in chosen
    ]
