"""Label maps from folders, crops that keep image and labels together, and measures against counting by hand."""

import warnings

import numpy as np
import pytest
import torch
from helpers import plan_for, small_vit
from PIL import Image
from torch.utils.data import DataLoader

from pm_models import Segmenter
from pm_models.data import warn_of_labels
from pm_models.segmentation import (
    IGNORED,
    SegmentationImages,
    evaluate_segmentation,
    evaluation_transform,
    measures,
    training_transform,
)
from pm_models.segmenter import predict
from pm_models.training import Recipe, SegmentationTask, fit, make_accelerator

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def write(root, images, labels, stems, size=(12, 20), values=(0, 1, 2), image_ending="", label_ending=".png"):
    """Images whose red channel is 50 times their label, where that is below 5."""
    random = np.random.default_rng(0)
    for stem in stems:
        label = random.choice(values, size).astype(np.uint8)
        image = random.integers(0, 255, (*size, 3), dtype=np.uint8)
        image[..., 0] = np.where(label < 5, 50 * label, 0)
        for folder, name, content in (
            (images, f"{stem}{image_ending}.png", image),
            (labels, f"{stem}{label_ending}", label),
        ):
            path = root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(content).save(path)


def red(image):
    return image[0] // 50


def test_plain_folders(tmp_path):
    write(tmp_path, "images/train", "labels/train", ["b", "a", "sub/c"], values=(0, 1, 2, 3, 255))
    write(tmp_path, "images/test", "labels/test", ["d"])
    data = SegmentationImages(tmp_path, "train", num_classes=3, ignore_index=3)
    assert [image.name for image, _ in data.pairs] == ["a.png", "b.png", "c.png"]
    for image, labels in data:
        assert image.shape == (3, 12, 20)
        kept = labels != IGNORED
        assert (red(image)[kept] == labels[kept]).all()
        assert 0 < kept.float().mean() < 1
        assert set(labels.unique().tolist()) == {0, 1, 2, IGNORED}
    assert len(SegmentationImages(tmp_path, "validation", num_classes=3)) == 1


def test_ade20k_counts_from_one_and_ignores_zero(tmp_path):
    write(tmp_path, "images/training", "annotations/training", ["x"], values=(0, 1, 4))
    data = SegmentationImages(tmp_path, "train")
    assert data.num_classes == 150
    image, labels = data[0]
    expected = red(image).long() - 1
    assert (labels == torch.where(expected < 0, IGNORED, expected)).all()


def test_cityscapes(tmp_path):
    write(
        tmp_path, "leftImg8bit/val", "gtFine/val", ["ulm/ulm_0", "bonn/bonn_1"], values=(0, 4, 255),
        image_ending="_leftImg8bit", label_ending="_gtFine_labelTrainIds.png",
    )  # fmt: skip
    data = SegmentationImages(tmp_path, "validation")
    assert (len(data), data.num_classes) == (2, 19)
    image, labels = data[1]
    assert (red(image)[labels != IGNORED] == labels[labels != IGNORED]).all()


@pytest.mark.parametrize("num_classes", [3, 149, 151])
def test_annotations_of_other_than_150_classes_are_taken_as_they_are(tmp_path, num_classes):
    write(tmp_path, "images/training", "annotations/training", ["x"], values=(0, 1, 2, 255))
    image, labels = SegmentationImages(tmp_path, "train", num_classes=num_classes)[0]
    assert (labels[labels != IGNORED] == red(image)[labels != IGNORED]).all()
    assert set(labels.unique().tolist()) == {0, 1, 2, IGNORED}
    for told in (None, 150):
        image, labels = SegmentationImages(tmp_path, "train", num_classes=told)[0]
        assert set(labels.unique().tolist()) == {0, 1, IGNORED}  # 1 and 2, and what is left out


