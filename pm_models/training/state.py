"""The state of a run, from which a run killed at any moment continues as if it had not been killed."""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from timm.task.task import TrainingTask
from timm.utils import AverageMeter
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..description import describe
from ..files import write_atomically
from ..vision_transformer import Compressed
from .recipe import EpochResult, Recipe

_PROGRESS = "progress.txt"  # a digest, and JSON after it
_EMA = "ema.safetensors"
_FORMAT = 2
_SHOWN = 4  # differences in one line
_ABSENT = "absent"


@dataclass
class Progress:
    """The progress of a run: the results of its epochs, and the steps of the next one with their averages."""

    results: list[EpochResult] = field(default_factory=list)
    steps: int = 0
    loss: AverageMeter = field(default_factory=AverageMeter)
    top1: AverageMeter = field(default_factory=AverageMeter)

    def to_dict(self) -> dict:
        results = [asdict(result) for result in self.results]
        return {"results": results, "steps": self.steps, "loss": vars(self.loss), "top1": vars(self.top1)}

    @classmethod
    def from_dict(cls, values: dict) -> "Progress":
        progress = cls([EpochResult(**result) for result in values["results"]], values["steps"])
        for name in ("loss", "top1"):
            vars(getattr(progress, name)).update(values[name])
        return progress


class RunState:
    """A folder with everything that a run needs to continue, and the previous state as ``<folder>.old``.

    Args:
        folder: ``None`` saves nothing.
        began: the settings that the run began with, from :func:`run_settings`; other settings are refused.
        task: the task, with the moving average of the weights if there is one.
        accelerator: the accelerator that prepared the model, the optimiser and the loader.
    """

    def __init__(
        self, folder: str | os.PathLike | None, began: dict[str, dict], task: TrainingTask, accelerator: Accelerator
    ) -> None:
        self._folder = None if folder is None else Path(folder)
        self._began, self._task, self._accelerator = began, task, accelerator

    def save(self, progress: Progress) -> None:
        """Write the state beside the previous one, then swap them, so that one of them is intact at every moment.

        Raises:
            OSError: it cannot be written; the previous state is left as it was.
        """
        if self._folder is None:
            return
        accelerator, new, old = self._accelerator, self._beside("new"), self._beside("old")
        if accelerator.is_main_process:
            shutil.rmtree(new, ignore_errors=True)
        accelerator.wait_for_everyone()
        try:
            accelerator.save_state(str(new))
            if accelerator.is_main_process and self._task.has_ema():
                save_model(self._task.trainable_module_ema.module, str(new / _EMA))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                values = {"format": _FORMAT, "began": self._began, "files": _digests(new), **progress.to_dict()}
                content = json.dumps(values, indent=2).encode()
                write_atomically(new / _PROGRESS, f"{hashlib.sha256(content).hexdigest()}\n".encode() + content)
        except (OSError, SafetensorError, RuntimeError) as error:  # torch raises RuntimeError if the disk is full
            shutil.rmtree(new, ignore_errors=True)
            message = f"the state could not be written to {new}; the one before it is untouched: {error}"
            raise OSError(message) from error
        if accelerator.is_main_process:
            if self._folder.exists():
                shutil.rmtree(old, ignore_errors=True)
                self._folder.rename(old)
            new.rename(self._folder)
        accelerator.wait_for_everyone()

    def load(self) -> Progress:
        """Load the newest intact state; without any, the run begins.

        Raises:
            ValueError: the state is from a run with other settings or from another version, or all are damaged.
        """
        if self._folder is None:
            return Progress()
        damaged = []
        for folder in (self._folder, self._beside("old")):
            if not folder.exists():
                continue
            content = _whole(folder)
            if content is None:
                damaged.append(folder)
                continue
            if content.get("format") != _FORMAT:
                raise ValueError(
                    f"{self._folder} holds an unfinished run of another version of pm-vit; finish it with that "
                    "version, or delete it to start anew"
                )
            refuse_other_settings(content["began"], self._began, self._folder)
            if damaged:
                warnings.warn(f"{damaged[0]} is damaged; continuing from {folder}, the state before it", stacklevel=3)
            return self._restore(folder, content)
        if damaged:
            states = " and ".join(map(str, damaged))
            raise ValueError(f"{states} cannot be continued from: damaged; delete it to start anew")
        return Progress()

    def _restore(self, folder: Path, content: dict) -> Progress:
        try:
            self._accelerator.load_state(str(folder))
            if self._task.has_ema():
                load_model(self._task.trainable_module_ema.module, folder / _EMA)
        except Exception as error:  # torch, accelerate and pickle raise a dozen kinds
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{folder} cannot be continued from ({reason}); delete it to start anew") from error
        progress = Progress.from_dict(content)
        where = f"epoch {len(progress.results)}" + (f" and {progress.steps} steps" if progress.steps else "")
        self._accelerator.print(f"continuing after {where} of {self._began['recipe']['epochs']}, from {folder}")
        return progress

    def _beside(self, suffix: str) -> Path:
        return self._folder.with_name(f"{self._folder.name}.{suffix}")


