"""Every kind of image file, read the same by all commands; other files and other layouts of folders are refused."""

import re

import numpy as np
import pytest
import torch
from helpers import plan_for, small_vit
from PIL import Image, features

from pm_models import compress
from pm_models.cli import main
from pm_models.data import class_names, open_dataset
from pm_models.segmentation import SegmentationImages

HEIGHT, WIDTH = 6, 9
GREY = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) * 4
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=-1)


def save(image, *paths, **options):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **options)


def save_labels(root, name="0.png", labels=None, folder="labels", **options):
    labels = np.zeros((HEIGHT, WIDTH), np.uint8) if labels is None else labels
    save(Image.fromarray(labels), root / folder / "train" / name, **options)


def seen(root, name, write):
    """An image as classification in colour and in grey, and segmentation read it."""
    for path in (root / "train" / "cat" / name, root / "images" / "train" / name):
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    if not (root / "labels").exists():
        save_labels(root)
    colour, grey = (np.asarray(open_dataset(root, "train", in_chans=channels)[0][0]) for channels in (3, 1))
    segmented = SegmentationImages(root, "train", num_classes=2)[0][0]
    assert np.array_equal(segmented.permute(1, 2, 0).numpy(), colour)
    return colour, grey


ENDINGS = {
    "png": {}, "PNG": {}, "apng": {}, "jpg": {}, "JPEG": {}, "jfif": {}, "jpe": {}, "webp": {"lossless": True},
    "WebP": {"lossless": True}, "bmp": {}, "BMP": {}, "gif": {}, "tif": {}, "TIFF": {"compression": "tiff_lzw"},
    "jp2": {}, "j2k": {}, "avif": {"quality": 100}, "tga": {}, "ppm": {}, "pgm": {},
    "ico": {"sizes": [(WIDTH, HEIGHT)]},
}  # fmt: skip
NEEDED = {"avif": "avif", "jp2": "jpg_2000", "j2k": "jpg_2000", "webp": "webp", "WebP": "webp"}


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_kind_of_file_is_read(tmp_path, ending):
    if ending in NEEDED and not features.check(NEEDED[ending]):
        pytest.skip(f"Pillow is built without {NEEDED[ending]}")
    save(Image.fromarray(COLOUR), tmp_path / "train" / "dog" / "1.png")
    colour, grey = seen(tmp_path, f"0.{ending}", lambda path: Image.fromarray(GREY).save(path, **ENDINGS[ending]))
    lossy = 16 if ending.lower() in ("jpg", "jpeg", "jfif", "jpe", "avif") else 0
    assert np.abs(grey.astype(int) - GREY).max() <= lossy
    assert np.abs(colour.astype(int) - GREY[..., None]).max() <= lossy
    dataset = open_dataset(tmp_path, "train")
    assert class_names(dataset) == ["cat", "dog"]
    assert [label for _, label in dataset] == [0, 1]


@pytest.mark.parametrize("name", ["notes.txt", "clip.mpg", "page.pdf", "figure.eps", "photo.heic", "labels.csv", "0"])
def test_what_is_no_image_is_named(tmp_path, name):
    save(Image.fromarray(COLOUR), tmp_path / "train" / "cat" / "0.png", tmp_path / "images" / "train" / "0.png")
    save_labels(tmp_path)
    for folder in (tmp_path / "train" / "cat", tmp_path / "images" / "train"):
        (folder / name).write_text("no image")
    with pytest.raises(ValueError, match=rf"cat/{re.escape(name)} is not a readable image"):
        open_dataset(tmp_path, "train")
    with pytest.raises(ValueError, match=rf"images/train/{re.escape(name)} is not a readable image"):
        SegmentationImages(tmp_path, "train", num_classes=2)


def test_what_systems_leave_in_folders_is_passed_by(tmp_path):
    save(Image.fromarray(COLOUR), tmp_path / "train" / "cat" / "0.png", tmp_path / "images" / "train" / "0.png")
    save_labels(tmp_path)
    for folder in (tmp_path / "train", tmp_path / "train" / "cat", tmp_path / "images" / "train"):
        for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._0.png"):
            (folder / name).write_text("no image")
        for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
            (folder / name).mkdir()
            (folder / name / "0.txt").write_text("no image")
    dataset = open_dataset(tmp_path, "train")
    assert (class_names(dataset), len(dataset)) == (["cat"], 1)
    assert len(SegmentationImages(tmp_path, "train", num_classes=2)) == 1


