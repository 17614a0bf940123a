"""Image files: find them in folders, and read their pixels in the same way for every command."""

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

# Pillow recognises these, but cannot decode them on its own.
_UNREADABLE_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir"}
_TIFF_BITS, _TIFF_INTERPRETATION, _WHITE_IS_ZERO = 258, 262, 0


@cache
def image_suffixes() -> frozenset[str]:
    """The lower-case suffixes of all image files that Pillow reads: ``.jpg``, ``.webp``, ``.tif``, ..."""
    endings = Image.registered_extensions()  # loads Pillow's plugins, which fill Image.OPEN
    readable = (set(Image.OPEN) | {"MPO"}) - _UNREADABLE_FORMATS  # the JPEG plugin opens MPO
    return frozenset(ending for ending, kind in endings.items() if kind in readable)


def is_image(name: str) -> bool:
    """Whether a file has the suffix of an image."""
    return os.path.splitext(name)[1].lower() in image_suffixes()


def check_is_image(path: str) -> None:
    """Raise a ValueError that names the file unless it has the suffix of an image."""
    if not is_image(path):
        raise ValueError(f"{path} is not a readable image; remove it, or save it as .png or .jpg")


def entries(folder: str | os.PathLike[str]) -> list[os.DirEntry]:
    """Files and folders in a folder, sorted by name, without hidden ones and system files (Thumbs.db)."""
    with os.scandir(folder) as inside:
        kept = [entry for entry in inside if not entry.name.startswith(".") and entry.name.lower() not in _SYSTEM_FILES]
    return sorted(kept, key=lambda entry: entry.name)


def files_below(folder: str | os.PathLike) -> Iterator[str]:
    """The paths of all files in a folder and its subfolders that :func:`entries` lists."""
    for entry in entries(folder):
        if entry.is_dir():
            yield from files_below(entry.path)
        else:
            yield entry.path


def split_folder(root: Path, split: str, content: str) -> Path:
    """The folder of a split in ``root``, by any of its names; ``content`` describes in errors what it should hold.

    Raises:
        FileNotFoundError: there is none; the message lists the folders that there are.
    """
    names = SPLIT_NAMES.get(split, (split,))
    for name in names:
        if (root / name).is_dir():
            return root / name
    others = [entry.name for entry in entries(root)] if root.is_dir() else []
    only = f", only {first_names(others)}" if others else ""
    raise FileNotFoundError(f"{root} has no folder {' or '.join(names)}{only}; expected {root / names[0]}/{content}")


def first_names(names: Sequence[str], most: int = 5) -> str:
    """The first few names, for messages."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def read_image(path: str | os.PathLike, mode: str = "RGB") -> Image.Image:
    """Read an image as viewers display it: rotated by its EXIF tag, with 8 bits per channel.

    Of several frames the first is read. 16-bit grey values are divided by 257. Files with 32-bit values do not say
    which value is white: floats from 0 to 1 are taken as that range, whole numbers as 8 bits or, if they do not fit,
    as 16 bits.

    Args:
        path: the file.
        mode: ``"RGB"`` or ``"L"``, colour or grey.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it cannot be read as an image, or its grey values fit none of these ranges.
    """
    with _shown(path) as image:
        image.info.pop("transparency", None)  # dropped anyway, but Pillow would warn about a palette's
        if image.mode.startswith("I") or image.mode == "F":
            image = _in_8_bits(image)
        return image.convert(mode)


def read_label_map(path: str | os.PathLike) -> np.ndarray:
    """The stored values (height, width) of a label map, rotated by its EXIF tag.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it cannot be read as an image, or is not a single channel of whole numbers.
    """
    with _shown(path) as image:
        values = np.array(image)
    if values.ndim != 2:
        raise ValueError(f"{path} has {values.shape[-1]} channels, expected one with the index of each class")
    if values.dtype.kind == "f":
        raise ValueError(f"{path} holds floats, expected whole numbers, the index of each class")
    return values


def is_turned(path: str | os.PathLike) -> bool:
    """Whether the EXIF tag of an image exchanges its width and height."""
    with Image.open(path) as image:
        return image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)


@contextmanager
def _shown(path: str | os.PathLike) -> Iterator[Image.Image]:
    """The decoded and rotated image of a file; errors within the block become ValueErrors that name the file."""
    # Given a path, Pillow memory-maps the file, and then mistakes the rows of a rotated TIFF for columns.
    with open(path, "rb") as file:
        try:
            with Image.open(file) as image:
                image.load()
                with suppress(Exception):  # a broken tag is ignored: the pixels are fine
                    ImageOps.exif_transpose(image, in_place=True)
                yield image
        except Exception as error:  # PIL raises a dozen kinds for a broken file
            unknown = isinstance(error, UnidentifiedImageError)
            reason = "Pillow does not know its kind" if unknown else " ".join(str(error).split())
            raise ValueError(
                f"{os.fspath(path)} is not a readable image ({reason or type(error).__name__}); mend or remove it"
            ) from error


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Convert grey values of 16 or 32 bits to 8 bits."""
    values = np.asarray(image).astype(np.float32)
    white = _white(image, values)
    if getattr(image, "tag_v2", {}).get(_TIFF_INTERPRETATION) == _WHITE_IS_ZERO and image.mode != "F":
        values = white - values  # Pillow does this only for 8 bits
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8))


def _white(image: Image.Image, values: np.ndarray) -> int:
    """The grey value of white: as the file says, or for 32-bit values the smallest range that they fit."""
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
