"""Classification of CIFAR-10."""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from timm.task.task import TrainingTask
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pm_models.data import calibration_loader, make_loader, open_dataset
from pm_models.training import classification_task, distillation_task, evaluate

from ..models import RATES
from ..peers import evit, matched, merges_per_block, tome
from .runs import Run, Setting, new_encoder
from .study import Study, part

SMOOTHING = 0.1  # of labels, in fine-tuning as in training: else the dense model itself is pulled from where it was


class Smaller(nn.Module):
    """Images made smaller, and their patches."""

    def __init__(self, embed: nn.Module, image: int) -> None:
        super().__init__()
        self.embed, self.image = embed, image

    def forward(self, images: Tensor) -> Tensor:
        return self.embed(F.interpolate(images, self.image, mode="bilinear", antialias=True, align_corners=False))


class Cifar10(Study):
    """On an image folder, ``train/<class>/*`` and ``test/<class>/*``."""

    quality = "top1"
    follows_test = True
    make_scoring_loader = staticmethod(calibration_loader)

    def __init__(
        self, setting: Setting, data: Path, work: Path, device: str, encoder: VisionTransformer | None = None
    ) -> None:
        super().__init__(setting, work, device, encoder)
        self.train_set, self.test_set = (open_dataset(data, split) for split in ("train", "validation"))

    def new_model(self) -> VisionTransformer:
        if self.encoder is None:
            return new_encoder(self.setting, num_classes=10)
        model = copy.deepcopy(self.encoder)
        torch.manual_seed(0)
        model.reset_classifier(10, "token")
        return model

    def loaders(self, seed: int, images: int | None = None) -> tuple[DataLoader, DataLoader]:
        train = make_loader(
            part(self.train_set, images),
            self.new_model(),
            batch_size=self.setting.batch,
            workers=self.workers,
            training=True,
            seed=seed,
            scale=self.setting.crop_scale,
            color_jitter=None,
        )
        return train, self.test_loader()

    def test_loader(self) -> DataLoader:
        loader = make_loader(
            self.test_set, self.new_model(), batch_size=self.setting.batch, workers=self.workers, crop_pct=1.0
        )
        return self.accelerator.prepare(loader)

    def task(self, model: nn.Module, teacher: nn.Module | None) -> TrainingTask:
        if teacher is None:
            return classification_task(model, smoothing=SMOOTHING)
        return distillation_task(model, teacher, smoothing=SMOOTHING)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets)

    def evaluate(self, model: nn.Module, loader: DataLoader, *, accelerator: object) -> Mapping[str, float]:
        return evaluate(model, loader, accelerator=accelerator)

    def peer(self, run: Run) -> nn.Module:
        if run.method == "smaller_images":
            model = copy.deepcopy(self.dense)
            model.set_input_size(run.image)
            model.patch_embed = nn.Sequential(Smaller(model.patch_embed, run.image))
            return model
        make, tried = (tome, merges_per_block(self.dense)) if run.method == "tome" else (evit, RATES)
        return matched(make, self.dense, tried, self.gmacs(run))[0]

    def timed(self, run: Run, images: Tensor) -> tuple[nn.Module, Tensor]:
        model = self.build(run).eval()
        if run.method != "smaller_images":
            return model, images
        model.patch_embed = model.patch_embed[0].embed  # smaller images cost no resizing
        return model, images[..., : run.image, : run.image].contiguous()