WIDE = np.linspace(0, 65535, HEIGHT * WIDTH).round().astype(np.uint16).reshape(HEIGHT, WIDTH)


def tiff(values, order="<", bits=16, interpretation=1):
    """An uncompressed grey TIFF, whose strip is ``values``."""
    data = values if isinstance(values, bytes) else values.astype(f"{order}u2").tobytes()
    tags = {
        256: WIDTH,
        257: HEIGHT,
        258: bits,
        259: 1,
        262: interpretation,
        273: 0,
        277: 1,
        278: HEIGHT,
        279: len(data),
    }
    tags[273] = 8 + 2 + 12 * len(tags) + 4

    def number(value, size):
        return value.to_bytes(size, "little" if order == "<" else "big")

    head = (b"II" if order == "<" else b"MM") + number(42, 2) + number(8, 4) + number(len(tags), 2)
    entries = b"".join(number(tag, 2) + number(4, 2) + number(1, 4) + number(tags[tag], 4) for tag in sorted(tags))
    return head + entries + bytes(4) + data


def twelve_bits(values):
    digits = "".join(f"{value:03x}" for value in values.flat)
    assert WIDTH * HEIGHT % 2 == 0
    rows = [digits[3 * WIDTH * row : 3 * WIDTH * (row + 1)] for row in range(HEIGHT)]
    return b"".join(bytes.fromhex(row + "0" * (len(row) % 2)) for row in rows)


