"""What the commands do differently for each ``--task``: images of one class each, or with a class for every pixel."""

import argparse
import difflib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import timm
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from timm.task.task import TrainingTask
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .checkpoints import CONFIG_NAME, load_pretrained
from .data import (
    SegmentationImages,
    calibration_loader,
    check_classes,
    check_same_classes,
    class_names,
    make_evaluation_loader,
    make_loader,
    make_scoring_loader,
    make_training_loader,
    open_dataset,
    sample_images,
    warn_of_labels,
)
from .plan import CompressionPlan
from .published import VARIANT_NAME, load_segmenter_checkpoint
from .segmenter import Model, Segmenter
from .training import (
    Evaluator,
    SegmentationTask,
    classification_task,
    distillation_task,
    evaluate,
    evaluate_segmentation,
    predicted_classes,
    segmentation_loss,
)
from .vision_transformer import Compressed, PlainModel, check_vision_transformer, compress
from .visualize import save_segmentation_picture
from .weights import cause, check_head, load_checkpoint


class Task(ABC):
    """Models, data, losses and measures of one kind.

    Args:
        options: of the command line.
    """

    quality: str  # the field of an epoch's result, and of a table's row, that models are compared by
    quality_name: str

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options

    @abstractmethod
    def open(self, *splits: str) -> tuple[Model, list[Dataset]]:
        """The model that ``--model`` names, a saved folder or one of timm's names, and the data's splits.

        Raises:
            ValueError, FileNotFoundError: there is no such model or data, or they do not fit each other.
        """

    @abstractmethod
    def training_loader(self, dataset: Dataset, model: Model) -> DataLoader: ...

    @abstractmethod
    def evaluation_loader(self, dataset: Dataset, model: Model, accelerator: Accelerator) -> DataLoader:
        """What :attr:`evaluator` takes."""

    @abstractmethod
    def scoring_loader(self, dataset: Dataset, model: Model) -> DataLoader: ...

    @abstractmethod
    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss that tokens are scored by."""

    @abstractmethod
    def training(self, model: Model) -> TrainingTask: ...

    @abstractmethod
    def distillation(self, model: Model, teacher: Model) -> TrainingTask: ...

    @abstractmethod
    def compress(self, model: Model, plan: CompressionPlan, **options: object) -> Model: ...

    @property
    @abstractmethod
    def evaluator(self) -> Evaluator:
        """For ``fit``: a model's measures by the names of an epoch's result, and more."""

    @abstractmethod
    def evaluated(self, result: Mapping) -> str:
        """Those measures in words."""

    @abstractmethod
    def samples(self, dataset: Dataset, model: Model, count: int) -> list[np.ndarray]:
        """Images as the model sees them, for pictures."""

    def save_predictions(  # noqa: B027 - most tasks have nothing to draw
        self, dataset: Dataset, models: Mapping[str, Model], count: int, path: Path
    ) -> None:
        """A picture of what the models predict, where predictions are pictures."""

    def _named_model(self, **arguments: object) -> PlainModel:
        """The timm model that ``--model`` names, with the weights of ``--checkpoint``."""
        options = self.options
        arguments |= {"img_size": options.img_size, "in_chans": options.in_chans, **options.model_kwargs}
        model = make_model(options.model, "--model", pretrained=options.pretrained, **arguments)
        new_head = options.command == "train"
        if options.checkpoint is not None:
            load_checkpoint(model, options.checkpoint, new_head=new_head)
        elif options.pretrained:  # timm leaves a head for other classes random
            classes = model.pretrained_cfg.get("num_classes") or 0
            check_head(f"the weights of {options.model}", classes, model.num_classes, new_head=new_head)
        return model

    def _normalisation(self) -> dict[str, tuple[float, ...]]:
        """The mean and standard deviation, where they were given."""
        found = {name: getattr(self.options, name) for name in ("mean", "std")}
        return {name: tuple(value) for name, value in found.items() if value is not None}


class Classification(Task):
    """Images with one class each, in timm's data sets and transforms."""

    quality, quality_name = "top1", "top-1 accuracy"
    evaluator = staticmethod(evaluate)

    def open(self, *splits: str) -> tuple[PlainModel, list[Dataset]]:
        options = self.options

        def datasets(in_chans: int) -> list[Dataset]:
            opened = [
                open_dataset(options.data_dir, split, dataset=options.dataset, in_chans=in_chans) for split in splits
            ]
            check_same_classes(*opened)
            return opened

        if Path(options.model).is_dir():
            model = load_model(options.model)
            if isinstance(model, Segmenter):
                raise ValueError(f"{options.model} holds a Segmenter: give --task segmentation")
            found = datasets(model.in_chans)
        else:
            check_name(options.model, "--model")
            found = datasets(options.in_chans or 3)
            classes = class_names(found[0])
            model = self._named_model(num_classes=options.num_classes or (len(classes) if classes else None))
        for dataset in found:
            check_classes(dataset, model)
        return model, found

    def training_loader(self, dataset: Dataset, model: PlainModel) -> DataLoader:
        options = self.options
        augmentation = {
            "no_aug": options.no_aug,
            "scale": options.scale,
            "ratio": options.ratio,
            "hflip": options.hflip,
            "vflip": options.vflip,
            "color_jitter": options.color_jitter,
            "auto_augment": options.aa,
            "interpolation": options.train_interpolation,
            "re_prob": options.reprob,
            "re_mode": options.remode,
            "re_count": options.recount,
        }
        given = {name: value for name, value in augmentation.items() if value is not None}
        return make_loader(dataset, model, training=True, seed=options.seed, **self._loading() | given)

    def evaluation_loader(self, dataset: Dataset, model: PlainModel, accelerator: Accelerator) -> DataLoader:
        return accelerator.prepare(make_loader(dataset, model, **self._loading()))

    def scoring_loader(self, dataset: Dataset, model: PlainModel) -> DataLoader:
        return calibration_loader(
            dataset, model, batches=self.options.score_batches, seed=self.options.seed, **self._loading()
        )

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets)

    def training(self, model: PlainModel) -> TrainingTask:
        return classification_task(model, smoothing=self.options.smoothing)

    def distillation(self, model: PlainModel, teacher: PlainModel) -> TrainingTask:
        options = self.options
        return distillation_task(
            model,
            teacher,
            alpha=options.distill_alpha,
            temperature=options.distill_temperature,
            smoothing=options.smoothing,
        )

    def compress(self, model: PlainModel, plan: CompressionPlan, **options: object) -> Compressed:
        return compress(model, plan, **options)

    def evaluated(self, result: Mapping) -> str:
        return (
            f"top-1 {result['top1']:.2f}%, top-5 {result['top5']:.2f}%, loss {result['loss']:.4f} on "
            f"{result['images']} images"
        )

    def samples(self, dataset: Dataset, model: PlainModel, count: int) -> list[np.ndarray]:
        return [sample.picture for sample in sample_images(dataset, model, count, **self._preparing())]

    def _preparing(self) -> dict[str, object]:
        """What was said of preparing images, for timm's loader."""
        found = {name: getattr(self.options, name) for name in ("crop_pct", "interpolation")}
        return {name: value for name, value in found.items() if value is not None} | self._normalisation()

    def _loading(self) -> dict[str, object]:
        """The same, with how many images at a time and by how many processes."""
        return {"batch_size": self.options.batch_size, "workers": self.options.workers, **self._preparing()}


