"""Vision Transformers of other libraries as timm's, with the same weights: torchvision's and Hugging Face's."""

import itertools
import re
from collections.abc import Callable
from typing import NamedTuple

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .segmenter import set_norm_eps
from .unwrapping import unwrapped

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}

# Names of weights elsewhere, as patterns, and timm's. Hugging Face renamed some with version 5.
_TORCHVISION_NAMES = (
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
)
_TRANSFORMERS_NAMES = (
    (r"^(vit|dinov2|dinov2_with_registers)\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(encoder\.layer|layers)\.(\d+)\.", r"blocks.\2."),
    (r"\.attention\.(attention\.)?(q|k|v)(_proj|uery|ey|alue)\.", r".attn.\2."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.(layernorm_before)\.", ".norm1."),
    (r"\.(layernorm_after)\.", ".norm2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.(intermediate\.dense|mlp\.weights_in)\.", ".mlp.fc1."),
    (r"\.(output\.dense|mlp\.weights_out|mlp\.down_proj)\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)
_LEFT_OUT = re.compile(r"^(pooler\.|embeddings\.mask_token$)")  # nothing that timm's forward reads


class _Description(NamedTuple):
    name: str  # of timm's
    arguments: dict[str, object]
    weights: dict[str, Tensor]
    norm_eps: float
    features: Callable[[Tensor], Tensor]  # what the given model computes: logits, or normalised tokens


def to_timm(model: nn.Module) -> VisionTransformer:
    """A timm VisionTransformer with a copy of the weights of another library's, which computes the same.

    Takes torchvision's ``VisionTransformer``, whose attention is ``nn.MultiheadAttention``, and Hugging Face's
    ``ViTModel``, ``ViTForImageClassification``, ``Dinov2Model`` and ``Dinov2WithRegistersModel``. Models without a head
    become timm models of ``num_classes=0``, whose ``forward_features`` gives the last hidden state; a pooler is left
    out. Images have the size that the given model was made for.

    Args:
        model: it is left as it was. Of a wrapper (``torch.compile``, accelerate, ...), the model inside is taken.

    Returns:
        The model on the same device, in the same dtype, in evaluation mode. It was run beside the given one.

    Raises:
        TypeError: the model is of another class.
        ValueError: it has a part that timm's has not, or the two do not compute the same.
    """
    model = unwrapped(model)
    config = getattr(model, "config", None)
    if type(model).__module__.startswith("torchvision.") and type(model).__name__ == "VisionTransformer":
        found = _describe_torchvision(model)
    elif getattr(config, "model_type", None) in ("vit", "dinov2", "dinov2_with_registers"):
        found = _describe_transformers(model, config)
    else:
        raise TypeError(
            "model must be torchvision's VisionTransformer, or Hugging Face's ViTModel, ViTForImageClassification, "
            f"Dinov2Model or Dinov2WithRegistersModel, got {type(model).__name__}"
        )
    like = next(model.parameters())
    converted = timm.create_model(found.name, **found.arguments).eval()
    set_norm_eps(converted, found.norm_eps)
    try:
        converted.load_state_dict(found.weights)
    except RuntimeError as error:
        raise ValueError(f"{type(model).__name__} has other parts than timm's {found.name}: {error}") from error
    converted.to(like)
    _check_same(model, converted, found)
    return converted


def _describe_torchvision(model: nn.Module) -> _Description:
    if model.heads is not None and not hasattr(model.heads, "head"):
        raise ValueError("model has no head of the name heads.head; take it as torchvision makes it")
    if hasattr(model.heads, "pre_logits"):
        raise ValueError("model has a layer before its head (representation_size), which timm's has not")
    weights = _renamed(model.state_dict(), _TORCHVISION_NAMES)
    block = model.encoder.layers[0]
    arguments = {
        "img_size": model.image_size,
        "patch_size": model.patch_size,
        "in_chans": model.conv_proj.in_channels,
        "num_classes": len(weights["head.weight"]) if "head.weight" in weights else 0,
        "embed_dim": model.hidden_dim,
        "depth": len(model.encoder.layers),
        "num_heads": block.num_heads,
        "mlp_ratio": _ratio(model.mlp_dim, model.hidden_dim),
    }
    return _Description("vit_base_patch16_224", arguments, weights, block.ln_1.eps, model)


def _describe_transformers(model: nn.Module, config: object) -> _Description:
    weights = _renamed(model.state_dict(), _TRANSFORMERS_NAMES)
    _pack_projections(weights, config.num_hidden_layers)
    if config.hidden_act not in _ACTIVATIONS:
        raise ValueError(f"model has hidden_act {config.hidden_act!r}, expected one of {', '.join(_ACTIVATIONS)}")
    width = config.hidden_size
    arguments = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.num_channels,
        "num_classes": len(weights["head.weight"]) if "head.weight" in weights else 0,
        "embed_dim": width,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": _ratio(len(weights["blocks.0.mlp.fc1.weight"]), width),
        "qkv_bias": config.qkv_bias,
    }
    name = "vit_base_patch16_224"
    if config.model_type != "vit":
        if weights.get("head.weight", torch.empty(0, width)).shape[1] != width:
            raise ValueError("model's classifier reads more than its class token; give its backbone, model.dinov2")
        gated = config.use_swiglu_ffn
        name = "vit_giant_patch14_dinov2" if gated else "vit_base_patch14_dinov2"
        if "reg_token" in weights:
            name = "vit_giant_patch14_reg4_dinov2" if gated else "vit_base_patch14_reg4_dinov2"
            arguments["reg_tokens"] = weights["reg_token"].shape[1]
            # timm adds the class token's position to the class token itself.
            position, weights["pos_embed"] = weights["pos_embed"][:, :1], weights["pos_embed"][:, 1:]
            weights["cls_token"] = weights["cls_token"] + position
    if name.startswith("vit_base"):
        arguments["act_layer"] = _ACTIVATIONS[config.hidden_act]

    def features(images: Tensor) -> Tensor:
        found = model(pixel_values=images)
        return found.logits if "head.weight" in weights else found.last_hidden_state

    return _Description(name, arguments, weights, config.layer_norm_eps, features)


def _renamed(weights: dict[str, Tensor], names: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in weights.items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        if not _LEFT_OUT.match(name):
            renamed[name] = value
    return renamed


def _pack_projections(weights: dict[str, Tensor], depth: int) -> None:
    """Queries', keys' and values' projections as one, and a gated MLP's two, in place."""
    packed = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.fc1": ("mlp.gate_proj", "mlp.up_proj")}
    for block, (whole, parts), kind in itertools.product(range(depth), packed.items(), ("weight", "bias")):
        names = [f"blocks.{block}.{part}.{kind}" for part in parts]
        if names[0] in weights:
            weights[f"blocks.{block}.{whole}.{kind}"] = torch.cat([weights.pop(name) for name in names])


def _ratio(hidden: int, width: int) -> float:
    """The ``mlp_ratio`` of which timm makes ``hidden``."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _check_same(model: nn.Module, converted: VisionTransformer, found: _Description) -> None:
    like = next(model.parameters())
    shape = (2, converted.patch_embed.proj.in_channels, *converted.patch_embed.img_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            expected = found.features(images)
            actual = converted(images) if converted.num_classes else converted.forward_features(images)
    finally:
        model.train(training)
    greatest = expected.abs().max().clamp_min(torch.finfo(like.dtype).tiny)  # a new head gives zeros
    error = ((actual - expected).abs().max() / greatest).item()
    if not error <= torch.finfo(like.dtype).eps ** 0.5:
        raise ValueError(
            f"{type(model).__name__} computes something else than timm's {found.name} with its weights: they differ by "
            f"{error:.2g} of the greatest value"
        )
