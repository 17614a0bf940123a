"""Segmentation data and measures: images with label maps from folders, crops to train on, mIoU by sliding windows."""

import copy
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from accelerate import Accelerator
from timm.data import resolve_model_data_config
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchmetrics.classification import MulticlassConfusionMatrix
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

from .data import SPLIT_NAMES, SeededImages, check_size, random_subset
from .images import check_is_image, files_below, is_turned, read_image, read_label_map
from .segmenter import Segmenter, predict
from .training import IGNORED


class Layout(NamedTuple):
    """Where a kind of data set has its images and label maps, below a folder for each split."""

    images: str
    labels: str
    num_classes: int | None  # None: the user says
    zero_is_ignored: bool = False  # and class c is labelled c + 1
    image_ending: str = ""
    label_endings: tuple[str, ...] = (".png", ".tif", ".tiff", ".bmp")  # the types that keep every value


LAYOUTS = {
    "ADE20K": Layout("images", "annotations", 150, zero_is_ignored=True, label_endings=(".png",)),
    "Cityscapes": Layout(
        "leftImg8bit", "gtFine", 19, image_ending="_leftImg8bit", label_endings=("_gtFine_labelTrainIds.png",)
    ),
    "plain": Layout("images", "labels", None),
    "plain, by another name": Layout("images", "annotations", None),  # with other numbers of classes than ADE20K's
}


class SegmentationImages(Dataset):
    """Images and their label maps, from folders.

    Laid out as ADE20K (``images/<split>/*.jpg``, ``annotations/<split>/*.png``: 0 is left out, class c is labelled
    c + 1), as Cityscapes (``leftImg8bit/<split>/<city>/*``, ``gtFine/...``, labels by training index), or plainly
    (``images/<split>/*``, ``labels/<split>/*`` of the same names, in subfolders or not, with the classes as they are).
    ``annotations`` is ADE20K's for 150 classes alone; with another ``num_classes`` it is plain, as ``labels`` is.

    Images are of every kind that Pillow reads, and are seen as they are shown: where an EXIF tag turns an image, its
    label map is that of the turned one. Label maps are PNG, TIFF or BMP of one channel.

    Args:
        root: the folder.
        split: ``"train"`` or ``"validation"`` (whose folder may be called val or test), or another folder's name.
        num_classes: classes to tell apart; ``None``: those of ADE20K (150) and Cityscapes (19).
        ignore_index: a label that is neither trained on nor counted, as 255 is.
        transform: takes and gives an image (tv_tensors.Image, uint8) and its labels (tv_tensors.Mask).

    Raises:
        FileNotFoundError: there is no such folder, or an image has no label map.
        ValueError: the folder holds no images, or a file that is none; or ``num_classes`` is needed and not given.
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
        self._layout = next((layout for layout in LAYOUTS.values() if _is_meant(layout, root, num_classes)), None)
        if self._layout is None:
            labels = ", ".join(dict.fromkeys(layout.labels for layout in LAYOUTS.values()))
            raise FileNotFoundError(f"{root} has no folder of label maps; expected one of {labels}")
        self.num_classes = num_classes or self._layout.num_classes
        if self.num_classes is None:
            raise ValueError(f"num_classes must be given for {root}, whose folders do not tell it")
        names = SPLIT_NAMES.get(split, (split,))
        images = next((root / self._layout.images / name for name in names if _is_dir(root, self._layout, name)), None)
        if images is None:
            raise FileNotFoundError(f"{root / self._layout.images} has no folder {' or '.join(names)}")
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
            ValueError: the label map is no picture of one channel as large as the image, or has an unknown class.
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

    def classes(self, values: numpy.ndarray, path: Path) -> Tensor:
        """The classes, int64, of what is stored in the label map of that path, and ``IGNORED`` for what is left out.

        Raises:
            ValueError: a value is no class.
        """
        labels = torch.from_numpy(values.astype(numpy.int64))
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
        """The label map of an image of that path below the split's folder; where there is none, its usual path."""
        stem = image.stem.removesuffix(self._layout.image_ending)
        places = [self.label_folder / image.parent / f"{stem}{ending}" for ending in self._layout.label_endings]
        upper = (place.with_suffix(place.suffix.upper()) for place in places)
        return next((place for place in (*places, *upper) if place.is_file()), places[0])