class Segmentation(Task):
    """Images with a class for every pixel, for a Segmenter: ADE20K, Cityscapes, or folders of images and labels."""

    quality, quality_name = "miou", "mean IoU"

    def open(self, *splits: str) -> tuple[Segmenter, list[SegmentationImages]]:
        model, found = self._open(*splits)
        if self.options.command != "eval" and PartialState().is_main_process:
            warn_of_labels(found[0])
        return model, found

    def _open(self, *splits: str) -> tuple[Segmenter, list[SegmentationImages]]:
        options = self.options
        if not Path(options.model).is_dir():
            check_name(options.model, "--model")
            found = self._datasets(splits, options.num_classes)
            encoder = self._named_model(num_classes=0)
            if options.command != "train" and (options.pretrained or options.checkpoint is not None):
                warnings.warn(
                    f"the decoder on {options.model} has random weights: name a folder that pm-vit train wrote",
                    stacklevel=2,
                )
            decoder = {f"decoder_{name}": value for name, value in options.decoder_kwargs.items()}
            try:
                return Segmenter(encoder, found[0].num_classes, decoder=options.decoder, **decoder), found
            except TypeError as error:
                raise ValueError(f"--decoder-kwargs takes depth, heads, drop_path and dropout: {error}") from error
        model = load_model(options.model)
        if not isinstance(model, Segmenter):
            raise ValueError(
                f"{options.model} holds a model that classifies images, expected a Segmenter; train one with pm-vit "
                "train --task segmentation"
            )
        found = self._datasets(splits, options.num_classes or model.num_classes)
        if found[0].num_classes != model.num_classes:
            raise ValueError(
                f"the data has {found[0].num_classes} classes, but the model tells {model.num_classes} apart"
            )
        return model, found

    def training_loader(self, dataset: SegmentationImages, model: Segmenter) -> DataLoader:
        options = self.options
        return make_training_loader(
            dataset,
            model,
            batch_size=options.batch_size,
            workers=options.workers,
            seed=options.seed,
            scale=tuple(options.scale),
            **self._normalisation(),
        )

    def evaluation_loader(self, dataset: SegmentationImages, model: Segmenter, accelerator: Accelerator) -> DataLoader:
        share = accelerator.process_index, accelerator.num_processes
        return make_evaluation_loader(
            dataset, model, workers=self.options.workers, share=share, **self._normalisation()
        )

    def scoring_loader(self, dataset: SegmentationImages, model: Segmenter) -> DataLoader:
        options = self.options
        return make_scoring_loader(
            dataset,
            model,
            batches=options.score_batches,
            batch_size=options.batch_size,
            workers=options.workers,
            seed=options.seed,
            **self._normalisation(),
        )

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return segmentation_loss(logits, targets)

    def training(self, model: Segmenter) -> TrainingTask:
        return SegmentationTask(model)

    def distillation(self, model: Segmenter, teacher: Segmenter) -> TrainingTask:
        options = self.options
        return SegmentationTask(model, teacher, alpha=options.distill_alpha, temperature=options.distill_temperature)

    def compress(self, model: Segmenter, plan: CompressionPlan, **options: object) -> Segmenter:
        return model.compressed(plan, **options)

    def evaluator(self, model: nn.Module, loader: DataLoader, *, accelerator: Accelerator) -> dict:
        """Evaluates by ``--stride``, ``--scales`` and ``--flip``, which only ``pm-vit eval`` has."""
        chosen = {name: getattr(self.options, name, None) for name in ("stride", "scales", "flip")}
        given = {name: value for name, value in chosen.items() if value is not None}
        found = evaluate_segmentation(model, loader, accelerator=accelerator, **given)
        return {"top1": found.aacc, **found._asdict()}

    def evaluated(self, result: Mapping) -> str:
        classes = ", ".join(
            f"{index} {'-' if iou is None else f'{iou:.2f}'}" for index, iou in enumerate(result["iou"])
        )
        return (
            f"IoU of each class: {classes}\n"
            f"mIoU {result['miou']:.2f}%, mAcc {result['macc']:.2f}%, aAcc {result['aacc']:.2f}%"
        )

    def samples(self, dataset: SegmentationImages, model: Segmenter, count: int) -> list[np.ndarray]:
        found = sample_images(dataset, model, count, **self._normalisation())
        height, width = model.image_size
        return [sample.picture[:height, :width] for sample in found]

    def save_predictions(
        self, dataset: SegmentationImages, models: Mapping[str, Segmenter], count: int, path: Path
    ) -> None:
        found = sample_images(dataset, next(iter(models.values())), count, **self._normalisation())
        maps = {"labels": [sample.labels for sample in found]}
        for name, model in models.items():
            maps[name] = [predicted_classes(model, sample.image, sample.labels.shape) for sample in found]
        save_segmentation_picture([sample.picture for sample in found], maps, path)

    def _datasets(self, splits: tuple[str, ...], num_classes: int | None) -> list[SegmentationImages]:
        options = self.options
        return [
            SegmentationImages(options.data_dir, split, num_classes=num_classes, ignore_index=options.ignore_index)
            for split in splits
        ]


