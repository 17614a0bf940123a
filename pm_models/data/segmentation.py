"""Images with a class for every pixel, from folders of images and label maps: crops for training, or whole images."""

import copy
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

from ..segmenter import Segmenter
from .images import check_is_image, files_below, first_names, is_turned, read_image, read_label_map, split_folder
from .loaders import SeededImages, check_size, normalisation, random_batches

Floats = tuple[float, ...]
IGNORED = 255  # the label of pixels that are neither trained on nor counted
_SURVEYED = 2000  # label maps to look at before training, in about ten seconds


class Layout(NamedTuple):
    """Where a kind of data set keeps images and label maps, each in a folder per split."""

    images: str
    labels: str
    num_classes: int | None  # None: given by the user
    zero_is_ignored: bool = False  # and class c is stored as c + 1
    image_ending: str = ""
    label_endings: tuple[str, ...] = (".png", ".tif", ".tiff", ".bmp")  # lossless formats


LAYOUTS = {
    "ADE20K": Layout("images", "annotations", 150, zero_is_ignored=True, label_endings=(".png",)),
    "Cityscapes": Layout(
        "leftImg8bit", "gtFine", 19, image_ending="_leftImg8bit", label_endings=("_gtFine_labelTrainIds.png",)
    ),
    "plain": Layout("images", "labels", None),
    "plain, by another name": Layout("images", "annotations", None),  # with other numbers of classes than ADE20K's
}


class SegmentationImages(Dataset):
    """Images and their label maps, from folders in one of three layouts.

    - ADE20K: ``images/<split>/*.jpg`` and ``annotations/<split>/*.png``, where 0 is ignored and class c is stored as
      c + 1.
    - Cityscapes: ``leftImg8bit/<split>/<city>/*`` and ``gtFine/...`` with training indices.
    - Plain: ``images/<split>/*`` and ``labels/<split>/*`` with the same names, in subfolders or not, with class
      indices. ``annotations`` is read in the same way if ``num_classes`` is given and is not ADE20K's 150.

    Images may have any format that Pillow reads and are taken as viewers display them: if an EXIF tag rotates an image,
    its label map is that of the rotated one. Label maps are PNG, TIFF or BMP files with one channel.

    Args:
        root: the folder.
        split: ``"train"`` or ``"validation"`` (whose folder may be called val or test), or another folder's name.
        num_classes: number of classes; ``None``: that of ADE20K (150) or Cityscapes (19).
        ignore_index: a label that, like 255, is neither trained on nor counted.
        transform: maps an image (tv_tensors.Image, uint8) and its labels (tv_tensors.Mask) to such a pair.

    Raises:
        FileNotFoundError: there is no such folder, or an image has no label map.
        ValueError: the folder has no images, or a file that is not an image; or ``num_classes`` is needed and missing.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        split: str,
        *,
        num_classes: int | None = None,
        ignore_index: int = IGNORED,
        transform: Callable | None = None,
    ) -> None:
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"no data folder at {root}")
        self._layout = _layout_of(root, num_classes)
        self.num_classes = num_classes or self._layout.num_classes
        if self.num_classes is None:
            raise ValueError(f"num_classes must be given for {root}, because its folders do not determine it")
        images = split_folder(root / self._layout.images, split, "<image>")
        self.label_folder = root / self._layout.labels / images.name
        paths = sorted(Path(path) for path in files_below(images))
        for path in paths:
            check_is_image(str(path))
        self.pairs = [(path, self._label_path(path.relative_to(images))) for path in paths]
        if not self.pairs:
            raise ValueError(f"{images} holds no images")
        missing = [label for _, label in self.pairs if not label.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of the {len(self.pairs)} images in {images} have no label map; the first: "
                f"{' or '.join([str(missing[0]), *self._layout.label_endings[1:]])}"
            )
        self.ignore_index = ignore_index
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """An image (3, H, W) and its labels (H, W) int64, in 0..num_classes - 1 or ``IGNORED``.

        Raises:
            ValueError: the label map is not a one-channel image of the image's size, or has an unknown class.
        """
        image_path, label_path = self.pairs[index]
        image = tv_tensors.Image(read_image(image_path))
        labels = tv_tensors.Mask(self.classes(read_label_map(label_path), label_path))
        if labels.shape != image.shape[1:]:
            turned = ", turned as its EXIF tag says: labels are for the image as it is shown"
            raise ValueError(
                f"{label_path} is {labels.shape[-1]} x {labels.shape[-2]}, but its image is "
                f"{image.shape[-1]} x {image.shape[-2]}{turned if is_turned(image_path) else ''}"
            )
        return (image, labels) if self.transform is None else self.transform(image, labels)

    def classes(self, values: np.ndarray, path: Path) -> Tensor:
        """The int64 classes of the values stored in a label map at ``path``, with ``IGNORED`` for ignored pixels.

        Raises:
            ValueError: a value is not a class.
        """
        labels = torch.from_numpy(values.astype(np.int64))
        ignored = (labels == IGNORED) | (labels == self.ignore_index)
        if self._layout.zero_is_ignored:
            ignored |= labels == 0
            labels = labels - 1
        labels[ignored] = IGNORED
        unknown = labels[(labels >= self.num_classes) & ~ignored | (labels < 0)]
        if len(unknown):
            raise ValueError(
                f"{path} has the class {int(unknown[0])}, expected 0 to {self.num_classes - 1}, or {IGNORED} or "
                f"ignore_index {self.ignore_index} for pixels to leave out"
            )
        return labels

    def _label_path(self, image: Path) -> Path:
        """The label map of an image, whose path is relative to the split; if there is none, where it should be."""
        stem = image.stem.removesuffix(self._layout.image_ending)
        places = [self.label_folder / image.parent / f"{stem}{ending}" for ending in self._layout.label_endings]
        upper = (place.with_suffix(place.suffix.upper()) for place in places)
        return next((place for place in (*places, *upper) if place.is_file()), places[0])


def _layout_of(root: Path, num_classes: int | None) -> Layout:
    """The layout whose folder of label maps exists; ADE20K's, which shifts labels, only for its number of classes."""
    for layout in LAYOUTS.values():
        shifts_others = layout.zero_is_ignored and num_classes not in (None, layout.num_classes)
        if (root / layout.labels).is_dir() and not shifts_others:
            return layout
    labels = ", ".join(dict.fromkeys(layout.labels for layout in LAYOUTS.values()))
    raise FileNotFoundError(f"{root} has no folder of label maps; expected one of {labels}")


