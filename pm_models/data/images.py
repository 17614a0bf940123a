"""Image files: which ones a folder holds, and the pixels that every command sees of them."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "evaluation", "test"),
}

# Pillow tells what these are, but does not decode them by itself.
_UNREADABLE_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir"}
_TIFF_BITS, _TIFF_INTERPRETATION, _WHITE_IS_ZERO = 258, 262, 0


@cache
def image_suffixes() -> frozenset[str]:
    """The endings of all image files that Pillow reads, in lower case: ``.jpg``, ``.webp``, ``.tif``, ..."""
    endings = Image.registered_extensions()  # loads Pillow's plugins, which fill Image.OPEN
    readable = (set(Image.OPEN) | {"MPO"}) - _UNREADABLE_FORMATS  # the JPEG plugin opens MPO
    return frozenset(ending for ending, kind in endings.items() if kind in readable)


def is_image(name: str) -> bool:
    """Whether a file's ending is that of an image."""
    return os.path.splitext(name)[1].lower() in image_suffixes()


def check_is_image(path: str) -> None:
    """Raise a ValueError that names the file where its ending is not that of an image."""
    if not is_image(path):
        raise ValueError(f"{path} is not a readable image; remove it, or save it as .png or .jpg")


def entries(folder: str | os.PathLike[str]) -> list[os.DirEntry]:
    """Files and folders in a folder, by name, without hidden ones and what systems leave there (Thumbs.db)."""
    with os.scandir(folder) as inside:
        kept = [entry for entry in inside if not entry.name.startswith(".") and entry.name.lower() not in _SYSTEM_FILES]
    return sorted(kept, key=lambda entry: entry.name)


def files_below(folder: str | os.PathLike) -> Iterator[str]:
    """The paths of all files in a folder and its subfolders, without those that :func:`entries` leaves out."""
    for entry in entries(folder):
        if entry.is_dir():
            yield from files_below(entry.path)
        else:
            yield entry.path


def split_folder(root: Path, split: str, content: str) -> Path:
    """The folder of a split in ``root``, by any of its names; ``content`` says in the error what is expected in it.

    Raises:
        FileNotFoundError: there is none; it says which folders there are.
    """
    names = SPLIT_NAMES.get(split, (split,))
    for name in names:
        if (root / name).is_dir():
            return root / name
    others = [entry.name for entry in entries(root)] if root.is_dir() else []
    only = f", only {first_names(others)}" if others else ""
    raise FileNotFoundError(f"{root} has no folder {' or '.join(names)}{only}; expected {root / names[0]}/{content}")


def first_names(names: Sequence[str], most: int = 5) -> str:
    """The first names of several, for messages."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def read_image(path: str | os.PathLike, mode: str = "RGB") -> Image.Image:
    """The image of a file as it is shown: turned as its EXIF tag says, with 8 bits per channel.

    The first frame is read where there are several. Grey values of 16 bits are divided by 257. No file says which value
    of 32 bits is white: floats from 0 to 1 are taken as that range, and whole numbers as 8 bits, or as 16 bits where
    they do not fit 8.

    Args:
        path: of the file.
        mode: ``"RGB"`` or ``"L"``, colour or grey.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it cannot be read as an image, or its grey values fit none of these ranges.
    """
    with _shown(path) as image:
        image.info.pop("transparency", None)  # it is dropped either way, but of a palette's Pillow warns
        if image.mode.startswith("I") or image.mode == "F":
            image = _in_8_bits(image)
        return image.convert(mode)


def read_label_map(path: str | os.PathLike) -> np.ndarray:
    """The values (height, width) of a label map as they are stored, turned as its EXIF tag says.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it cannot be read as an image, or has not one channel of whole numbers.
    """
    with _shown(path) as image:
        values = np.array(image)
    if values.ndim != 2:
        raise ValueError(f"{path} has {values.shape[-1]} channels, expected one with the index of each class")
    if values.dtype.kind == "f":
        raise ValueError(f"{path} holds floats, expected whole numbers, the index of each class")
    return values


def is_turned(path: str | os.PathLike) -> bool:
    """Whether an image is shown with width and height exchanged, as its EXIF tag says."""
    with Image.open(path) as image:
        return image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)


@contextmanager
def _shown(path: str | os.PathLike) -> Iterator[Image.Image]:
    """The decoded image of a file, turned; an error meanwhile is a ValueError with the file's name."""
    # Pillow maps a file that it opens by its name into memory, and then takes the rows of a turned TIFF for columns.
    with open(path, "rb") as file:
        try:
            with Image.open(file) as image:
                image.load()
                with suppress(Exception):  # a broken tag says nothing, and the pixels are there
                    ImageOps.exif_transpose(image, in_place=True)
                yield image
        except Exception as error:  # PIL raises a dozen kinds for a broken file
            unknown = isinstance(error, UnidentifiedImageError)
            reason = "Pillow does not know its kind" if unknown else " ".join(str(error).split())
            raise ValueError(
                f"{os.fspath(path)} is not a readable image ({reason or type(error).__name__}); mend or remove it"
            ) from error


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Grey values of 16 or 32 bits as 8 bits."""
    values = np.asarray(image).astype(np.float32)
    white = _white(image, values)
    if getattr(image, "tag_v2", {}).get(_TIFF_INTERPRETATION) == _WHITE_IS_ZERO and image.mode != "F":
        values = white - values  # which Pillow does for 8 bits, but not for more
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8))


def _white(image: Image.Image, values: np.ndarray) -> int:
    """The grey value of white: what the file says, or the least one that its 32-bit values fit."""
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(_TIFF_BITS, (16,))  # a TIFF may have 12
        return 2 ** bits[0] - 1
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return 65535  # of 16 bits, which Pillow reads into 32
    low, high = float(values.min()), float(values.max())
    whole = bool((values == values.round()).all())
    for white in (1, 255, 65535) if image.mode == "F" else (255, 65535):
        if low >= 0 and high <= white and (whole or white == 1):
            return white
    raise ValueError(
        f"its grey values of 32 bits are from {low:g} to {high:g}, expected whole numbers up to 255 or 65535, or "
        "floats up to 1"
    )
