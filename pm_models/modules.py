"""Inspect and replace modules without changing what they compute."""

from typing import Any, TypeVar

from torch import nn
from torch.nn.modules import module as registry
from torch.utils.module_tracker import ModuleTracker

M = TypeVar("M", bound=nn.Module)


def is_touched(*modules: nn.Module) -> bool:
    """Whether a call of any does more than its class's forward: a hook, also a global one, or another ``forward``."""
    for module in modules:
        own = vars(module)
        if (
            own["_forward_pre_hooks"]
            or own["_forward_hooks"]
            or own["_backward_pre_hooks"]
            or own["_backward_hooks"]
            or "forward" in own
            or own.get("_compiled_call_impl")
        ):
            return True
    return registry._has_any_global_hook() and _has_global_hook()


def _has_global_hook() -> bool:
    """Whether there are hooks on all modules, other than those of torch's FLOP counter."""
    kinds = (
        registry._global_forward_pre_hooks,
        registry._global_forward_hooks,
        registry._global_backward_pre_hooks,
        registry._global_backward_hooks,
    )
    hooks = (hook for kind in kinds for hook in kind.values())
    return any(not isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule ``name`` (dotted) of ``root`` by ``module``."""
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)


def as_class(module: nn.Module, kind: type[M]) -> M:
    """The module as an instance of another class; attributes, parameters and submodules are shared."""
    other = kind.__new__(kind)
    other.__dict__.update(module.__dict__)
    return other


class Rewired:
    """A stand-in for a module with some attributes replaced; all others are the module's.

    ``Block.forward(Rewired(block, attn=function), x)`` runs timm's forward with ``function`` instead of ``block.attn``;
    the block itself does not change.
    """

    def __init__(self, module: nn.Module, **replaced: object) -> None:
        self._module = module
        for name, value in replaced.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