def warn_of_labels(dataset: SegmentationImages) -> None:
    """Warn about classes that never occur and, with two classes, about label maps that hold only 0 and 255.

    At most 2000 random label maps are read. With more than two classes, reading ends once every class has occurred.

    Raises:
        ValueError: a label map that was read is broken, or has an unknown class.
    """
    chosen = random.Random(0).sample([label for _, label in dataset.pairs], min(len(dataset), _SURVEYED))
    missing, masks = set(range(dataset.num_classes)), []
    for path in tqdm(chosen, "labels", leave=False, delay=2):
        values = np.unique(read_label_map(path))
        missing -= set(dataset.classes(values, path).tolist())
        if dataset.num_classes != 2 and not missing:
            return
        if dataset.num_classes == 2 and IGNORED in values and np.isin(values, (0, IGNORED)).all():
            masks.append(path)
    where = f"the {len(dataset)} label maps in {dataset.label_folder}"
    if len(chosen) < len(dataset):
        where = f"{len(chosen)} label maps drawn at random from {where}"
    if missing:
        names = first_names([str(label) for label in sorted(missing)], most=10)
        warnings.warn(
            f"{len(missing)} of {dataset.num_classes} classes never occur in {where}, and cannot be learned: {names}",
            stacklevel=2,
        )
    if masks:
        warnings.warn(
            f"{len(masks)} of {where} hold only 0 and {IGNORED} (the first: {min(masks)}), and {IGNORED} is left out: "
            "save masks with the classes 0 and 1",
            stacklevel=2,
        )


