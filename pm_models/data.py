"""Images from folders or from any data set that timm reads, as loaders in a model's own preprocessing."""

import os
import random
import warnings
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy
import torch
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.utils.misc import natural_key
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from .images import check_is_image, entries, is_image, read_image
from .models import input_size
from .unwrapping import unwrapped
from .vision_transformer import PlainModel

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "evaluation", "test"),
}


_EXPECTED = "expected <class>/<image> in it, one folder of images for each class"


class FolderImages(Dataset):
    """Images in folders of classes, one folder for each; labels count the classes in natural order, as timm's do.

    Args:
        root: the folder of the class folders.
        mode: of the images, ``"RGB"`` or ``"L"``.

    Raises:
        ValueError: the classes cannot be told: there are no class folders, or images beside them, or folders in one; or
            a class folder holds no image, or a file that is none.
    """

    def __init__(self, root: Path, mode: str) -> None:
        files = {folder.name: entries(folder.path) for folder in _class_folders(root)}
        for name, inside in files.items():
            if nested := [entry.name for entry in inside if entry.is_dir()]:
                raise ValueError(f"{root / name} holds folders ({_some(nested)}), not images alone; {_EXPECTED}")
            for entry in inside:
                check_is_image(entry.path)
        if not any(files.values()):
            raise ValueError(f"Found 0 images in subfolders of {root}; {_EXPECTED}")
        if empty := [name for name, inside in files.items() if not inside]:
            raise ValueError(f"{root} has class folders without images ({_some(empty)}): fill or remove them")
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
    """The folders in a folder that holds no images itself."""
    found = entries(root)
    folders = [entry for entry in found if entry.is_dir()]
    images = [entry.name for entry in found if not entry.is_dir() and is_image(entry.name)]
    if images:
        where = "beside its class folders" if folders else "and no class folders"
        raise ValueError(f"{root} holds images {where} ({len(images)}: {_some(images)}); {_EXPECTED}")
    return folders