GREYS = {
    "16 bits, PNG": ("0.png", lambda path: Image.fromarray(WIDE).save(path)),
    "16 bits, TIFF": ("0.tif", lambda path: Image.fromarray(WIDE).save(path)),
    "16 bits, packed TIFF": ("0.tif", lambda path: Image.fromarray(WIDE).save(path, compression="tiff_lzw")),
    "16 bits, little-endian TIFF": ("0.tif", lambda path: path.write_bytes(tiff(WIDE))),
    "16 bits, big-endian TIFF": ("0.tif", lambda path: path.write_bytes(tiff(WIDE, ">"))),
    "16 bits, TIFF, 0 is white": ("0.tif", lambda path: path.write_bytes(tiff(65535 - WIDE, interpretation=0))),
    "12 bits, TIFF": ("0.tif", lambda path: path.write_bytes(tiff(twelve_bits(WIDE // 16), bits=12))),
    "16 bits, PGM": ("0.pgm", lambda path: Image.fromarray(WIDE).save(path)),
    "16 bits of 32, TIFF": ("0.tif", lambda path: Image.fromarray(WIDE.astype(np.int32)).save(path)),
    "8 bits of 32, TIFF": ("0.tif", lambda path: Image.fromarray((WIDE // 257).astype(np.int32)).save(path)),
    "floats up to 1, TIFF": ("0.tif", lambda path: Image.fromarray((WIDE / 65535).astype(np.float32)).save(path)),
    "floats up to 255, TIFF": ("0.tif", lambda path: Image.fromarray((WIDE // 257).astype(np.float32)).save(path)),
}


@pytest.mark.parametrize("kind", GREYS)
def test_grey_values_of_more_than_8_bits(tmp_path, kind):
    name, write = GREYS[kind]
    colour, grey = seen(tmp_path, name, write)
    expected = WIDE / 257
    tolerance = 1 if "8 bits" in kind or "255" in kind or "12" in kind else 0.5
    assert np.abs(grey - expected).max() <= tolerance
    assert (grey[0, 0], grey[-1, -1]) == (0, 255)
    assert (colour == grey[..., None]).all()


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_a_dark_image_of_16_bits_stays_dark(tmp_path, ending):
    """White is what the file can hold, not what this image has."""
    values = np.full((HEIGHT, WIDTH), 120, np.uint16)
    values[0] = 250
    _, grey = seen(tmp_path, f"0.{ending}", lambda path: Image.fromarray(values).save(path))
    assert grey.max() == 1
    assert grey[1:].max() == 0


@pytest.mark.parametrize("low_high", [(-3, 200), (0, 65536), (0, float("nan")), (0, 1.5), (-0.1, 1)])
def test_grey_values_of_no_known_white_are_refused(tmp_path, low_high):
    values = np.zeros((HEIGHT, WIDTH), np.int32 if all(isinstance(value, int) for value in low_high) else np.float32)
    values[0, :2] = low_high
    save(Image.fromarray(values), tmp_path / "train" / "cat" / "0.tif")
    with pytest.raises(ValueError, match=r"0\.tif is not a readable image \(its grey values of 32 bits are from"):
        open_dataset(tmp_path, "train")[0]


def palette_with_transparency():
    image = Image.fromarray(COLOUR).quantize(16)
    image.info["transparency"] = bytes(range(0, 160, 10))
    return image


MODES = {
    "RGBA": ("0.png", lambda: Image.fromarray(COLOUR).convert("RGBA"), {}),
    "LA": ("0.png", lambda: Image.fromarray(GREY).convert("LA"), {}),
    "P": ("0.png", lambda: Image.fromarray(COLOUR).quantize(16), {}),
    "P and transparency": ("0.png", palette_with_transparency, {}),
    "1": ("0.tif", lambda: Image.fromarray(GREY > 100), {}),
    "CMYK": ("0.tif", lambda: Image.fromarray(COLOUR).convert("CMYK"), {}),
    "frames": ("0.gif", lambda: Image.fromarray(GREY), {
        "save_all": True, "append_images": [Image.fromarray(255 - GREY)],
    }),
    "webp frames": ("0.webp", lambda: Image.fromarray(COLOUR), {
        "save_all": True, "append_images": [Image.fromarray(255 - COLOUR)], "lossless": True,
    }),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_other_modes_are_what_pillow_converts_them_to(tmp_path, mode):
    """The first of several frames; transparency is dropped, without a warning."""
    name, make, options = MODES[mode]
    colour, grey = seen(tmp_path, name, lambda path: make().save(path, **options))
    image = make()
    image.info.pop("transparency", None)
    assert np.array_equal(colour, image.convert("RGB"))
    if mode not in ("frames", "webp frames"):
        assert np.array_equal(grey, image.convert("L"))


def turned(pixels, orientation):
    """Pixels as an orientation tag says that they are shown."""
    if orientation > 4:
        pixels = pixels.swapaxes(0, 1)
    rows, columns = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}.get(orientation, (1, 1))
    return pixels[::rows, ::columns]


def tag(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("name", "pixels", "options"),
    [
        ("0.png", COLOUR, {}),
        ("0.png", WIDE, {}),
        ("0.webp", COLOUR, {"lossless": True}),
        ("0.tif", COLOUR, {}),
        ("0.tif", GREY, {}),
        ("0.tif", WIDE, {}),
        ("0.tif", WIDE, {"compression": "tiff_lzw"}),
    ],
    ids=["png", "png16", "webp", "tif", "tif-grey", "tif16", "tif16-lzw"],
)
def test_images_are_turned_as_their_tag_says(tmp_path, name, pixels, options, orientation):
    expected = turned(pixels, orientation)
    labels = (expected if expected.ndim == 2 else expected[..., 0]) % 2
    save_labels(tmp_path, labels=labels.astype(np.uint8))
    colour, _ = seen(tmp_path, name, lambda path: Image.fromarray(pixels).save(path, exif=tag(orientation), **options))
    if pixels is WIDE:
        expected = (expected / 257).round()
    assert np.array_equal(colour, np.broadcast_to(expected.reshape(*expected.shape[:2], -1), colour.shape))


@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}], ids=["raw", "lzw"])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_a_label_map_is_turned_by_its_own_tag(tmp_path, ending, options):
    options = options if ending == "tif" else {}
    labels = (GREY > 90).astype(np.uint8)
    save(Image.fromarray(COLOUR), tmp_path / "images" / "train" / "0.jpg", exif=tag(6))
    save_labels(tmp_path, f"0.{ending}", labels, exif=tag(6), **options)
    image, found = SegmentationImages(tmp_path, "train", num_classes=2)[0]
    assert image.shape == (3, WIDTH, HEIGHT)
    assert np.array_equal(found, turned(labels, 6))


def test_a_label_map_of_the_image_before_it_is_turned_is_refused(tmp_path):
    save(Image.fromarray(COLOUR), tmp_path / "images" / "train" / "0.jpg", exif=tag(8))
    save_labels(tmp_path)
    message = (
        "0.png is 9 x 6, but its image is 6 x 9, turned as its EXIF tag says: labels are for the image as it is shown"
    )
    with pytest.raises(ValueError, match=message):
        SegmentationImages(tmp_path, "train", num_classes=2)[0]


def test_a_broken_tag_turns_nothing(tmp_path):
    for content in (b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0" + bytes(range(40)), b"II*\0"):
        colour, _ = seen(
            tmp_path, "0.png", lambda path, content=content: Image.fromarray(COLOUR).save(path, exif=content)
        )
        assert np.array_equal(colour, COLOUR)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    torch.manual_seed(0)
    model = small_vit(depth=2)
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    compress(model, plan_for(model)).plan.save(path)
    return path


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    return status, capsys.readouterr().err


def test_show_draws_images_as_they_are_read(capsys, tmp_path, plan):
    """Grey values of 16 bits, and an image that its tag turns, as the same images of 8 bits, upright."""
    save(Image.fromarray((WIDE / 257).round().astype(np.uint8)), tmp_path / "8.png")
    save(Image.fromarray(turned(WIDE, 6)), tmp_path / "16.png", exif=tag(8))
    save(Image.fromarray(WIDE), tmp_path / "16.tif")
    drawn = []
    for name in ("8.png", "16.png", "16.tif"):
        status, err = run(capsys, "show", plan, tmp_path / name, "--output", tmp_path / "out.png")
        assert status == 0, err
        drawn.append(np.asarray(Image.open(tmp_path / "out.png")))
    assert np.array_equal(drawn[0], drawn[1])
    assert np.array_equal(drawn[0], drawn[2])


def images(root, *paths):
    save(Image.fromarray(COLOUR), *(root / path for path in paths))


BOTH = "train/cat/0.png", "train/dog/0.png", "val/cat/0.png", "val/dog/0.png"
LAYOUTS = {
    "flat": (("train/0.png", "train/1.webp", "val/0.png"),
             "/train holds images and no class folders (2: 0.png, 1.webp); expected <class>/<image> in it"),
    "images beside classes": ((*BOTH, "val/extra.jpg"),
                              "/val holds images beside its class folders (1: extra.jpg); expected <class>/<image>"),
    "no splits": (("cat/0.png", "dog/0.png"),
                  " has no folder train or training, only cat, dog; expected {root}/train/<class>/<image>, one"),
    "no splits, flat": (("0.png", "1.png"), " has no folder train or training, only 0.png, 1.png; expected"),
    "one split": (BOTH[:2], " has no folder validation or val or valid or eval or evaluation or test, only train"),
    "nested": ((*BOTH, "train/dog/old/0.png"), "/train/dog holds folders (old), not only images; expected <class>"),
    "an empty class": ((*BOTH, "train/bird/", "train/ape/"), "/train has class folders without images (ape, bird)"),
    "hidden files alone": ((*BOTH, "train/bird/.0.png"), "/train has class folders without images (bird)"),
    "no images": (("train/cat/", "train/dog/"), "Found 0 images in subfolders of {root}/train; expected <class>"),
    "one class": (("train/cat/0.png", "val/cat/0.png"), "the data has 1 class (cat), expected at least 2"),
    "case": ((*BOTH[:3], "val/Dog/0.png"),
             "different classes: Dog, dog not in every one of them; upper and lower case must be the same"),
    "other classes": ((*BOTH[:3], "val/cow/0.png"), "different classes: cow, dog not in every one of them\n"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_laid_out_otherwise_are_told_in_one_line(capsys, tmp_path, layout):
    paths, message = LAYOUTS[layout]
    root = tmp_path / "data"
    for path in paths:
        if path.endswith("/"):
            (root / path).mkdir(parents=True)
        else:
            images(root, path)
    model = ["--model", "vit_tiny_patch16_224", "--img-size", "32", "--device", "cpu", "-j", "0", "-b", "1"]
    status, err = run(capsys, "train", root, *model, "--output", tmp_path / "out")
    assert (status, len(err.splitlines())) == (2, 1), err
    assert message.format(root=root) in err, err
    assert not (tmp_path / "out").exists()


def test_labels_count_classes_as_timm_does(tmp_path):
    """In natural order, whatever the case; of names that are the same then, by the characters."""
    names = ["9", "10", "A", "a", "b", "c2", "c10"]
    for label, name in reversed([*enumerate(names)]):
        for index in (2, 10):
            save(Image.new("RGB", (2, 2), (label,) * 3), tmp_path / "train" / name / f"{index}.png")
    dataset = open_dataset(tmp_path, "train")
    assert class_names(dataset) == names
    assert [np.asarray(image).max() for image, _ in dataset] == [label for _, label in dataset]
    assert len(dataset) == 14