def training_transform(
    size: tuple[int, int], mean: Floats, std: Floats, scale: tuple[float, float] = (0.5, 2.0)
) -> Callable:
    """Segmenter's augmentation: random scale, crop, mirroring and colours.

    Args:
        size: (height, width) of the crops.
        mean, std: of the channels, from 0 to 1.
        scale: range of the image's shorter side relative to the crop's longer one. Where a crop reaches beyond the
            image, it is filled with the mean, and its labels with ``IGNORED``.

    Raises:
        ValueError: ``scale`` is not a range above 0.
    """
    if not 0 < scale[0] <= scale[1]:
        raise ValueError(f"scale must be two numbers above 0, the smaller first, got {scale[0]:g} and {scale[1]:g}")
    steps = [*_crop(size, mean, scale), v2.RandomHorizontalFlip(), v2.RandomPhotometricDistort()]
    return v2.Compose([*steps, *_normalise(mean, std)])


def _crop(size: tuple[int, int], mean: Floats, scale: tuple[float, float]) -> list[v2.Transform]:
    least, most = (round(factor * max(size)) for factor in scale)
    fill = {tv_tensors.Image: [round(255 * value) for value in mean], tv_tensors.Mask: IGNORED}
    return [
        v2.RandomShortestSize(list(range(max(1, least), most + 1))),
        v2.RandomCrop(size, pad_if_needed=True, fill=fill),
    ]


def evaluation_transform(size: tuple[int, int], mean: Floats, std: Floats) -> Callable:
    """Resize the shorter side of the image to the longer one of ``size`` and normalise; labels keep their size."""
    return v2.Compose([_ResizeImage(max(size)), *_normalise(mean, std)])


class _ResizeImage(v2.Resize):
    """Resize images, but not label maps."""

    def transform(self, inpt: object, params: dict) -> object:
        return super().transform(inpt, params) if isinstance(inpt, tv_tensors.Image) else inpt


def _normalise(mean: Floats, std: Floats) -> list[v2.Transform]:
    """Convert uint8 images to normalised floats, and images and labels to plain tensors."""
    to_float = v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)
    return [to_float, v2.Normalize(mean, std), v2.ToPureTensor()]


def make_training_loader(
    dataset: SegmentationImages,
    model: Segmenter,
    *,
    batch_size: int,
    workers: int,
    seed: int = 0,
    scale: tuple[float, float] = (0.5, 2.0),
    **given: Floats,
) -> DataLoader:
    """Shuffled batches of augmented crops (B, 3, H, W) and labels (B, H, W) of the model's size.

    Args:
        dataset: images and labels; its transform is not used.
        model: determines the size and, unless given, mean and standard deviation.
        batch_size: crops per batch; the last incomplete batch is dropped.
        workers: loader processes; 0 loads in this one.
        seed: of the augmentation.
        scale: as in :func:`training_transform`.
        given: ``mean=`` and ``std=``.

    Raises:
        ValueError: there are fewer images than in a batch.
    """
    check_size(dataset, batch_size)
    transform = training_transform(model.image_size, *normalisation(model, given), scale)
    return DataLoader(
        SeededImages(_with_transform(dataset, transform), seed),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def make_evaluation_loader(
    dataset: SegmentationImages, model: Segmenter, *, workers: int, share: tuple[int, int] = (0, 1), **given: Floats
) -> DataLoader:
    """Whole images one by one, (1, 3, H, W), with their labels (1, h, w) at the labels' own size.

    ``share`` = (index, count) selects one of ``count`` shares of the images, such as that of a process. The other
    arguments are those of :func:`make_training_loader`.
    """
    images = _with_transform(dataset, evaluation_transform(model.image_size, *normalisation(model, given)))
    images = Subset(images, range(share[0], len(images), share[1]))
    return DataLoader(images, num_workers=workers, persistent_workers=workers > 0)


def make_scoring_loader(
    dataset: SegmentationImages,
    model: Segmenter,
    *,
    batches: int,
    batch_size: int,
    workers: int,
    seed: int,
    **given: Floats,
) -> DataLoader:
    """``batches`` batches for scoring tokens: random crops at the scale of evaluation, fixed by the seed."""
    mean, std = normalisation(model, given)
    transform = v2.Compose([*_crop(model.image_size, mean, (1.0, 1.0)), *_normalise(mean, std)])
    images = SeededImages(_with_transform(dataset, transform), seed)
    return random_batches(images, batches=batches, batch_size=batch_size, workers=workers, seed=seed)


def _with_transform(dataset: SegmentationImages, transform: Callable) -> SegmentationImages:
    dataset = copy.copy(dataset)
    dataset.transform = transform
    return dataset
