"""One study: a dense model, every run made of it, and the file with their accuracies and speeds."""

import copy
import json
import shutil
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.task.task import TrainingTask
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from pm_models import AdaptivePlan, CompressionPlan, load_pretrained, save_pretrained, score_tokens
from pm_models.files import write_atomically
from pm_models.measure import alternate, count_gmacs
from pm_models.models import compressed, encoder_of, input_size
from pm_models.training import Recipe, fit, make_accelerator

from .. import results
from ..machine import describe, versions
from .runs import OURS, PRUNE_RATE, Run, Setting
from .scoring import attention_received, evenly_spread

RECOVERY_STEPS = 100  # after so many the state of a training is kept, within its epochs too


class Part(Subset):
    """Some images of a data set; the transform is the data set's."""

    transform = property(
        lambda self: self.dataset.transform, lambda self, transform: setattr(self.dataset, "transform", transform)
    )


def part(dataset: Dataset, images: int | None) -> Dataset:
    """So many images, evenly over the data set; ``None``: all."""
    return dataset if images is None else Part(dataset, [index * len(dataset) // images for index in range(images)])


def forget(state: Path) -> None:
    """Remove the state of a finished training, and the one before it."""
    for folder in (state, state.with_name(f"{state.name}.old")):
        shutil.rmtree(folder, ignore_errors=True)


class Study(ABC):
    """The dense model of ``setting`` trained on some data, and the runs made of it.

    ``work`` holds the dense model, the state of an unfinished run, and one file for each finished run.
    """

    quality: str  # what of an evaluation is the accuracy
    follows_test: bool  # whether the evaluation after an epoch is of all test images
    workers = 1  # processes that load images
    make_scoring_loader: Callable[..., DataLoader]
    train_set: Dataset

    def __init__(self, setting: Setting, work: Path, device: str, encoder: VisionTransformer | None = None) -> None:
        self.setting, self.work = setting, work
        self.encoder = encoder  # to start from; a random one where there is none
        self._dense_epochs = work / "dense_epochs.json"
        self.accelerator = make_accelerator(mixed_precision="bf16", cpu=device == "cpu")

    @abstractmethod
    def new_model(self) -> nn.Module:
        """The dense model before training."""

    @abstractmethod
    def loaders(self, seed: int, images: int | None = None) -> tuple[DataLoader, DataLoader]:
        """All training images, or so many, augmented and shuffled by ``seed``, and images to follow the training by."""

    @abstractmethod
    def test_loader(self) -> DataLoader: ...

    @abstractmethod
    def task(self, model: nn.Module, teacher: nn.Module | None) -> TrainingTask:
        """Of training from scratch, or of fine-tuning."""

    @abstractmethod
    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """What tokens are scored by."""

    @abstractmethod
    def evaluate(self, model: nn.Module, loader: DataLoader, *, accelerator: object) -> Mapping[str, float]: ...

    @abstractmethod
    def peer(self, run: Run) -> nn.Module:
        """The model of a method that is not ours."""

    def scoring_loader(self) -> DataLoader:
        """Training images as they are evaluated."""
        return self.make_scoring_loader(
            self.train_set,
            self.dense,
            batches=self.setting.score_batches,
            batch_size=self.setting.batch,
            workers=self.workers,
            seed=0,
        )

    def timed(self, run: Run, images: Tensor) -> tuple[nn.Module, Tensor]:
        """The run's model as it is timed, and its share of the images' pixels."""
        return self.build(run).eval(), images

    def facts(self, model: nn.Module) -> dict[str, object]:
        """More to write down of a run's model."""
        return {}

    def finished(self, run: Run, model: nn.Module) -> None:  # noqa: B027 - most studies do nothing
        """Called with each fine-tuned model, before it is forgotten."""

    def draw(self, path: Path) -> None:  # noqa: B027
        """Draw pictures, where there are any, beside the result file at ``path``."""

    @cached_property
    def dense(self) -> nn.Module:
        """The trained dense model; trained now if it was not yet."""
        folder = self.work / "dense"
        if not (folder / "config.json").is_file():
            recipe = Recipe(
                epochs=self.setting.epochs,
                lr=self.setting.lr,
                weight_decay=self.setting.weight_decay,
                warmup_epochs=self.setting.warmup_epochs,
                layer_decay=self.setting.layer_decay,
            )
            task = self.task(self.new_model(), None)
            epochs = self._fit(task, 0, recipe, self.work / "dense_state")
            write_atomically(self._dense_epochs, json.dumps([asdict(epoch) for epoch in epochs]).encode())
            save_pretrained(task.trainable_module.eval().cpu(), folder)
        return load_pretrained(folder).eval().to(self.accelerator.device)

    @cached_property
    def scores(self) -> Tensor:
        """(L, patches), kept beside the dense model."""
        path = self.work / "scores.pt"
        if not path.is_file():
            batches = self.setting.score_batches
            torch.save(score_tokens(self.dense, self.scoring_loader(), batches=batches, loss_fn=self.loss), path)
        return torch.load(path, weights_only=True)

    def test(self, run: Run) -> None:
        """Measure the run's model with no training; nothing where this was done before."""
        if not self._record(run).is_file():
            before = self._tested(self.build(run))
            print(f"{run.name}: {before:.2f}% before fine-tuning", flush=True)
            self._write(run, {**asdict(run), f"{self.quality}_before": before, **versions()})

    def do(self, run: Run) -> None:
        """Measure, fine-tune, measure; nothing where this was done before."""
        self.test(run)
        record = self._read(run)
        if self.quality in record:
            return
        print(f"== {run.name}", flush=True)
        recipe = Recipe(
            epochs=self.setting.tune_epochs,
            lr=self.setting.tune_lr,
            weight_decay=1e-3,
            layer_decay=self.setting.layer_decay,
            seed=run.seed,
        )
        state, start = self.work / f"{self._record(run).stem}_state", time.perf_counter()
        task = self.task(self.build(run), copy.deepcopy(self.dense))
        epochs = self._fit(task, run.seed, recipe, state, self.setting.tune_images)
        tuned = task.trainable_module.eval()
        self.finished(run, tuned)
        tested = getattr(epochs[-1], self.quality) if self.follows_test else self._tested(tuned)
        after = {self.quality: tested, "epochs": [asdict(epoch) for epoch in epochs]}
        self._write(run, record | after | {"seconds": time.perf_counter() - start, **versions()})
        forget(state)

    def build(self, run: Run) -> nn.Module:
        """The run's model as it is before fine-tuning."""
        torch.manual_seed(run.seed)
        if run.method == "dense":
            return copy.deepcopy(self.dense)
        if run.method == "adaptive":
            share = self.gmacs(run) / count_gmacs(self.dense, input_size(self.dense))
            plan = AdaptivePlan.for_model(self.dense, share)
            return compressed(self.dense, plan).eval().to(self.accelerator.device)
        if run.method in OURS:
            return compressed(self.dense, self.plan(run), **run.compress).eval().to(self.accelerator.device)
        return self.peer(run).eval().to(self.accelerator.device)

    def plan(self, run: Run) -> CompressionPlan:
        """The plan of a run, or of ``prune_and_merge`` at its keep rate."""
        encoder = encoder_of(self.dense)
        grid = encoder.patch_embed.grid_size
        if run.method == "random_scores":
            scores = torch.rand_like(self.scores)
        elif run.method == "attention_scores":
            scores = attention_received(encoder, self.scoring_loader(), self.setting.score_batches)
        elif run.method == "even_scores":
            scores = evenly_spread(len(encoder.blocks), grid)
        else:
            scores = self.scores
        return CompressionPlan.from_scores(scores, grid, run.keep_rate, **{"prune_rate": PRUNE_RATE, **run.plan})

    def gmacs(self, run: Run) -> float:
        """Those of ``prune_and_merge`` at the run's keep rate."""
        return count_gmacs(compressed(self.dense, self.plan(run)), input_size(self.dense))

    def measure(self, path: Path, runs: list[Run], rounds: int | None = None) -> None:
        """Time the model of every finished run, seeds aside, all in turns, and write the result file."""
        done = [run for run in runs if self._record(run).is_file()]
        device = self.accelerator.device
        images = torch.randn(self.setting.batch, *input_size(self.dense), device=device)
        calls, found = {}, {}
        timed = {run.name: run for run in (Run("dense"), *(replace(run, seed=0) for run in done))}
        for run in timed.values():
            model, given = self.timed(run, images)
            found[run.name] = {"gmacs": count_gmacs(model, tuple(given.shape[1:])), **self.facts(model)}
            calls[run.name] = lambda model=model, given=given: model(given)
        with torch.inference_mode(), self.accelerator.autocast():
            seconds = alternate(calls, rounds or self.setting.rounds, device.type == "cuda")
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        dense = medians[Run("dense").name]
        records = []
        for run in done:
            first = replace(run, seed=0).name
            record = self._read(run) | {"name": run.name, **found[first], "speedup": dense / medians[first]}
            records.append(record | {"images_per_second": len(images) / medians[first]})
        epochs = json.loads(self._dense_epochs.read_text(encoding="utf-8"))
        facts = {**describe(device.type), "setting": asdict(self.setting), "dense_epochs": epochs}
        results.write(path, facts, records)
        self.draw(path)

    def _fit(self, task: TrainingTask, seed: int, recipe: Recipe, state: Path, images: int | None = None) -> list:
        return fit(
            task,
            *self.loaders(seed, images),
            recipe,
            accelerator=self.accelerator,
            state_dir=state,
            evaluator=self.evaluate,
            recovery_interval=RECOVERY_STEPS,
        )

    def _tested(self, model: nn.Module) -> float:
        return self.evaluate(model, self.test_loader(), accelerator=self.accelerator)[self.quality]

    def _record(self, run: Run) -> Path:
        return self.work / "runs" / f"{run.name.replace(' ', '_')}.json"

    def _read(self, run: Run) -> dict:
        return json.loads(self._record(run).read_text(encoding="utf-8"))

    def _write(self, run: Run, record: dict) -> None:
        write_atomically(self._record(run), json.dumps(record, indent=1).encode())