def _some(names: Sequence[str]) -> str:
    """The first five names."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def open_dataset(data_dir: str | os.PathLike, split: str, *, dataset: str = "", in_chans: int = 3) -> Dataset:
    """A timm data set of labelled images.

    Args:
        data_dir: the root folder. Without ``dataset`` it is laid out like ImageNet: ``<split>/<class>/*.jpg``.
        split: ``"train"`` or ``"validation"`` (whose folder may be called val or test), or another folder's name.
        dataset: a name that ``timm.data.create_dataset`` knows, such as ``torch/cifar10``.
        in_chans: 1 reads images in grey, else in colour.

    Images in folders are of every kind that Pillow reads. One that cannot be read is a ValueError when it is met, and
    another file a ValueError here: none is left out in silence, but for hidden files and what systems leave in folders
    (``Thumbs.db``).

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder does not hold images in class folders alone; or timm cannot open the data set.
    """
    root = Path(data_dir)
    if not root.is_dir():
        raise FileNotFoundError(f"no data folder at {root}")
    mode = "L" if in_chans == 1 else "RGB"
    if not dataset:
        return FolderImages(_split_folder(root, split), mode)
    try:
        return create_dataset(dataset, root=str(root), split=split, search_split=True, input_img_mode=mode)
    except (RuntimeError, AssertionError, ValueError, ImportError) as error:
        raise ValueError(f"{root}: {error}; expected data set {dataset!r}") from error


def _split_folder(root: Path, split: str) -> Path:
    """The folder of a split, by any of its names."""
    names = SPLIT_NAMES.get(split, (split,))
    for name in names:
        if (root / name).is_dir():
            return root / name
    others = [entry.name for entry in entries(root)]
    raise FileNotFoundError(
        f"{root} has no folder {' or '.join(names)}{f', only {_some(others)}' if others else ''}; expected "
        f"{root / names[0]}/<class>/<image>, one folder of images for each class"
    )


def class_names(dataset: Dataset) -> list[str] | None:
    """The classes of an image folder or torchvision set in the order of their labels; ``None`` where not told."""
    for holder in (getattr(dataset, "reader", None), dataset):
        indices = getattr(holder, "class_to_idx", None)
        if indices:
            return sorted(indices, key=indices.get)
    return None


def check_classes(dataset: Dataset, model: PlainModel) -> None:
    """Refuse a data set with one class, or with more than the model tells apart; warn of fewer.

    Raises:
        ValueError: naming the counts.
    """
    names = class_names(dataset)
    if names is None:
        return
    if len(names) < 2:
        raise ValueError(f"the data has {len(names)} class ({', '.join(names)}), expected at least 2")
    if len(names) > model.num_classes:
        raise ValueError(f"the data has {len(names)} classes, but the model tells {model.num_classes} apart")
    if len(names) < model.num_classes:
        warnings.warn(
            f"the data has {len(names)} classes, but the model tells {model.num_classes} apart: labels count the "
            "data's classes in alphabetical order, which may not be the model's",
            stacklevel=2,
        )


def check_same_classes(*datasets: Dataset) -> None:
    """Refuse splits with different classes, as a label counts the classes of its own split.

    Raises:
        ValueError: naming classes that one has and another lacks.
    """
    found = [set(names) for dataset in datasets if (names := class_names(dataset)) is not None]
    everywhere = set.intersection(*found) if found else set()
    somewhere = sorted(set.union(*found) - everywhere) if found else []
    if somewhere:
        cases = len({name.lower() for name in somewhere}) < len(somewhere)
        raise ValueError(
            f"the splits of the data have different classes: {_some(somewhere)} not in every one of them"
            + ("; upper and lower case must be the same in all of them" if cases else "")
        )


class SeededImages(Dataset):
    """A data set whose augmentation of an image depends on the seed, the epoch and the image alone.

    So it is the same in a run that was stopped and continued, with any number of workers, and on any process.

    Args:
        dataset: what it holds, with a random ``transform``.
        seed: of the augmentations.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self._seed = seed
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()  # workers outlive an epoch

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    @property
    def transform(self) -> object:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: object) -> None:
        self.dataset.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple:
        words = numpy.random.SeedSequence([self._seed, int(self._epoch), index]).generate_state(2)
        on_cpu = torch.default_generator  # torch.manual_seed would look for every device, for each image
        states = on_cpu.get_state(), random.getstate(), numpy.random.get_state()
        try:
            on_cpu.manual_seed(int(words[0]))
            random.seed(int(words[1]))
            numpy.random.seed(words[1])
            return self.dataset[index]
        finally:
            on_cpu.set_state(states[0])
            random.setstate(states[1])
            numpy.random.set_state(states[2])


def tell_epoch(loader: Iterable, epoch: int) -> None:
    """Tell the number of the epoch to whatever a loader reads from that has a ``set_epoch``: data sets and samplers.

    However they are nested: which of them a prepared loader tells itself depends on the version of accelerate.
    """
    waiting, seen = [loader], set()
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)
        waiting += [getattr(part, name, None) for name in ("batch_sampler", "sampler", "dataset")]
        several = getattr(part, "datasets", None)  # torch's ConcatDataset, ChainDataset and StackDataset
        if isinstance(several, dict):
            several = several.values()
        waiting += several if isinstance(several, Collection) else ()


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
    """A loader in the model's input size and normalisation, with timm's transforms.

    Args:
        dataset: from :func:`open_dataset`.
        model: its size, mean, standard deviation, interpolation and crop are used.
        batch_size: images per batch.
        workers: loader processes; 0 loads in this one.
        training: shuffle, drop the last incomplete batch, and augment (random crop and flip).
        seed: of the augmentation.
        options: more of ``timm.data.create_loader``'s arguments, such as ``auto_augment``, ``re_prob``, ``scale``, or
            ``crop_pct`` in the place of the model's.

    Raises:
        ValueError: the data set has fewer images than a training batch, or none.
    """
    check_size(dataset, batch_size if training else 1)
    model = unwrapped(model)
    config = resolve_model_data_config(model, {"input_size": input_size(model)})
    seeded = training and not isinstance(dataset, IterableDataset)
    arguments = {
        "input_size": config["input_size"],
        "interpolation": config["interpolation"],
        "mean": _for_channels(config["mean"], model.in_chans),
        "std": _for_channels(config["std"], model.in_chans),
        "crop_pct": config["crop_pct"],
        "crop_mode": config["crop_mode"],
        **options,
    }
    return create_loader(
        SeededImages(dataset, seed) if seeded else dataset,
        batch_size=batch_size,
        is_training=training,
        num_workers=workers,
        persistent_workers=workers > 0,
        use_prefetcher=False,
        device=torch.device("cpu"),
        **arguments,
    )


def check_size(dataset: Dataset, batch_size: int) -> None:
    """Refuse a data set of fewer images than a batch.

    Raises:
        ValueError: naming the counts.
    """
    if len(dataset) < batch_size:
        raise ValueError(
            f"the data has {len(dataset)} images, expected at least {batch_size} (--batch-size {batch_size})"
        )


def _for_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Normalisation of as many channels as the images have; the average where the model was made for others."""
    return values if len(values) == channels else (sum(values) / len(values),) * channels


def calibration_loader(
    dataset: Dataset,
    model: PlainModel,
    *,
    batches: int,
    batch_size: int,
    workers: int,
    seed: int,
    **options: object,
) -> DataLoader:
    """``batches`` batches for scoring tokens: images at random, the same for the same seed, without augmentation.

    ``options`` are those of :func:`make_loader`.
    """
    loader = make_loader(dataset, model, batch_size=batch_size, workers=workers, **options)
    if isinstance(dataset, IterableDataset):
        return loader
    return DataLoader(random_subset(dataset, batches * batch_size, seed), batch_size=batch_size, num_workers=workers)


def random_subset(dataset: Dataset, count: int, seed: int) -> Subset:
    """``count`` items at random, or all in random order where there are fewer; the same for the same seed."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return Subset(dataset, order[:count].tolist())


def sample_images(dataset: Dataset, model: PlainModel, count: int, **options: object) -> numpy.ndarray:
    """Some images (count, H, W, 3), grey ones (count, H, W), as the model sees them, from 0 to 1.

    They are from all over the data set, or its first where it can only be read in order.

    ``options`` are those of :func:`make_loader`.
    """
    loader = make_loader(dataset, model, batch_size=count, workers=0, **options)
    if isinstance(dataset, IterableDataset):
        images = next(iter(loader))[0]
    else:
        count = min(count, len(dataset))
        images = torch.stack([dataset[index * len(dataset) // count][0] for index in range(count)])
    config = resolve_model_data_config(model) | options
    mean, std = (
        torch.tensor(_for_channels(tuple(config[name]), model.in_chans))[:, None, None] for name in ("mean", "std")
    )
    images = (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1)
    return images.squeeze(-1).numpy()
