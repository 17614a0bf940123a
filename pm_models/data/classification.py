"""Images with one class each, from folders or from any data set that timm reads."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.utils.misc import natural_key
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..models import input_size
from ..unwrapping import unwrapped
from ..vision_transformer import PlainModel
from .images import check_is_image, entries, first_names, is_image, read_image, split_folder
from .loaders import SeededImages, check_size, normalisation, random_batches

_EXPECTED = "expected <class>/<image> in it, one folder of images for each class"


class FolderImages(Dataset):
    """Images in one folder per class; labels number the classes in natural order, like timm's.

    Args:
        root: the folder of the class folders.
        mode: ``"RGB"`` or ``"L"``, colour or grey.

    Raises:
        ValueError: the layout is wrong: there are no class folders, images beside them or folders inside them; or a
            class folder has no images, or a file that is not an image.
    """

    def __init__(self, root: Path, mode: str) -> None:
        files = {folder.name: entries(folder.path) for folder in _class_folders(root)}
        for name, inside in files.items():
            if nested := [entry.name for entry in inside if entry.is_dir()]:
                raise ValueError(f"{root / name} holds folders ({first_names(nested)}), not only images; {_EXPECTED}")
            for entry in inside:
                check_is_image(entry.path)
        if not any(files.values()):
            raise ValueError(f"Found 0 images in subfolders of {root}; {_EXPECTED}")
        if empty := [name for name, inside in files.items() if not inside]:
            raise ValueError(f"{root} has class folders without images ({first_names(empty)}): fill or remove them")
        names = sorted(files, key=lambda name: (natural_key(name), name))
        self.class_to_idx = {name: label for label, name in enumerate(names)}
        self.samples = sorted(
            ((entry.path, self.class_to_idx[name]) for name, inside in files.items() for entry in inside),
            key=lambda sample: natural_key(sample[0]),
        )
        self.mode = mode
        self.transform = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[object, int]:
        path, label = self.samples[index]
        image = read_image(path, self.mode)
        return (image if self.transform is None else self.transform(image)), label


def _class_folders(root: Path) -> list[os.DirEntry]:
    """The class folders in ``root``; a ValueError if there are images in ``root`` itself."""
    inside = entries(root)
    folders = [entry for entry in inside if entry.is_dir()]
    images = [entry.name for entry in inside if not entry.is_dir() and is_image(entry.name)]
    if images:
        where = "beside its class folders" if folders else "and no class folders"
        raise ValueError(f"{root} holds images {where} ({len(images)}: {first_names(images)}); {_EXPECTED}")
    return folders


def open_dataset(data_dir: str | os.PathLike, split: str, *, dataset: str = "", in_chans: int = 3) -> Dataset:
    """Open a data set of labelled images.

    Args:
        data_dir: the root folder. Without ``dataset``, its layout is ImageNet's: ``<split>/<class>/*.jpg``.
        split: ``"train"`` or ``"validation"`` (whose folder may be called val or test), or another folder's name.
        dataset: a name that ``timm.data.create_dataset`` knows, such as ``torch/cifar10``.
        in_chans: 1 reads images in grey, else in colour.

    Images in folders may have any format that Pillow reads. Other files raise a ValueError here, and broken images when
    they are loaded. Only hidden files and those that systems leave in folders (``Thumbs.db``) are silently skipped.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder holds anything but class folders with images, or timm cannot open the data set.
    """
    root = Path(data_dir)
    if not root.is_dir():
        raise FileNotFoundError(f"no data folder at {root}")
    mode = "L" if in_chans == 1 else "RGB"
    if not dataset:
        return FolderImages(split_folder(root, split, "<class>/<image>, one folder of images for each class"), mode)
    try:
        return create_dataset(dataset, root=str(root), split=split, search_split=True, input_img_mode=mode)
    except (RuntimeError, AssertionError, ValueError, ImportError) as error:
        raise ValueError(f"{root}: {error}; expected data set {dataset!r}") from error


def class_names(dataset: Dataset) -> list[str] | None:
    """The class names of an image folder or torchvision data set, ordered by label; ``None`` if they have no names."""
    for holder in (getattr(dataset, "reader", None), dataset):
        indices = getattr(holder, "class_to_idx", None)
        if indices:
            return sorted(indices, key=indices.get)
    return None


def check_classes(dataset: Dataset, model: PlainModel) -> None:
    """Refuse a data set with a single class or with more classes than the model has; warn if it has fewer.

    Raises:
        ValueError: the numbers of classes do not fit; the message gives them.
    """
    names = class_names(dataset)
    if names is None:
        return
    if len(names) < 2:
        raise ValueError(f"the data has {len(names)} class ({', '.join(names)}), expected at least 2")
    if len(names) > model.num_classes:
        raise ValueError(f"the data has {len(names)} classes, but the model distinguishes {model.num_classes}")
    if len(names) < model.num_classes:
        warnings.warn(
            f"the data has {len(names)} classes, but the model distinguishes {model.num_classes}: labels number the "
            "data's classes in alphabetical order, which may not be the model's",
            stacklevel=2,
        )


def check_same_classes(*datasets: Dataset) -> None:
    """Refuse splits with different classes, because each split numbers its own.

    Raises:
        ValueError: the message names classes that one split has and another lacks.
    """
    splits = [set(names) for dataset in datasets if (names := class_names(dataset)) is not None]
    odd = sorted(set.union(*splits) - set.intersection(*splits)) if splits else []
    if odd:
        cases = len({name.lower() for name in odd}) < len(odd)
        raise ValueError(
            f"the splits of the data have different classes: {first_names(odd)} not in every one of them"
            + ("; upper and lower case must be the same in all of them" if cases else "")
        )


def make_loader(
    dataset: Dataset,
    model: PlainModel,
    *,
    batch_size: int,
    workers: int,
    training: bool = False,
    seed: int = 0,
    **options: object,
) -> DataLoader:
    """A loader with timm's transforms for the model's input size and normalisation.

    Args:
        dataset: from :func:`open_dataset`.
        model: determines size, mean, standard deviation, interpolation and crop.
        batch_size: images per batch.
        workers: loader processes; 0 loads in this one.
        training: shuffle, drop the last incomplete batch, and augment (random crop and flip).
        seed: of the augmentation.
        options: further arguments of ``timm.data.create_loader``, such as ``auto_augment``, ``re_prob``, ``scale``, or
            ``crop_pct`` instead of the model's.

    Raises:
        ValueError: the data set has fewer images than a training batch, or none.
    """
    check_size(dataset, batch_size if training else 1)
    if training and not isinstance(dataset, IterableDataset):
        dataset = SeededImages(dataset, seed)
    return create_loader(
        dataset,
        batch_size=batch_size,
        is_training=training,
        num_workers=workers,
        persistent_workers=workers > 0,
        use_prefetcher=False,
        device=torch.device("cpu"),
        **preparation(unwrapped(model), options),
    )


def preparation(model: PlainModel, given: Mapping[str, object]) -> dict[str, object]:
    """timm's arguments for preprocessing: those ``given``, otherwise the model's."""
    config = resolve_model_data_config(model, {"input_size": input_size(model)})
    mean, std = normalisation(model, given)
    own = {name: config[name] for name in ("input_size", "interpolation", "crop_pct", "crop_mode")}
    return own | given | {"mean": mean, "std": std}


def calibration_loader(
    dataset: Dataset, model: PlainModel, *, batches: int, batch_size: int, workers: int, seed: int, **options: object
) -> DataLoader:
    """``batches`` batches for scoring tokens: random images, fixed by the seed, without augmentation.

    ``options`` are those of :func:`make_loader`.
    """
    loader = make_loader(dataset, model, batch_size=batch_size, workers=workers, **options)
    if isinstance(dataset, IterableDataset):
        return loader
    return random_batches(dataset, batches=batches, batch_size=batch_size, workers=workers, seed=seed)
