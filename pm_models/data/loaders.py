"""Parts that the loaders of classification and segmentation share."""

import random
from collections.abc import Collection, Iterable, Mapping

import numpy as np
import torch
from timm.data import resolve_model_data_config
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ..models import Model, encoder_of


class SeededImages(Dataset):
    """A data set whose augmentation of an image depends only on the seed, the epoch and the image.

    It is therefore the same in a continued run, for any number of workers and in any process.

    Args:
        dataset: the images, with a random ``transform``.
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
        words = np.random.SeedSequence([self._seed, int(self._epoch), index]).generate_state(2)
        on_cpu = torch.default_generator  # torch.manual_seed would query all devices, for every image
        states = on_cpu.get_state(), random.getstate(), np.random.get_state()
        try:
            on_cpu.manual_seed(int(words[0]))
            random.seed(int(words[1]))
            np.random.seed(words[1])
            return self.dataset[index]
        finally:
            on_cpu.set_state(states[0])
            random.setstate(states[1])
            np.random.set_state(states[2])


def tell_epoch(loader: Iterable, epoch: int) -> None:
    """Pass the epoch to every data set and sampler of a loader that has ``set_epoch``, however they are nested.

    Which of them a prepared loader informs itself depends on the version of accelerate.
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


def check_size(dataset: Dataset, batch_size: int) -> None:
    """Raise a ValueError if a data set has fewer images than a batch."""
    if len(dataset) < batch_size:
        raise ValueError(
            f"the data has {len(dataset)} images, expected at least {batch_size} (--batch-size {batch_size})"
        )


def random_batches(dataset: Dataset, *, batches: int, batch_size: int, workers: int, seed: int) -> DataLoader:
    """``batches`` batches of random images, or fewer if the images run out; fixed by the seed."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return DataLoader(Subset(dataset, order[: batches * batch_size].tolist()), batch_size, num_workers=workers)


def normalisation(model: Model, given: Mapping[str, object]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """``mean`` and ``std`` from ``given`` or else from the model, with a value for each of its channels.

    Values for a different number of channels are averaged.
    """
    encoder = encoder_of(model)
    config = resolve_model_data_config(encoder) | given
    return _for_channels(config["mean"], encoder.in_chans), _for_channels(config["std"], encoder.in_chans)


def _for_channels(values: Iterable[float], channels: int) -> tuple[float, ...]:
    values = tuple(values)
    return values if len(values) == channels else (sum(values) / len(values),) * channels


def images_and_targets(batch: object) -> tuple[Tensor, Tensor]:
    """Images and targets of a loader's batch.

    Raises:
        TypeError: it is not a pair of tensors.
    """
    if not isinstance(batch, (tuple, list)) or [isinstance(part, Tensor) for part in batch] != [True, True]:
        kind = type(batch).__name__
        if isinstance(batch, Mapping):
            kind += f" with the keys {', '.join(map(repr, batch))}"
        elif isinstance(batch, (tuple, list)):
            kind += f" of {', '.join(type(part).__name__ for part in batch) or 'nothing'}"
        raise TypeError(f"loader must yield batches (images, targets), a pair of tensors, got a {kind}")
    return batch[0], batch[1]
