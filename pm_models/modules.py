"""Modules looked at, and put in the place of others, without changing what they compute."""

from typing import Any, TypeVar

from torch import nn
from torch.nn.modules import module as registry
from torch.utils.module_tracker import ModuleTracker

M = TypeVar("M", bound=nn.Module)


def is_touched(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's forward: a hook, global ones too, or another forward."""
    own = vars(module)
    return bool(
        own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_pre_hooks"]
        or own["_backward_hooks"]
        or "forward" in own
        or own.get("_compiled_call_impl")
        or (registry._has_any_global_hook() and _has_global_hook())
    )


def _has_global_hook() -> bool:
    """Whether a hook is on all modules, but for those by which torch's FLOP counter follows what really runs."""
    kinds = (
        registry._global_forward_pre_hooks,
        registry._global_forward_hooks,
        registry._global_backward_pre_hooks,
        registry._global_backward_hooks,
    )
    hooks = (hook for kind in kinds for hook in kind.values())
    return any(not isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of ``root``'s submodule ``name`` (dotted)."""
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)


def as_class(module: nn.Module, kind: type[M]) -> M:
    """A module of another class with all that the module has, which it shares."""
    other = kind.__new__(kind)
    other.__dict__.update(module.__dict__)
    return other


class Rewired:
    """A module as one of its class's methods sees it, with other attributes: everything else is the module's.

    ``Block.forward(Rewired(block, attn=function), x)`` runs timm's forward with ``function`` in the place of
    ``block.attn``; the block itself does not change.
    """

    def __init__(self, module: nn.Module, **replaced: object) -> None:
        self._module = module
        for name, value in replaced.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