@pytest.mark.parametrize("ending", [".PNG", ".tif", ".TIFF", ".bmp"])
@pytest.mark.parametrize("folder", ["labels", "annotations"])
def test_label_maps_of_other_types(tmp_path, ending, folder):
    write(tmp_path, "images/train", f"{folder}/train", ["a", "sub/b"], label_ending=ending, values=(0, 1, 2, 255))
    for image, labels in SegmentationImages(tmp_path, "train", num_classes=3):
        assert (labels[labels != IGNORED] == red(image)[labels != IGNORED]).all()
        assert set(labels.unique().tolist()) == {0, 1, 2, IGNORED}


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_label_maps_of_more_than_8_bits_are_not_scaled(tmp_path, dtype):
    write(tmp_path, "images/train", "labels/train", ["a"])
    stored = np.arange(240, dtype=dtype).reshape(12, 20) + 400
    (tmp_path / "labels/train/a.png").unlink()
    Image.fromarray(stored).save(tmp_path / "labels/train/a.tif")
    assert (SegmentationImages(tmp_path, "train", num_classes=1000)[0][1].numpy() == stored).all()


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda root: {"root": root / "x"}, FileNotFoundError, "no data folder at"),
        (lambda root: {"root": root / "images"}, FileNotFoundError, "has no folder of label maps; expected one of ann"),
        (lambda root: {"split": "other"}, FileNotFoundError, "images has no folder other"),
        (lambda root: {"num_classes": None}, ValueError, "num_classes must be given for"),
        (lambda root: (root / "labels/train/a.png").unlink(), FileNotFoundError, "1 of the 2 images .* the first: .*a"),
        (lambda root: [p.unlink() for p in (root / "images/train").iterdir()], ValueError, "train holds no images"),
        (lambda root: {"num_classes": 2}, ValueError, "a.png has the class 2, expected 0 to 1, or 255 or ignore_index"),
        (lambda root: save(root, np.zeros((12, 20, 3))), ValueError, "a.png has 3 channels, expected one"),
        (lambda root: save(root, np.zeros((20, 12))), ValueError, "a.png is 12 x 20, but its image is 20 x 12$"),
        (lambda root: floats(root), ValueError, "a.tif holds floats, expected whole numbers"),
        (
            lambda root: (root / "labels/train/a.png").rename(root / "labels/train/a.jpg"),
            FileNotFoundError,
            r"the first: .*labels/train/a.png or .tif or .tiff or .bmp",
        ),
    ],
)
def test_errors(tmp_path, damage, error, message):
    write(tmp_path, "images/train", "labels/train", ["a", "b"])
    changes = damage(tmp_path)
    arguments = {"root": tmp_path, "split": "train", "num_classes": 3} | (changes if type(changes) is dict else {})
    with pytest.raises(error, match=message):
        SegmentationImages(**arguments)[0]


def floats(root):
    (root / "labels/train/a.png").unlink()
    Image.new("F", (20, 12)).save(root / "labels/train/a.tif")


def save(root, content):
    Image.fromarray(content.astype(np.uint8)).save(root / "labels/train/a.png")