def _whole(folder: Path) -> dict | None:
    """The content of a state's progress file, or ``None`` if any file of the state is not as it was written."""
    try:
        digest, _, content = (folder / _PROGRESS).read_bytes().partition(b"\n")
    except OSError:
        return None
    if digest.decode(errors="replace") != hashlib.sha256(content).hexdigest():
        return None
    values = json.loads(content)
    return values if values["files"] == _digests(folder) else None


def _digests(folder: Path) -> dict[str, str]:
    """The digests of all files of a state except the progress file."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != _PROGRESS:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(2**24):
                    digest.update(chunk)
            digests[str(path.relative_to(folder))] = digest.hexdigest()
    return digests


def run_settings(
    recipe: Recipe, given: Mapping[str, object], task: TrainingTask, loader: DataLoader, accelerator: Accelerator
) -> dict[str, dict[str, object]]:
    """Everything except the images that determines the weights a run ends with, as plain JSON values in groups.

    The number of workers and the device do not count.

    Args:
        recipe: how to train.
        given: further settings from the caller.
        task: the losses, with the model and its teacher, not prepared yet.
        loader: loads the training images, not prepared yet.
        accelerator: knows precision and processes.
    """
    model = task.trainable_module
    dataset, batches = getattr(loader, "dataset", None), getattr(loader, "batch_sampler", None)
    run = {
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "sharded": accelerator.distributed_type == DistributedType.FSDP,
        "images": len(dataset) if hasattr(dataset, "__len__") else None,
        "batch_size": getattr(batches, "batch_size", None),
        "batches": len(loader),
        "sampler": type(getattr(loader, "sampler", None)).__name__,
    }
    parts = {
        f"{name}.plan": f"tokens {part.plan.tokens}, {_digest(part.plan.to_dict())}"
        for name, part in task.named_modules()
        if isinstance(part, Compressed)
    }
    parts = {name.removeprefix("trainable_module."): value for name, value in (parts | describe(task)).items()}
    parts["task"] = parts.pop("model")
    inside = {id(parameter) for parameter in model.parameters()}
    parts["teacher.weights"] = _digest(*(value for value in task.parameters() if id(value) not in inside))
    weights = {name: _kind(parameter) for name, parameter in model.named_parameters()}
    groups = {"recipe": asdict(recipe), "settings": given, "run": run, "weights": weights, "parts": parts}
    return {name: flat_settings(values) for name, values in groups.items()}


def refuse_other_settings(began: dict[str, dict], now: dict[str, dict], folder: Path) -> None:
    """Refuse to continue the run in ``folder`` with other settings than it began with; both come in groups.

    Attributes of parts that only one of them has are ignored, because versions of timm differ in these.

    Raises:
        ValueError: the settings differ; the message gives their old and new values.
    """
    different: dict[str, tuple[str, str]] = {}  # what it was, and what it is
    for group, values in now.items():
        before = began.get(group, {})
        for name in [name for name in values if name in before] if group == "parts" else values | before:
            was, is_ = before.get(name, _ABSENT), values.get(name, _ABSENT)
            if was != is_:
                different.setdefault(name, (_short(was), _short(is_)))
    if not different:
        return
    shown = dict(list(different.items())[:_SHOWN])
    before = ", ".join(f"{name}={was}" for name, (was, _) in shown.items())
    changes = ", ".join(f"{name} {was} -> {is_}" for name, (was, is_) in shown.items())
    more = f", and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
    raise ValueError(
        f"{folder} holds an unfinished run that began with {before}; continue it with that, or choose another output "
        f"folder ({changes}{more})"
    )


def flat_settings(values: Mapping[str, object]) -> dict[str, object]:
    """Settings in the form in which they are read back: JSON values, with nested ones as ``model_kwargs.depth``."""
    return json.loads(json.dumps(_flat(values), default=str))


def _flat(values: Mapping, prefix: str = "") -> dict[str, object]:
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _kind(parameter: nn.Parameter) -> str:
    frozen = "" if parameter.requires_grad else ", frozen"
    return f"{str(parameter.dtype).removeprefix('torch.')} {tuple(parameter.shape)}{frozen}"


def _digest(*values: object) -> str | None:
    """A short digest of tensors or JSON values; ``None`` if there are none."""
    if not values:
        return None
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        else:
            digest.update(json.dumps(value).encode())
    return digest.hexdigest()[:12]