def _is_meant(layout: Layout, root: Path, num_classes: int | None) -> bool:
    """Whether the layout's folder is there, and not that of other data: labels are shifted in ADE20K's alone."""
    shifted_by_mistake = layout.zero_is_ignored and num_classes not in (None, layout.num_classes)
    return (root / layout.labels).is_dir() and not shifted_by_mistake


def _is_dir(root: Path, layout: Layout, name: str) -> bool:
    return (root / layout.images / name).is_dir()


def training_transform(
    size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...], scale: tuple[float, float] = (0.5, 2.0)
) -> Callable:
    """Segmenter's augmentation: random size, crop, mirror, colours.

    Args:
        size: (height, width) of the crops.
        mean, std: of the channels, from 0 to 1.
        scale: range of the shorter side, over the crop's longer one. What a crop lacks is filled with the mean, and its
            labels with ``IGNORED``.

    Raises:
        ValueError: ``scale`` is no range above 0.
    """
    if not 0 < scale[0] <= scale[1]:
        raise ValueError(f"scale must be two numbers above 0, the smaller first, got {scale[0]:g} and {scale[1]:g}")
    return v2.Compose(
        [
            *_crop(size, mean, scale),
            v2.RandomHorizontalFlip(),
            v2.RandomPhotometricDistort(),
            _Normalised(mean, std),
        ]
    )


def scoring_transform(size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]) -> Callable:
    """A random crop of the image at the size that it is evaluated at."""
    return v2.Compose([*_crop(size, mean, (1.0, 1.0)), _Normalised(mean, std)])


def _crop(size: tuple[int, int], mean: tuple[float, ...], scale: tuple[float, float]) -> list[v2.Transform]:
    side = max(size)
    return [
        v2.RandomShortestSize(list(range(max(1, round(scale[0] * side)), round(scale[1] * side) + 1))),
        v2.RandomCrop(
            size,
            pad_if_needed=True,
            fill={tv_tensors.Image: [round(255 * value) for value in mean], tv_tensors.Mask: IGNORED},
        ),
    ]


