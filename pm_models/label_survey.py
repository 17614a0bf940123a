"""What the label maps to train on hold, looked at before the training: classes without a pixel, masks saved as 255."""

import random
import warnings

import numpy as np
from tqdm import tqdm

from .images import read_label_map
from .segmentation import SegmentationImages
from .training import IGNORED

_MOST = 2000  # label maps to look at: some ten seconds
_NAMED = 10


def warn_of_labels(dataset: SegmentationImages) -> None:
    """Warn of classes that never occur, and of label maps of only 0 and 255 where there are two classes.

    At most 2000 label maps are read, at random, and no more once every class was found, unless there are two of them.

    Raises:
        ValueError: a label map that was read is broken, or has an unknown class.
    """
    chosen = random.Random(0).sample([label for _, label in dataset.pairs], min(len(dataset), _MOST))
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
        names = ", ".join(map(str, sorted(missing)[:_NAMED])) + (", ..." if len(missing) > _NAMED else "")
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
