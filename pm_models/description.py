"""Describe everything about a model except its weights."""

from dataclasses import fields, is_dataclass

from torch import nn

# Attributes that depend on how a model is used, not on what it is.
_TRANSIENT = {"training", "grad_checkpointing", "fused_attn", "weight_init_mode", "distilled_training"}


def describe(model: nn.Module) -> dict[str, object]:
    """The class and the plain attributes of every module of a model, by name."""
    described: dict[str, object] = {}
    for name, module in model.named_modules():
        described[name or "model"] = type(module).__name__
        for attribute, value in vars(module).items():
            options = {attribute: value}
            if is_dataclass(value):
                options = {field.name: getattr(value, field.name) for field in fields(value)}
            for option, value in options.items():
                if not option.startswith("_") and option not in _TRANSIENT and _is_plain(value):
                    described[f"{name}.{option}".lstrip(".")] = value
    return described


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
