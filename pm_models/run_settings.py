"""What decides the course of a training run, written down: it is continued with just that, or refused in one line."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from timm.task.task import TrainingTask
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .description import describe
from .vision_transformer import Compressed

_SHOWN = 4  # differences in one line
_ABSENT = "absent"


def run_settings(
    recipe: Mapping[str, object],
    given: Mapping[str, object],
    task: TrainingTask,
    loader: DataLoader,
    accelerator: Accelerator,
) -> dict[str, dict[str, object]]:
    """All that decides which weights a run ends with, but for the images themselves, as plain JSON values in groups.

    How many workers load images, and which device computes, decide nothing.

    Args:
        recipe: how to train.
        given: what the caller knows beside it.
        task: the losses, with the model and its teacher, before they are prepared.
        loader: of the training images, before it is prepared.
        accelerator: precision and processes.
    """
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
    plans = {
        f"{name}.plan".removeprefix("trainable_module."): f"tokens {part.plan.tokens}, {_digest(part.plan.to_dict())}"
        for name, part in task.named_modules()
        if isinstance(part, Compressed)
    }
    parts = {name.removeprefix("trainable_module."): value for name, value in describe(task).items()}
    parts["task"] = parts.pop("model")
    parts["teacher.weights"] = _digest(*_outside(task, task.trainable_module))
    weights = {name: _kind(value) for name, value in task.trainable_module.named_parameters()}
    groups = {"recipe": recipe, "settings": given, "run": run, "weights": weights, "parts": plans | parts}
    return {name: flat_settings(values) for name, values in groups.items()}


def refuse_other_settings(began: dict[str, dict], now: dict[str, dict], folder: Path) -> None:
    """Refuse to continue what is in ``folder`` with other settings than it began with, both in groups.

    A part's attribute that only one of them has, as versions of timm differ in these, is passed over.

    Raises:
        ValueError: naming what differs, what it was and what it is.
    """
    different = {}
    for group, values in now.items():
        before = began.get(group, {})
        names = [name for name in values if name in before] if group == "parts" else values | before
        for name in names:
            pair = before.get(name, _ABSENT), values.get(name, _ABSENT)
            if pair[0] != pair[1]:
                different.setdefault(name, tuple(map(_short, pair)))
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
    """Settings as they are when they are read again: values of JSON, mappings in them by ``model_kwargs.depth``."""
    return json.loads(json.dumps(_flat(values), default=str))


def _flat(values: Mapping, prefix: str = "") -> dict[str, object]:
    found = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _kind(parameter: nn.Parameter) -> str:
    frozen = "" if parameter.requires_grad else ", frozen"
    return f"{str(parameter.dtype).removeprefix('torch.')} {tuple(parameter.shape)}{frozen}"


def _outside(task: nn.Module, model: nn.Module) -> list[Tensor]:
    """The task's parameters that are not the model's: those of a teacher."""
    inside = {id(parameter) for parameter in model.parameters()}
    return [parameter for parameter in task.parameters() if id(parameter) not in inside]


def _digest(*values: object) -> str | None:
    """A few letters that tell tensors, or values of JSON, from others; ``None`` for none."""
    if not values:
        return None
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        else:
            digest.update(json.dumps(value).encode())
    return digest.hexdigest()[:12]
