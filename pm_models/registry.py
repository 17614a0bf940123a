"""timm's names for compressed models: ``pm_deit_small_patch16_224`` is ``deit_small_patch16_224`` with a plan."""

import os
from collections.abc import Callable

import timm
from timm.models import model_entrypoint, register_model
from timm.models.vision_transformer import VisionTransformer

from .plan import CompressionPlan
from .vision_transformer import PMVisionTransformer, compress

_PREFIX = "pm_"
_TIMM_MODULES = ("vision_transformer", "deit")


def register_models() -> None:
    """Register ``pm_<name>`` for every plain Vision Transformer that timm knows, once.

    ``timm.create_model("pm_<name>", plan=..., **arguments)`` makes timm's model, with its own arguments, and compresses
    it; see :func:`pm_models.compress` for ``train_matrices``, ``size_bias``, ``merge_site`` and ``shortcut``. ``plan``
    is a :class:`~pm_models.CompressionPlan`, its dict, or the path of a file that it was saved to.
    """
    known = set(timm.list_models(f"{_PREFIX}*"))
    for module in _TIMM_MODULES:
        for name in timm.list_models(module=module):
            if f"{_PREFIX}{name}" not in known:
                register_model(_entrypoint(name))


def _entrypoint(name: str) -> Callable[..., PMVisionTransformer]:
    make: Callable[..., VisionTransformer] = model_entrypoint(name)

    def entrypoint(
        pretrained: bool = False,
        *,
        plan: CompressionPlan | dict | str | os.PathLike | None = None,
        train_matrices: str | None = "support",
        size_bias: bool = False,
        merge_site: str = "block",
        shortcut: str = "pruned",
        **arguments: object,
    ) -> PMVisionTransformer:
        if plan is None:
            raise ValueError(
                f"{_PREFIX}{name} needs plan=, a CompressionPlan, its dict, or the path of a file that it was saved to"
            )
        model = make(pretrained=pretrained, **arguments)
        return compress(
            model,
            _plan(plan),
            train_matrices=train_matrices,
            size_bias=size_bias,
            merge_site=merge_site,
            shortcut=shortcut,
        )

    entrypoint.__name__ = entrypoint.__qualname__ = f"{_PREFIX}{name}"
    entrypoint.__doc__ = f"``{name}`` of timm, compressed by ``plan``."
    return entrypoint


def _plan(plan: CompressionPlan | dict | str | os.PathLike) -> CompressionPlan:
    if isinstance(plan, (str, os.PathLike)):
        return CompressionPlan.load(plan)
    return CompressionPlan.from_dict(plan) if isinstance(plan, dict) else plan
