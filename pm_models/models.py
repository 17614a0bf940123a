"""What all models have in common: timm's Vision Transformers and Segmenters, compressed or not."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .adaptive_plan import AdaptivePlan
from .compression import Compression
from .plan import CompressionPlan
from .segmenter import Segmenter
from .vision_transformer import PlainModel, compress

Model = PlainModel | Segmenter


def encoder_of(model: nn.Module) -> Any:
    """The Vision Transformer of a Segmenter; any other model is returned as it is."""
    return model.encoder if isinstance(model, Segmenter) else model


def compression_of(model: nn.Module) -> Compression | None:
    """How a model, or a Segmenter's encoder, is compressed; ``None`` where it is not."""
    return getattr(encoder_of(model), "compression", None)


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of the images that the model takes."""
    encoder = encoder_of(model)
    return (encoder.in_chans, *encoder.patch_embed.img_size)


def tokens_of(model: nn.Module) -> list[int]:
    """The number of tokens that each block runs on, prefix tokens included."""
    if (compression := compression_of(model)) is not None:
        return list(compression.plan.tokens)
    encoder = encoder_of(model)
    return [encoder.patch_embed.num_patches + encoder.num_prefix_tokens] * len(encoder.blocks)


def uncompressed(model: Any) -> Any:
    """A plain model with a copy of the same weights; a model that is not compressed is returned as it is."""
    return model if compression_of(model) is None else model.uncompressed()


def compressed(model: nn.Module, plan: CompressionPlan | AdaptivePlan, **options: Any) -> Model:
    """A compressed copy of a plain model; ``options`` are those of :func:`pm_models.compress`.

    Raises:
        TypeError, ValueError: as :func:`pm_models.compress` does.
    """
    return model.compressed(plan, **options) if isinstance(model, Segmenter) else compress(model, plan, **options)


def frozen(model: Any) -> Any:
    """The model with constant matrices, for serving; other weights are shared. An uncompressed one is returned."""
    encoder = encoder_of(model)
    if compression_of(model) is None:
        return model
    if encoder is not model:
        return model.with_encoder(frozen(encoder))
    constant = copy.copy(model)
    constant._modules = model._modules | {"stages": copy.deepcopy(model.stages)}
    return constant.freeze()


def shared_norm_eps(model: nn.Module) -> float | None:
    """The epsilon that all LayerNorms of a model share; ``None`` where they differ, or there are none."""
    values = {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)}
    return values.pop() if len(values) == 1 else None


def set_norm_eps(model: nn.Module, eps: float | None) -> None:
    """Give every LayerNorm of a model the same epsilon; ``None`` leaves them."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and eps is not None:
            module.eps = eps


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode with all weights frozen; at the end every module and weight is as it was."""
    modes = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, mode in modes.items():
            module.training = mode
