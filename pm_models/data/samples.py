"""Sample images to draw, from a data set or from files."""

import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from torchvision import tv_tensors

from ..models import Model, encoder_of
from ..segmenter import Segmenter
from .classification import make_loader, preparation
from .images import read_image
from .loaders import normalisation
from .segmentation import SegmentationImages, evaluation_transform, make_evaluation_loader


class Sample(NamedTuple):
    """An image to draw, (H, W, 3) or grey (H, W), from 0 to 1, the normalised image (C, H, W), and its label(s)."""

    picture: np.ndarray
    image: Tensor
    labels: np.ndarray | None = None

    def cropped(self, size: tuple[int, int]) -> "Sample":
        """The centre of the image, ``size`` = (height, width) in pixels."""
        top, left = ((whole - side) // 2 for whole, side in zip(self.picture.shape, size, strict=False))
        rows, columns = slice(top, top + size[0]), slice(left, left + size[1])
        return Sample(self.picture[rows, columns], self.image[:, rows, columns])


def sample_images(dataset: Dataset, model: Model, count: int, **options: object) -> list[Sample]:
    """Images spread over the data set, prepared as for evaluation.

    If the data set can only be read in order, the first images are taken.

    Args:
        dataset: a data set for classification or segmentation.
        model: a classifier, or a Segmenter for :class:`SegmentationImages`.
        count: how many images; all if there are fewer.
        options: as for :func:`make_loader` or :func:`make_evaluation_loader`.
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
    return [Sample(_picture(image, model, options), image, np.asarray(labels)) for image, labels in chosen]


def read_sample(path: str | os.PathLike, model: Model) -> Sample:
    """An image file prepared as for evaluation; for a Segmenter, its centre in the model's size.

    Raises:
        OSError, ValueError: as :func:`read_image` does.
    """
    pixels = read_image(path, "L" if encoder_of(model).in_chans == 1 else "RGB")
    if isinstance(model, Segmenter):
        transform = evaluation_transform(model.image_size, *normalisation(model, {}))
        image = transform(tv_tensors.Image(pixels))
        return Sample(_picture(image, model, {}), image).cropped(model.image_size)
    image = create_transform(**preparation(model, {}))(pixels)
    return Sample(_picture(image, model, {}), image)


def _picture(image: Tensor, model: Model, given: Mapping[str, object]) -> np.ndarray:
    mean, std = (torch.tensor(values)[:, None, None] for values in normalisation(model, given))
    return (image * std + mean).clamp(0, 1).movedim(0, -1).squeeze(-1).numpy()