def told(root, num_classes, **options):
    """What is told of the label maps before training."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_labels(SegmentationImages(root, "train", num_classes=num_classes, **options))
    return [str(warning.message) for warning in caught]


def test_classes_that_never_occur_are_told(tmp_path):
    write(tmp_path, "images/train", "labels/train", ["a", "b", "sub/c"], values=(0, 2, 7, 255))
    where = f"the 3 label maps in {tmp_path}/labels/train, and cannot be learned"
    assert told(tmp_path, 5, ignore_index=7) == [f"3 of 5 classes never occur in {where}: 1, 3, 4"]
    assert told(tmp_path, 8, ignore_index=2) == [f"6 of 8 classes never occur in {where}: 1, 2, 3, 4, 5, 6"]
    assert told(tmp_path, 20)[0].endswith(": 1, 3, 4, 5, 6, 8, 9, 10, 11, 12, ...")
    write(tmp_path, "images/train", "labels/train", ["a", "b", "sub/c"], values=(0, 1, 2))
    assert told(tmp_path, 3) == []
    write(tmp_path, "images/train", "labels/train", ["b"], values=(0, 1, 2, 9))
    with pytest.raises(ValueError, match="b.png has the class 9, expected 0 to 4"):
        told(tmp_path, 5)


def test_masks_of_0_and_255_are_told(tmp_path):
    write(tmp_path, "images/train", "labels/train", ["a", "b", "c", "d"], values=(0, 1))
    assert told(tmp_path, 2) == []
    write(tmp_path, "images/train", "labels/train", ["b", "c"], values=(0, 255))
    write(tmp_path, "images/train", "labels/train", ["d"], values=(0, 1, 255))
    mask = (
        f"of the 4 label maps in {tmp_path}/labels/train hold only 0 and 255 (the first: "
        f"{tmp_path}/labels/train/{{}}.png), and 255 is left out: save masks with the classes 0 and 1"
    )
    assert told(tmp_path, 2) == [f"2 {mask.format('b')}"]
    write(tmp_path, "images/train", "labels/train", ["a", "d"], values=(0, 255))
    never, masks = told(tmp_path, 2)
    assert never.startswith("1 of 2 classes never occur in the 4 label maps in ")
    assert never.endswith(": 1")
    assert masks == f"4 {mask.format('a')}"


def test_of_very_many_label_maps_some_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("pm_models.data.segmentation._SURVEYED", 4)
    write(tmp_path, "images/train", "labels/train", "abcdefgh", values=(0, 255))
    never, masks = told(tmp_path, 2)
    where = f"4 label maps drawn at random from the 8 label maps in {tmp_path}/labels/train"
    assert f"1 of 2 classes never occur in {where}, and cannot be learned: 1" == never
    assert masks.startswith(f"4 of {where} hold only 0 and 255 (the first: ")


def test_crops_keep_image_and_labels_together(tmp_path):
    """The labels are stripes and the image their colour, so that every crop can be checked, at any size."""
    for folder, content in (("images", np.zeros((40, 60, 3))), ("labels", np.zeros((40, 60)))):
        content[:, 20:40] = 1 if folder == "labels" else (200, 0, 0)
        (tmp_path / folder / "train").mkdir(parents=True)
        Image.fromarray(content.astype(np.uint8)).save(tmp_path / folder / "train" / "a.png")
    transform = training_transform((24, 32), MEAN, STD)
    transform.transforms = [step for step in transform.transforms if "Photometric" not in type(step).__name__]
    data = SegmentationImages(tmp_path, "train", num_classes=2, transform=transform)
    filled = sizes = 0
    for _ in range(40):
        image, labels = data[0]
        assert type(image) is torch.Tensor
        assert image.shape == (3, 24, 32)
        assert labels.shape == (24, 32)
        value = (image[0] * STD[0] + MEAN[0]) * 255
        kept = labels != IGNORED
        assert ((value > 100)[kept] == (labels == 1)[kept]).float().mean() > 0.93  # but for the stripe's edges
        assert (image[:, ~kept].abs() < 0.02).all()
        filled += (~kept).any().item()
        sizes += kept.all().item()
    assert filled
    assert sizes
    photometric = training_transform((24, 32), MEAN, STD)
    data.transform = photometric
    assert len({data[0][0].sum().item() for _ in range(5)}) == 5


def test_evaluation_leaves_the_labels_as_they_are(tmp_path):
    write(tmp_path, "images/val", "labels/val", ["a"], size=(12, 20))
    plain = SegmentationImages(tmp_path, "validation", num_classes=3)
    data = SegmentationImages(
        tmp_path, "validation", num_classes=3, transform=evaluation_transform((12, 12), MEAN, STD)
    )
    image, labels = data[0]
    expected = (plain[0][0].float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(image, expected.as_subclass(torch.Tensor))
    assert (labels == plain[0][1]).all()
    data.transform = evaluation_transform((24, 12), MEAN, STD)
    assert data[0][0].shape == (3, 24, 40)


def test_measures_are_counted():
    labels = torch.tensor([0, 0, 0, 1, 1, 3, 3, 3])
    found = torch.tensor([0, 0, 1, 1, 4, 3, 3, 0])
    confusion = torch.zeros(6, 6)
    for label, prediction in zip(labels, found, strict=True):
        confusion[label, prediction] += 1
    result = measures(confusion)
    iou = [2 / 4, 1 / 3, None, 2 / 3, 0, None]
    assert result.iou == [None if value is None else pytest.approx(100 * value) for value in iou]
    assert result.miou == pytest.approx(100 * (2 / 4 + 1 / 3 + 2 / 3 + 0) / 4)
    assert result.macc == pytest.approx(100 * (2 / 3 + 1 / 2 + 2 / 3) / 3)
    assert result.aacc == pytest.approx(100 * 5 / 8)


def test_evaluation_counts_every_labelled_pixel():
    """Images of several sizes, larger and smaller than a window, against predictions counted one by one."""
    torch.manual_seed(0)
    model = Segmenter(small_vit(num_classes=0, depth=2), 4).eval()
    accelerator = make_accelerator(cpu=True)
    images = []
    for size, label_size in (((28, 20), (28, 20)), ((40, 33), (20, 16)), ((9, 9), (30, 31))):
        labels = torch.randint(0, 4, (1, *label_size))
        labels[torch.rand(labels.shape) < 0.2] = IGNORED
        images.append((torch.randn(1, 3, *size), labels))
    images.append((torch.randn(1, 3, 28, 20), torch.full((1, 28, 20), IGNORED)))
    confusion = torch.zeros(4, 4)
    with torch.inference_mode():
        for image, labels in images:
            found = predict(model, image, labels.shape[-2:], stride=8).argmax(dim=1)
            for label, prediction in zip(labels.flatten(), found.flatten(), strict=True):
                if label != IGNORED:
                    confusion[label, prediction] += 1
    result = evaluate_segmentation(model, images, accelerator=accelerator, stride=8)
    assert result == measures(confusion)
    with pytest.raises(ValueError, match="no pixel has a label: all of them are ignored"):
        evaluate_segmentation(model, images[-1:], accelerator=accelerator)
    with pytest.raises(ValueError, match="no pixel has a label"):
        evaluate_segmentation(model, [], accelerator=accelerator)


def test_the_loss_of_pixels():
    """Of the labelled ones; with a teacher, T^2 times the divergence averaged over pixels and classes."""
    torch.manual_seed(0)
    student, teacher = (Segmenter(small_vit(num_classes=0, depth=2), 4).eval() for _ in range(2))
    images, targets = torch.randn(2, 3, 28, 20), torch.randint(0, 4, (2, 28, 20))
    targets[:, :9] = IGNORED
    chances = student(images).double().softmax(dim=1).gather(1, targets.where(targets != IGNORED, 0)[:, None])[:, 0]
    expected = -chances.log()[targets != IGNORED].mean()
    result = SegmentationTask(student)(images, targets)
    torch.testing.assert_close(result["loss"].double(), expected, rtol=1e-5, atol=1e-6)
    assert result["output"].shape == (2 * 28 * 20, 4)
    own, wanted = ((model(images).double() / 20).log_softmax(dim=1) for model in (student, teacher))
    divergence = (wanted.exp() * (wanted - own)).mean()
    task = SegmentationTask(student, teacher, alpha=0.8).train()
    assert not task.teacher.training
    result = task.eval()(images, targets)
    torch.testing.assert_close(result["loss"].double(), expected + 0.8 * 400 * divergence, rtol=1e-4, atol=1e-5)
    result["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    nothing = SegmentationTask(student)(images, torch.full_like(targets, IGNORED))["loss"]
    assert nothing == 0
    nothing.backward()


def test_training_a_compressed_segmenter(tmp_path):
    torch.manual_seed(0)
    dense = Segmenter(small_vit(num_classes=0, depth=2), 4)
    model = dense.compressed(plan_for(dense.encoder))
    data = [(torch.randn(3, 28, 20), torch.full((28, 20), index % 4)) for index in range(8)]
    accelerator = make_accelerator(cpu=True)

    def evaluator(model, loader, *, accelerator):
        return evaluate_segmentation(model, loader, accelerator=accelerator)._asdict() | {"top1": 0.0}

    results = fit(
        SegmentationTask(model, dense), DataLoader(data, 4), DataLoader(data, 2), Recipe(epochs=4, lr=3e-3),
        accelerator=accelerator, evaluator=evaluator, summary=tmp_path / "s.csv", state_dir=tmp_path / "state",
    )  # fmt: skip
    assert results[-1].train_loss < results[0].train_loss
    expected = evaluate_segmentation(model, DataLoader(data, 2), accelerator=accelerator)
    assert (results[-1].miou, results[-1].macc) == (expected.miou, expected.macc)
    header = (tmp_path / "s.csv").read_text().splitlines()[0]
    assert header == "epoch,train_loss,train_top1,eval_top1,lr,samples_per_sec,eval_miou,eval_macc"
