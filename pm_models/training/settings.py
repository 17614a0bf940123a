"""What decides the course of a training run, written down: it is continued with just that, or refused in one line."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from timm.task.task import TrainingTask
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..description import describe
from ..vision_transformer import Compressed
from .recipe import Recipe

_SHOWN = 4  # differences in one line
_ABSENT = "absent"


def run_settings(
    recipe: Recipe,
    given: Mapping[str, object],
    task: TrainingTask,
    loader: DataLoader,
    accelerator: Accelerator,
) -> dict[str, dict[str, object]]:
    """All that decides which weights a run ends with, except for the images, as plain JSON values in groups.

    How many workers load images, and which device computes, decide nothing.

    Args:
        recipe: how to train.
        given: what else the caller knows.
        task: the losses, with the model and its teacher, before they are prepared.
        loader: of the training images, before it is prepared.
        accelerator: precision and processes.
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
    """Refuse to continue what is in ``folder`` with other settings than it began with; both are in groups.

    An attribute of a part that only one of them has is passed over, because versions of timm differ in these.

    Raises:
        ValueError: naming what differs, what it was and what it is.
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
    """Settings as they are when they are read again: values of JSON, mappings in them by ``model_kwargs.depth``."""
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
