"""Names for compressed models in timm's registry: ``pm_deit_small_patch16_224`` is the model with a plan."""

import os
from collections.abc import Callable, Sequence

import timm
import torch
from timm.models import load_pretrained, model_entrypoint, register_model
from timm.models._builder import pretrained_cfg_for_features
from timm.models._features import FeatureGetterNet
from torch import nn

from .adaptive_plan import AdaptivePlan
from .compression import OPTIONS, plan_from
from .plan import CompressionPlan
from .vision_transformer import Compressed, PlainModel, compress

PREFIX = "pm_"
_TIMM_MODULES = ("vision_transformer", "deit", "eva")


def register_models() -> None:
    """Register ``pm_<name>`` for every Vision Transformer of timm that can be compressed, once.

    ``timm.create_model("pm_<name>", plan=..., **arguments)`` makes timm's model, with its own arguments, and compresses
    it; the options of :func:`pm_models.compress` go with them. ``plan`` is a :class:`~pm_models.CompressionPlan` or
    an :class:`~pm_models.AdaptivePlan`, its dict, or the path of a file that it was saved to.
    """
    known = set(timm.list_models(f"{PREFIX}*"))
    for module in _TIMM_MODULES:
        for name in timm.list_models(module=module):
            if f"{PREFIX}{name}" not in known:
                register_model(_entrypoint(name))


def registered_name(architecture: str) -> str:
    """``pm_<architecture>``, registered now if a user added the architecture to timm after our registration."""
    name = architecture if architecture.startswith(PREFIX) else f"{PREFIX}{architecture}"
    if not timm.is_model(name) and timm.is_model(name.removeprefix(PREFIX)):
        register_model(_entrypoint(name.removeprefix(PREFIX)))
    return name


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    make: Callable[..., PlainModel] = model_entrypoint(name)

    def entrypoint(
        pretrained: bool = False,
        *,
        plan: CompressionPlan | AdaptivePlan | dict | str | os.PathLike | None = None,
        **arguments: object,
    ) -> Compressed | FeatureGetterNet:
        if plan is None:
            raise ValueError(
                f"{PREFIX}{name} needs plan=, a CompressionPlan, its dict, or the path of a file that it was saved to"
            )
        options = {name: arguments.pop(name) for name in OPTIONS if name in arguments}
        features, wanted = arguments.pop("features_only", False), arguments.pop("out_indices", 3)
        if arguments.pop("feature_cls", "getter") != "getter":
            raise ValueError("feature_cls must be 'getter': maps of all patches come only from forward_intermediates")
        # A folder or hub entry of a compressed model holds its weights, not those of the uncompressed model.
        compressed = "plan" in (arguments.get("pretrained_model_args") or {})
        model = make(pretrained=pretrained and not compressed, **arguments)
        # A device that the caller has set (such as meta) is meant for weights; the plan's tensors stay on the CPU.
        with torch.device("cpu"):
            model = compress(model, plan_from(plan), **options)
        if pretrained and compressed:
            in_chans = model.patch_embed.proj.in_channels
            load_pretrained(model, model.pretrained_cfg, num_classes=model.num_classes, in_chans=in_chans)
        return _features(model, wanted) if features else model

    entrypoint.__name__ = entrypoint.__qualname__ = f"{PREFIX}{name}"
    entrypoint.__doc__ = f"``{name}`` of timm, compressed by ``plan``."
    return entrypoint


def _features(model: Compressed, out_indices: int | Sequence[int]) -> FeatureGetterNet:
    """timm's ``features_only=True``: images to the maps after some blocks."""
    net = FeatureGetterNet(model, out_indices)
    net.in_chans = model.patch_embed.proj.in_channels
    net.pretrained_cfg = net.default_cfg = pretrained_cfg_for_features(model.pretrained_cfg)
    return net
