"""Augmentation that a stopped run repeats, and single images as evaluation has them."""

import random

import numpy
import pytest
import torch
from helpers import small_vit
from PIL import Image

from pm_models import Segmenter
from pm_models.data import (
    SeededImages,
    SegmentationImages,
    make_evaluation_loader,
    make_loader,
    open_dataset,
    read_sample,
    sample_images,
)


@pytest.fixture
def folder(tmp_path):
    for index in range(8):
        path = tmp_path / "train" / ("cat" if index % 2 else "dog") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(path)
    return tmp_path


def images(folder, workers, epoch, seed=0):
    model = small_vit(img_size=32, patch_size=8, depth=1, num_classes=2)
    dataset = open_dataset(folder, "train")
    loader = make_loader(
        dataset, model, batch_size=2, workers=workers, training=True, seed=seed, auto_augment="rand-m9-mstd0.5-inc1",
        re_prob=0.5,
    )  # fmt: skip
    loader.dataset.set_epoch(epoch)
    return torch.stack([loader.dataset[index][0] for index in range(8)])


def test_augmentation_is_told_by_seed_epoch_and_image(folder):
    first = images(folder, 0, 3)
    torch.rand(5)
    random.random()
    numpy.random.rand()
    assert torch.equal(images(folder, 0, 3), first)
    for other in (images(folder, 0, 4), images(folder, 0, 3, seed=1)):
        assert not any(torch.equal(*pair) for pair in zip(other, first, strict=True))


def test_workers_augment_as_the_main_process_does(folder):
    """Also in their second epoch, which the same workers see."""
    model = small_vit(img_size=32, patch_size=8, depth=1, num_classes=2)
    seen = {}
    for workers in (0, 2):
        loader = make_loader(open_dataset(folder, "train"), model, batch_size=2, workers=workers, training=True)
        epochs = []
        for epoch in range(2):
            loader.dataset.set_epoch(epoch)
            torch.manual_seed(epoch)  # of the shuffle
            epochs.append(torch.cat([batch for batch, _ in loader]))
        seen[workers] = epochs
    for epoch in range(2):
        ours, theirs = (
            torch.stack(sorted(seen[workers][epoch], key=lambda x: float(x.double().sum()))) for workers in (0, 2)
        )
        assert torch.equal(ours, theirs)
    assert not torch.equal(seen[0][0].sort(0).values, seen[0][1].sort(0).values)


def test_the_other_random_numbers_are_left_alone(folder):
    dataset = SeededImages(open_dataset(folder, "train"), seed=0)
    dataset.transform = lambda image: (torch.rand(1), random.random(), numpy.random.rand())
    expected = []
    for touch in (False, True):
        torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
        if touch:
            first, second = dataset[0][0], dataset[1][0]
            assert first[0] != second[0]
            assert first[1:] != second[1:]
        expected.append((float(torch.rand(1)), random.random(), float(numpy.random.rand())))
    assert expected[0] == expected[1]


@pytest.mark.parametrize("in_chans", [1, 3])
def test_a_file_is_seen_as_in_evaluation(folder, in_chans):
    model = small_vit(in_chans=in_chans)
    dataset = open_dataset(folder, "train", in_chans=in_chans)
    batch, _ = next(iter(make_loader(dataset, model, batch_size=8, workers=0)))
    samples = sample_images(dataset, model, 8)
    for (path, _), image, expected in zip(dataset.samples, batch, samples, strict=True):
        sample = read_sample(path, model)
        assert torch.equal(sample.image, image)
        numpy.testing.assert_array_equal(sample.picture, expected.picture)
        assert sample.picture.shape == ((28, 20) if in_chans == 1 else (28, 20, 3))


def test_a_segmenter_sees_the_middle_of_a_file(tmp_path):
    for name, pixels in (("images", torch.randint(0, 256, (35, 56, 3))), ("labels", torch.zeros(35, 56))):
        (tmp_path / name / "train").mkdir(parents=True)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(tmp_path / name / "train" / "0.png")
    model = Segmenter(small_vit(), 3)
    dataset = SegmentationImages(tmp_path, "train", num_classes=3)
    whole, _ = next(iter(make_evaluation_loader(dataset, model, workers=0)))
    assert whole.shape[2:] == (28, 44)
    sample = read_sample(tmp_path / "images" / "train" / "0.png", model)
    assert torch.equal(sample.image, whole[0, :, :, 12:32])
    (expected,) = sample_images(dataset, model, 1)
    numpy.testing.assert_array_equal(sample.picture, expected.picture[:, 12:32])