DEFAULT_TASK = "classification"
TASKS = {DEFAULT_TASK: Classification, "segmentation": Segmentation}
_SOURCES = ("hf-hub", "hf_hub", "local-dir")  # of timm's names of models that it does not have itself


def check_name(name: str, option: str) -> None:
    """Refuse what is neither a folder nor a name that timm makes a model of, with names like it.

    Raises:
        ValueError: it is none of timm's models, and says of no hub or folder that timm is to look in.
    """
    if name.partition(":")[0].lower() in _SOURCES or timm.is_model(name):
        return
    similar = timm.list_models(f"*{name}*")[:3] or difflib.get_close_matches(name, timm.list_models(), 3)
    similar = similar or ([f"hf-hub:{name}"] if "/" in name else [])
    hint = f"; did you mean {', '.join(similar)}?" if similar else ""
    raise ValueError(f"{option} {name} is neither a saved folder nor a timm model{hint}")


def make_model(name: str, option: str, **arguments: object) -> PlainModel:
    """The model of timm that an option names; arguments of ``None`` are timm's own.

    Raises:
        ValueError: timm cannot make it: of an argument, a folder or a hub.
        TypeError: it is no Vision Transformer that can be compressed.
    """
    try:
        model = timm.create_model(name, **{key: value for key, value in arguments.items() if value is not None})
    except Exception as error:  # whatever a hub, a folder or a model's own arguments lead to
        raise ValueError(f"{option} {name} cannot be made: {cause(error)}") from error
    if not isinstance(model, Compressed):
        check_vision_transformer(model)
    return model


def load_model(folder: str | Path) -> Model:
    """A model that was saved here, or a published Segmenter."""
    path = Path(folder)
    if (path / VARIANT_NAME).is_file() and not (path / CONFIG_NAME).is_file():
        return load_segmenter_checkpoint(path)
    return load_pretrained(path)
