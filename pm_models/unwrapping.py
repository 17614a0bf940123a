"""The model inside a wrapper that compiles it, runs it on several devices or averages its weights."""

import copy
from typing import Any

from timm.utils import unwrap_model
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def unwrapped(model: nn.Module) -> Any:
    """The model inside ``torch.compile``, DataParallel, DistributedDataParallel or ``accelerator.prepare``.

    The given model is left as it was. The result shares its modules and parameters.

    Raises:
        TypeError: it is not a module, a part of it is wrapped on its own, or its weights are sharded (FSDP).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()) or any(
        hasattr(parameter, "full_tensor") for parameter in model.parameters()
    ):
        raise TypeError(
            "model has its weights sharded over processes (FSDP); pass a model that has loaded all of them, as "
            "accelerator.get_state_dict gathers them"
        )
    model = unwrap_model(model)
    forward = vars(model).get("forward")
    if "_original_forward" in vars(model) or getattr(forward, "__func__", None) is type(model).forward:
        # accelerate sets a forward on this very object, first with autocast, later the class's own. A model that takes
        # over the object's attributes would still run it. A second object without it can share all the rest.
        model = copy.copy(model)
        for name in ("forward", "_original_forward"):
            vars(model).pop(name, None)
    for name, module in model.named_modules():
        if isinstance(module, DataParallel | DistributedDataParallel) or hasattr(module, "_orig_mod"):
            raise TypeError(
                f"model has a part, {name}, that is a {type(module).__name__}; pass the model unwrapped, or "
                "wrapped as a whole"
            )
    return model
