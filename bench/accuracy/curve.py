"""One study: a dense model, every run made of it, and the file with their accuracies and speeds."""

import copy
import json
import shutil
import statistics
import time
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pm_models import CompressionPlan, compress, load_pretrained, save_pretrained, score_tokens
from pm_models.data import calibration_loader, input_size, make_loader, open_dataset
from pm_models.files import write_atomically
from pm_models.measure import alternate, count_gmacs
from pm_models.training import (
    Recipe,
    classification_task,
    distillation_task,
    evaluate,
    fit,
    make_accelerator,
)

from .. import results
from ..machine import describe, versions
from ..models import RATES
from ..peers import evit, matched, tome
from .runs import PRUNE_RATE, Run, Setting


class Smaller(nn.Module):
    """Images made smaller, and their patches."""

    def __init__(self, embed: nn.Module, image: int) -> None:
        super().__init__()
        self.embed, self.image = embed, image

    def forward(self, images: Tensor) -> Tensor:
        return self.embed(F.interpolate(images, self.image, mode="bilinear", antialias=True, align_corners=False))


class Study:
    """The dense model of ``setting`` trained on the images in ``data``, and the runs made of it.

    ``work`` holds the dense model, the state of an unfinished run, and one file for each finished run.
    """

    def __init__(self, setting: Setting, data: Path, work: Path, device: str) -> None:
        self.setting, self.work = setting, work
        self._dense_epochs = work / "dense_epochs.json"
        self.train_set, self.test_set = (open_dataset(data, split) for split in ("train", "validation"))
        self.accelerator = make_accelerator(mixed_precision="bf16", cpu=device == "cpu")

    @cached_property
    def dense(self) -> VisionTransformer:
        """The trained dense model; trained now if it was not yet."""
        folder = self.work / "dense"
        if not (folder / "config.json").is_file():
            model = self._model()
            recipe = Recipe(
                epochs=self.setting.epochs,
                lr=self.setting.lr,
                weight_decay=self.setting.weight_decay,
                warmup_epochs=self.setting.warmup_epochs,
            )
            task = classification_task(model, smoothing=0.1)
            epochs = fit(
                task, *self._loaders(0), recipe, accelerator=self.accelerator, state_dir=self.work / "dense_state"
            )
            write_atomically(self._dense_epochs, json.dumps([asdict(epoch) for epoch in epochs]).encode())
            save_pretrained(task.trainable_module.eval().cpu(), folder)
        return load_pretrained(folder).eval().to(self.accelerator.device)

    @cached_property
    def scores(self) -> Tensor:
        """(L, patches), kept beside the dense model."""
        path = self.work / "scores.pt"
        if not path.is_file():
            batches = self.setting.score_batches
            loader = calibration_loader(
                self.train_set, self.dense, batches=batches, batch_size=self.setting.batch, workers=1, seed=0
            )
            torch.save(score_tokens(self.dense, loader, batches=batches), path)
        return torch.load(path, weights_only=True)

    def do(self, run: Run) -> None:
        """Measure, fine-tune, measure; nothing where this was done before."""
        path = self._record(run)
        if path.is_file():
            return
        print(f"== {run.name}", flush=True)
        model = self.build(run)
        train_loader, test_loader = self._loaders(run.seed)
        before = evaluate(model, test_loader, accelerator=self.accelerator)
        recipe = Recipe(epochs=self.setting.tune_epochs, lr=self.setting.tune_lr, weight_decay=1e-3, seed=run.seed)
        state, start = self.work / f"{path.stem}_state", time.perf_counter()
        task = distillation_task(model, copy.deepcopy(self.dense))
        epochs = fit(task, train_loader, test_loader, recipe, accelerator=self.accelerator, state_dir=state)
        record = {
            **asdict(run),
            "top1_before": before["top1"],
            "top1": epochs[-1].top1,
            "epochs": [asdict(epoch) for epoch in epochs],
            "seconds": time.perf_counter() - start,
            **versions(),
        }
        write_atomically(path, json.dumps(record, indent=1).encode())
        for folder in (state, state.with_name(f"{state.name}.old")):
            shutil.rmtree(folder, ignore_errors=True)

    def build(self, run: Run) -> nn.Module:
        """The run's model as it is before fine-tuning."""
        torch.manual_seed(run.seed)
        if run.method == "dense":
            return copy.deepcopy(self.dense)
        if run.method == "smaller_images":
            model = self._model(run.image)
            model.load_state_dict(checkpoint_filter_fn(self.dense.state_dict(), model))
            model.patch_embed = nn.Sequential(Smaller(model.patch_embed, run.image))
            return model.eval().to(self.accelerator.device)
        scores = torch.rand_like(self.scores) if run.method == "random_scores" else self.scores
        arguments = {"prune_rate": PRUNE_RATE, **run.plan}
        plan = CompressionPlan.from_scores(scores, self.dense.patch_embed.grid_size, run.keep_rate, **arguments)
        ours = compress(self.dense, plan, **run.compress)
        if run.method not in ("tome", "evit"):
            return ours.eval().to(self.accelerator.device)
        gmacs = count_gmacs(ours, input_size(self.dense))
        merged = list(range(1, 2 * self.dense.patch_embed.num_patches // self.setting.depth))
        make, tried = (tome, merged) if run.method == "tome" else (evit, RATES)
        return matched(make, self.dense, tried, gmacs)[0].eval()

    def measure(self, path: Path, runs: list[Run], rounds: int = 20) -> None:
        """Time the model of every finished run, seeds aside, all in turns, and write the result file."""
        done = [run for run in runs if self._record(run).is_file()]
        device = self.accelerator.device
        size = input_size(self.dense)
        images = torch.randn(self.setting.batch, *size, device=device)
        calls, gmacs = {}, {}
        timed = {run.name: run for run in (Run("dense"), *(replace(run, seed=0) for run in done))}
        for run in timed.values():
            model, given = self.build(run), images
            if run.method == "smaller_images":  # smaller images cost no resizing
                model.patch_embed = model.patch_embed[0].embed
                given = images[..., : run.image, : run.image].contiguous()
            model.eval()
            gmacs[run.name] = count_gmacs(model, tuple(given.shape[1:]))
            calls[run.name] = lambda model=model, given=given: model(given)
        with torch.inference_mode(), self.accelerator.autocast():
            seconds = alternate(calls, rounds, device.type == "cuda")
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        dense = medians[Run("dense").name]
        records = []
        for run in done:
            first = replace(run, seed=0).name
            record = json.loads(self._record(run).read_text(encoding="utf-8"))
            record |= {"name": run.name, "gmacs": gmacs[first], "speedup": dense / medians[first]}
            records.append(record | {"images_per_second": len(images) / medians[first]})
        epochs = json.loads(self._dense_epochs.read_text(encoding="utf-8"))
        facts = {**describe(device.type), "setting": asdict(self.setting), "dense_epochs": epochs}
        results.write(path, facts, records)

    def _model(self, image: int | None = None) -> VisionTransformer:
        torch.manual_seed(0)
        setting = self.setting
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=image or setting.image, patch_size=setting.patch,
            embed_dim=setting.width, depth=setting.depth, num_heads=setting.heads, num_classes=10,
        )  # fmt: skip

    def _loaders(self, seed: int) -> tuple[DataLoader, DataLoader]:
        """Training images cropped, flipped and shuffled by ``seed``, and test images as they are."""
        shared = {"batch_size": self.setting.batch, "workers": 1, "crop_pct": 1.0}
        like = self._model()
        train = make_loader(
            self.train_set, like, **shared, training=True, seed=seed, scale=self.setting.crop_scale, color_jitter=None
        )
        return train, make_loader(self.test_set, like, **shared)

    def _record(self, run: Run) -> Path:
        return self.work / "runs" / f"{run.name.replace(' ', '_')}.json"