def evaluation_transform(size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]) -> Callable:
    """The image with its shorter side as long as the longer one of ``size``, normalised; its labels as they are."""
    resize, normalise = v2.Resize(max(size)), _Normalised(mean, std)

    def transform(image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return normalise(resize(image), labels)

    return transform


class _Normalised(v2.Transform):
    """uint8 images as normalised floats, and plain tensors."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self._steps = v2.Compose(
            [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True), v2.Normalize(mean, std)]
        )

    def forward(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        image, labels = self._steps(image, labels)
        return image.as_subclass(Tensor), labels.as_subclass(Tensor)


def make_training_loader(
    dataset: SegmentationImages,
    model: Segmenter,
    *,
    batch_size: int,
    workers: int,
    seed: int = 0,
    scale: tuple[float, float] = (0.5, 2.0),
    **normalisation: tuple[float, ...],
) -> DataLoader:
    """Shuffled batches of augmented crops (B, 3, H, W) and labels (B, H, W) of the model's size.

    Args:
        dataset: images and labels; its transform is not used.
        model: its size, and where not given its mean and standard deviation, are used.
        batch_size: crops per batch; the last incomplete batch is dropped.
        workers: loader processes; 0 loads in this one.
        seed: of the augmentation.
        scale: as in :func:`training_transform`.
        normalisation: ``mean=`` and ``std=``.

    Raises:
        ValueError: there are fewer images than a batch has.
    """
    check_size(dataset, batch_size)
    transform = training_transform(model.image_size, *_mean_and_std(model, normalisation), scale)
    return DataLoader(
        SeededImages(_with_transform(dataset, transform), seed),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def make_evaluation_loader(
    dataset: SegmentationImages,
    model: Segmenter,
    *,
    workers: int,
    share: tuple[int, int] = (0, 1),
    **normalisation: tuple[float, ...],
) -> DataLoader:
    """Whole images one by one, (1, 3, H, W), with their labels (1, h, w) at their own size.

    ``share`` (index, count) takes one of so many shares of the images, such as that of a process; the rest is as in
    :func:`make_training_loader`.
    """
    transform = evaluation_transform(model.image_size, *_mean_and_std(model, normalisation))
    images = _with_transform(dataset, transform)
    return DataLoader(
        Subset(images, range(share[0], len(images), share[1])), num_workers=workers, persistent_workers=workers > 0
    )


def make_scoring_loader(
    dataset: SegmentationImages,
    model: Segmenter,
    *,
    batches: int,
    batch_size: int,
    workers: int,
    seed: int,
    **normalisation: tuple[float, ...],
) -> DataLoader:
    """``batches`` batches for scoring tokens: crops of images at random, the same for the same seed."""
    transform = scoring_transform(model.image_size, *_mean_and_std(model, normalisation))
    images = SeededImages(_with_transform(dataset, transform), seed)
    return DataLoader(random_subset(images, batches * batch_size, seed), batch_size, num_workers=workers)


class Sample(NamedTuple):
    """An image to draw (H, W, 3) from 0 to 1, the same normalised (3, H, W), and its labels (h, w)."""

    picture: numpy.ndarray
    image: Tensor
    labels: numpy.ndarray


def labelled_samples(
    dataset: SegmentationImages, model: Segmenter, count: int, **normalisation: tuple[float, ...]
) -> list[Sample]:
    """Some whole images from all over the data set, as the model is evaluated on them."""
    mean, std = _mean_and_std(model, normalisation)
    images = _with_transform(dataset, evaluation_transform(model.image_size, mean, std))
    count = min(count, len(images))
    found = []
    for index in range(count):
        image, labels = images[index * len(images) // count]
        picture = image * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
        found.append(Sample(picture.clamp(0, 1).movedim(0, -1).numpy(), image, labels.numpy()))
    return found


def predicted_classes(model: Segmenter, image: Tensor, size: tuple[int, int]) -> numpy.ndarray:
    """The class (h, w) = ``size`` of every pixel of an image (3, H, W), normalised, by sliding windows."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        found = predict(model.eval(), image[None].to(device), size)[0]
    return found.argmax(dim=0).cpu().numpy()


def _with_transform(dataset: SegmentationImages, transform: Callable) -> SegmentationImages:
    dataset = copy.copy(dataset)
    dataset.transform = transform
    return dataset


def _mean_and_std(model: Segmenter, given: dict[str, tuple[float, ...]]) -> tuple[tuple[float, ...], ...]:
    config = resolve_model_data_config(model.encoder) | given
    return tuple(config["mean"]), tuple(config["std"])


class Measures(NamedTuple):
    """Of all pixels with a label, in percent: the means are over the classes that occur."""

    miou: float
    macc: float
    aacc: float
    iou: list[float | None]  # of each class; None where it neither occurs nor is predicted


def measures(confusion: Tensor) -> Measures:
    """Intersection over union and accuracies from a confusion matrix (classes, classes), labels by predictions.

    A class that occurs in labels or predictions counts in the mean IoU, one that occurs in labels in the mean accuracy.

    Raises:
        ValueError: no pixel has a label.
    """
    confusion = confusion.double()
    if confusion.sum() == 0:
        raise ValueError("no pixel has a label: every one is ignored")
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
    """mIoU and accuracies of a model, each image by sliding windows and at the size of its labels.

    Args:
        model: on the accelerator's device.
        images: yields batches (images (B, 3, H, W), labels (B, h, w)); where sizes differ, one image each. Of several
            processes, each is given its share, and all return the measures of all images.
        accelerator: device, precision and processes.
        stride: see :func:`pm_models.segmenter.sliding_window`.
        scales: see :func:`pm_models.segmenter.predict`.
        flip: likewise.

    Raises:
        ValueError: there are no images, or no pixel has a label.
    """
    model = accelerator.unwrap_model(model).eval()
    confusion = MulticlassConfusionMatrix(model.num_classes, ignore_index=IGNORED, validate_args=False)
    confusion.to(accelerator.device)
    with torch.inference_mode(), accelerator.autocast():
        for batch, labels in tqdm(images, "evaluate", leave=False, disable=not accelerator.is_local_main_process):
            labels = labels.to(accelerator.device)
            found = predict(
                model, batch.to(accelerator.device), labels.shape[-2:], stride=stride, scales=scales, flip=flip
            )
            confusion.update(found.argmax(dim=1), labels)
    return measures(accelerator.reduce(confusion.confmat, "sum").cpu())
