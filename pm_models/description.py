"""What a model is but for its weights."""

from torch import nn

# Attributes that say how a model is being used, not what it is.
_TRANSIENT = {"training", "grad_checkpointing", "fused_attn", "weight_init_mode", "distilled_training"}


def describe(model: nn.Module) -> dict[str, object]:
    """The class, and the plain attributes, of every module in a model, by their names."""
    described: dict[str, object] = {}
    for name, module in model.named_modules():
        described[name or "model"] = type(module).__name__
        for attribute, value in vars(module).items():
            if not attribute.startswith("_") and attribute not in _TRANSIENT and _is_plain(value):
                described[f"{name}.{attribute}".lstrip(".")] = value
    return described


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
