"""What differs between the values of ``--task``: one class for each image, or one for every pixel."""

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch.nn.functional as F
from accelerate import Accelerator
from timm.task.task import TrainingTask
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..data import (
    Sample,
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
from ..loading import check_name, load_model, make_model
from ..segmenter import Segmenter
from ..training import (
    SegmentationTask,
    classification_task,
    distillation_task,
    evaluate,
    evaluate_segmentation,
    predicted_classes,
    segmentation_loss,
)
from ..vision_transformer import PlainModel
from ..visualize import save_segmentation_picture
from ..weights import check_head, load_checkpoint
from .options import Command


class _Task:
    """Base class of the tasks.

    Args:
        options: the command's options.
        accelerator: device, precision and processes.
    """

    def __init__(self, options: Command, accelerator: Accelerator) -> None:
        self.options, self.accelerator = options, accelerator
        self._loading = {"batch_size": options.data.batch_size, "workers": options.data.workers}
        self._preparation = options.data.preparation()

    def _named_model(self, num_classes: int | None) -> PlainModel:
        """The timm model that ``--model`` names, with the weights of ``--checkpoint``."""
        chosen = self.options.model
        arguments = {"num_classes": num_classes, "img_size": chosen.img_size, "in_chans": chosen.in_chans}
        model = make_model(chosen.model, "--model", pretrained=chosen.pretrained, **arguments | chosen.model_kwargs)
        new_head = self.options.command == "train"
        if chosen.checkpoint is not None:
            load_checkpoint(model, chosen.checkpoint, new_head=new_head)
        elif chosen.pretrained:  # timm leaves a head for other classes random
            classes = model.pretrained_cfg.get("num_classes") or 0
            check_head(f"the pretrained {chosen.model}", classes, model.num_classes, new_head=new_head)
        return model


class Classification(_Task):
    """Images with one class each, in timm's data sets and transforms."""

    quality, quality_name = "top1", "top-1 accuracy"  # the measure to compare models by: a field of EpochResult
    evaluator = staticmethod(evaluate)  # for fit
    loss = staticmethod(F.cross_entropy)  # for scoring tokens

    def open(self, *splits: str) -> tuple[PlainModel, list[Dataset]]:
        """The model that ``--model`` names, a saved folder or a timm name, and the requested splits of the data.

        Raises:
            ValueError, FileNotFoundError: there is no such model or data, or the two do not match.
        """
        chosen = self.options.model
        if chosen.is_folder:
            model = load_model(chosen.model)
            if isinstance(model, Segmenter):
                raise ValueError(f"{chosen.model} holds a Segmenter: give --task segmentation")
            datasets = self._datasets(splits, model.in_chans)
        else:
            check_name(chosen.model, "--model")
            datasets = self._datasets(splits, chosen.in_chans or 3)
            classes = class_names(datasets[0]) if datasets else None
            model = self._named_model(chosen.num_classes or (len(classes) if classes else None))
        for dataset in datasets:
            check_classes(dataset, model)
        return model, datasets

    def _datasets(self, splits: tuple[str, ...], in_chans: int) -> list[Dataset]:
        data = self.options.data
        datasets = [open_dataset(data.data_dir, split, dataset=data.dataset, in_chans=in_chans) for split in splits]
        check_same_classes(*datasets)
        return datasets

    def training_loader(self, dataset: Dataset, model: PlainModel) -> DataLoader:
        arguments = self._loading | self._preparation | self.options.augmentation.loading()
        return make_loader(dataset, model, training=True, seed=self.options.device.seed, **arguments)

    def evaluation_loader(self, dataset: Dataset, model: PlainModel) -> DataLoader:
        return self.accelerator.prepare(make_loader(dataset, model, **self._loading, **self._preparation))

    def scoring_loader(self, dataset: Dataset, model: PlainModel) -> DataLoader:
        batches, seed = self.options.compression.score_batches, self.options.device.seed
        return calibration_loader(dataset, model, batches=batches, seed=seed, **self._loading, **self._preparation)

    def losses(self, model: PlainModel, teacher: PlainModel | None = None) -> TrainingTask:
        """The losses for :func:`~pm_models.training.fit`, with distillation if there is a teacher."""
        smoothing = self.options.training.smoothing
        if teacher is None:
            return classification_task(model, smoothing=smoothing)
        return distillation_task(model, teacher, smoothing=smoothing, **self.options.distillation.weighting())

    def in_words(self, measures: Mapping) -> str:
        """The result of :attr:`evaluator` as text."""
        return (
            f"top-1 {measures['top1']:.2f}%, top-5 {measures['top5']:.2f}%, loss {measures['loss']:.4f} on "
            f"{measures['images']} images"
        )

    def samples(self, dataset: Dataset, model: PlainModel, count: int) -> list[Sample]:
        """Images as the model sees them, for pictures."""
        return sample_images(dataset, model, count, **self._preparation)

    def save_predictions(self, dataset: Dataset, models: Mapping[str, PlainModel], count: int, path: Path) -> None:
        """Draw the models' predictions: nothing to draw for classes of whole images."""


class Segmentation(_Task):
    """Images with a class for every pixel, for a Segmenter: ADE20K, Cityscapes, or folders of images and labels."""

    quality, quality_name = "miou", "mean IoU"
    loss = staticmethod(segmentation_loss)

    def open(self, *splits: str) -> tuple[Segmenter, list[SegmentationImages]]:
        chosen = self.options.model
        if chosen.is_folder:
            model = load_model(chosen.model)
            if not isinstance(model, Segmenter):
                raise ValueError(
                    f"{chosen.model} holds a model that classifies images, expected a Segmenter; train one with pm-vit "
                    "train --task segmentation"
                )
            datasets = self._datasets(splits, chosen.num_classes or model.num_classes)
            for dataset in datasets:
                if dataset.num_classes != model.num_classes:
                    raise ValueError(
                        f"the data has {dataset.num_classes} classes, but the model distinguishes {model.num_classes}"
                    )
        else:
            check_name(chosen.model, "--model")
            if not splits and chosen.num_classes is None:
                raise ValueError(
                    f"--num-classes must be given for a Segmenter on {chosen.model}, because there is no data"
                )
            datasets = self._datasets(splits, chosen.num_classes)
            model = self._named_segmenter(datasets[0].num_classes if datasets else chosen.num_classes)
        if datasets and self.options.command != "eval" and self.accelerator.is_main_process:
            warn_of_labels(datasets[0])
        return model, datasets

    def _named_segmenter(self, num_classes: int) -> Segmenter:
        chosen = self.options.model
        encoder = self._named_model(num_classes=0)
        if self.options.command != "train" and (chosen.pretrained or chosen.checkpoint is not None):
            warnings.warn(
                f"the decoder on {chosen.model} has random weights: name a folder that pm-vit train wrote",
                stacklevel=2,
            )
        decoder = {f"decoder_{name}": value for name, value in chosen.decoder_kwargs.items()}
        try:
            return Segmenter(encoder, num_classes, decoder=chosen.decoder, **decoder)
        except TypeError as error:
            raise ValueError(f"--decoder-kwargs takes depth, heads, drop_path and dropout: {error}") from error

    def _datasets(self, splits: tuple[str, ...], num_classes: int | None) -> list[SegmentationImages]:
        data = self.options.data
        return [
            SegmentationImages(data.data_dir, split, num_classes=num_classes, ignore_index=data.ignore_index)
            for split in splits
        ]

    def training_loader(self, dataset: SegmentationImages, model: Segmenter) -> DataLoader:
        scale, seed = self.options.crops.scale, self.options.device.seed
        return make_training_loader(dataset, model, scale=scale, seed=seed, **self._loading, **self._preparation)

    def evaluation_loader(self, dataset: SegmentationImages, model: Segmenter) -> DataLoader:
        share = self.accelerator.process_index, self.accelerator.num_processes
        workers = self.options.data.workers
        return make_evaluation_loader(dataset, model, workers=workers, share=share, **self._preparation)

    def scoring_loader(self, dataset: SegmentationImages, model: Segmenter) -> DataLoader:
        batches, seed = self.options.compression.score_batches, self.options.device.seed
        return make_scoring_loader(dataset, model, batches=batches, seed=seed, **self._loading, **self._preparation)

    def losses(self, model: Segmenter, teacher: Segmenter | None = None) -> TrainingTask:
        if teacher is None:
            return SegmentationTask(model)
        return SegmentationTask(model, teacher, **self.options.distillation.weighting())

    def evaluator(self, model: nn.Module, loader: DataLoader, *, accelerator: Accelerator) -> dict:
        """Evaluate with ``--stride``, ``--scales`` and ``--flip``, which only ``pm-vit eval`` has."""
        windows = asdict(self.options.windows) if self.options.command == "eval" else {}
        measures = evaluate_segmentation(model, loader, accelerator=accelerator, **windows)
        return {"top1": measures.aacc, **measures._asdict()}

    def in_words(self, measures: Mapping) -> str:
        classes = ", ".join(
            f"{index} {'-' if iou is None else f'{iou:.2f}'}" for index, iou in enumerate(measures["iou"])
        )
        return (
            f"IoU of each class: {classes}\n"
            f"mIoU {measures['miou']:.2f}%, mAcc {measures['macc']:.2f}%, aAcc {measures['aacc']:.2f}%"
        )

    def samples(self, dataset: SegmentationImages, model: Segmenter, count: int) -> list[Sample]:
        samples = sample_images(dataset, model, count, **self._preparation)
        return [sample.cropped(model.image_size) for sample in samples]

    def save_predictions(
        self, dataset: SegmentationImages, models: Mapping[str, Segmenter], count: int, path: Path
    ) -> None:
        samples = sample_images(dataset, next(iter(models.values())), count, **self._preparation)
        maps = {"labels": [sample.labels for sample in samples]}
        for name, model in models.items():
            maps[name] = [predicted_classes(model, sample.image, sample.labels.shape) for sample in samples]
        save_segmentation_picture([sample.picture for sample in samples], maps, path)


Task = Classification | Segmentation
TASKS = {"classification": Classification, "segmentation": Segmentation}
