"""Segmentation of CamVid by a Segmenter."""

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.task.task import TrainingTask
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pm_models import Segmenter
from pm_models.models import input_size
from pm_models.segmentation import (
    Sample,
    SegmentationImages,
    evaluate_segmentation,
    make_evaluation_loader,
    make_scoring_loader,
    make_training_loader,
    predicted_classes,
    sample_images,
)
from pm_models.training import SegmentationTask, segmentation_loss
from pm_models.visualize import save_plan_picture, save_segmentation_picture

from ..memory import activation_bytes
from ..peers import local_merge, matched, merges_per_block, tome
from .runs import Run, Setting, new_encoder
from .study import Study, part

CLASSES, VOID = 11, 11
DRAWN = (
    Run("dense"),
    *(Run(method, 0.7) for method in ("adaptive", "prune_and_merge", "merge_and_carry", "local_merge")),
)
DRAWN_IMAGES = 3
FOLLOWED = 10  # one in so many validation images is evaluated after every epoch; all test images at the end


class CamVid(Study):
    """On a folder with ``images/{train,val,test}/*`` and ``labels/...``, classes 0 to 10 and 11 for void."""

    quality = "miou"
    follows_test = False
    make_scoring_loader = staticmethod(make_scoring_loader)

    def __init__(
        self, setting: Setting, data: Path, work: Path, device: str, encoder: VisionTransformer | None = None
    ) -> None:
        super().__init__(setting, work, device, encoder)
        self.train_set, self.val_set, self.test_set = (
            SegmentationImages(data, split, num_classes=CLASSES, ignore_index=VOID)
            for split in ("train", "val", "test")
        )

    def new_model(self) -> Segmenter:
        encoder = new_encoder(self.setting, num_classes=0) if self.encoder is None else copy.deepcopy(self.encoder)
        torch.manual_seed(0)
        setting = self.setting
        return Segmenter(encoder, CLASSES, decoder=setting.decoder, decoder_depth=setting.decoder_depth)

    def loaders(self, seed: int, images: int | None = None) -> tuple[DataLoader, DataLoader]:
        like = self.new_model()
        train = make_training_loader(
            part(self.train_set, images),
            like,
            batch_size=self.setting.batch,
            workers=self.workers,
            seed=seed,
            scale=self.setting.crop_scale,
        )
        return train, make_evaluation_loader(self.val_set, like, workers=self.workers, share=(0, FOLLOWED))

    def test_loader(self) -> DataLoader:
        return make_evaluation_loader(self.test_set, self.new_model(), workers=self.workers)

    def task(self, model: nn.Module, teacher: nn.Module | None) -> TrainingTask:
        return SegmentationTask(model, teacher)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return segmentation_loss(logits, targets)

    def evaluate(self, model: nn.Module, loader: DataLoader, *, accelerator: object) -> Mapping[str, float]:
        found = evaluate_segmentation(model, loader, accelerator=accelerator)
        return {"top1": found.aacc, **found._asdict()}

    def peer(self, run: Run) -> Segmenter:
        encoder = self.dense.encoder
        if run.method == "tome":
            make, tried = partial(tome, full_map=True), merges_per_block(encoder)
        else:
            make, tried = local_merge, list(range(1, encoder.patch_embed.num_patches // 4 + 1))

        def segmenter(encoder: VisionTransformer, setting: int) -> Segmenter:
            return self.dense.with_encoder(make(encoder, setting))

        return copy.deepcopy(matched(segmenter, encoder, tried, self.gmacs(run))[0])

    def facts(self, model: Segmenter) -> dict[str, object]:
        images = torch.randn(self.setting.batch, *input_size(model), device=self.accelerator.device)
        with self.accelerator.autocast():
            return {"activation_bytes": activation_bytes(model.train(), images)}

    def finished(self, run: Run, model: Segmenter) -> None:
        """Keep what the model predicts for the images that are drawn."""
        found = [predicted_classes(model, sample.image, sample.labels.shape) for sample in self._samples()]
        path = self._predictions(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.stack(found).astype(np.uint8))

    def draw(self, path: Path) -> None:
        samples = self._samples()
        maps = {"labels": [sample.labels for sample in samples]}
        for run in DRAWN:
            if self._predictions(run).is_file():
                name = run.method.replace("_", " ") + (f" {run.keep_rate:g}" if run.keep_rate else "")
                maps[name] = list(np.load(self._predictions(run)))
        save_segmentation_picture([sample.picture for sample in samples], maps, path.with_suffix(".png"))
        height, width = self.dense.image_size
        plan = self.plan(Run("prune_and_merge", 0.7))
        save_plan_picture(plan, path.with_name(f"{path.stem}_plan.png"), samples[0].picture[:height, :width])

    def _samples(self) -> list[Sample]:
        return sample_images(self.test_set, self.dense, DRAWN_IMAGES)

    def _predictions(self, run: Run) -> Path:
        return self.work / "predictions" / f"{run.name}.npy"
