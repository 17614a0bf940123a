"""Vision Transformers of other libraries as timm's, with the same weights: torchvision's and Hugging Face's."""

import itertools
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn

from .segmenter import set_norm_eps
from .unwrapping import unwrapped
from .vision_transformer import PlainModel
from .weights import cause, differences

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
)
_TRANSFORMERS_NAMES = (
    (r"^(vit|deit|dinov2|dinov2_with_registers|vision_model)\.", ""),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.attention\.in_proj_", "attn_pool.qkv."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
    (r"^embeddings\.(cls_token|class_embedding)$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.(position_embeddings|position_embedding\.weight)$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.patch_embeddings?\.(projection\.)?", "patch_embed.proj."),
    (r"^(encoder\.|model\.)?layers?\.(\d+)\.", r"blocks.\2."),
    (r"\.(attention|self_attn)\.(attention\.)?(q|k|v)(_proj|uery|ey|alue)\.", r".attn.\3."),
    (r"\.(attention|self_attn)\.(output\.dense|o_proj|out_proj)\.", ".attn.proj."),
    (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.(intermediate\.dense|mlp\.weights_in)\.", ".mlp.fc1."),
    (r"\.(output\.dense|mlp\.weights_out|mlp\.down_proj)\.", ".mlp.fc2."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^(layernorm|post_layernorm)\.", "norm."),
)
# What timm's forward has no use for, and the heads, which are read as modules.
_LEFT_OUT = re.compile(
    r"^(pooler|text_model|text_projection|decoder|rope_embeddings|heads|classifier|\w+_classifier|visual_projection)\.|^logit_"
    r"|^embeddings\.(mask_token|position_ids)$"
)
_HEADS = {  # attributes of the models, and timm's names
    "heads": "head",
    "classifier": "head",
    "cls_classifier": "head",
    "distillation_classifier": "head_dist",
    "visual_projection": "head",
}


class _Description(NamedTuple):
    name: str  # of timm's
    arguments: dict[str, object]
    weights: dict[str, Tensor]
    norm_eps: float
    # What the given model makes of images: its normalised tokens, and what timm's forward gives; None: not compared.
    outputs: Callable[[Tensor], tuple[Tensor | None, Tensor | None]]


def to_timm(model: nn.Module) -> PlainModel:
    """A timm VisionTransformer or Eva with a copy of the weights of another library's, which computes the same.

    Takes torchvision's ``VisionTransformer``, whose attention is ``nn.MultiheadAttention``, and Hugging Face's ViT,
    DeiT, ViT-MAE, ViT-MSN, DINOv2 with and without registers, DINOv3, and the vision towers of CLIP and SigLIP, alone
    or in the whole model. Images have the size that the given model was made for.

    Models without a head become timm models of ``num_classes=0``, whose ``forward_features`` gives the last hidden
    state, CLIP's after its last norm; a pooler that nothing was trained with is left out. The projection of CLIP
    becomes the head, without a bias.

    Args:
        model: it is left as it was. Of a wrapper (``torch.compile``, accelerate, ...), the model inside is taken.

    Returns:
        The model on the same device, in the same dtype, in evaluation mode. It was run beside the given one.

    Raises:
        TypeError: the model is of another class.
        ValueError: it has a part that timm's has not, it is quantised, in pieces or has adapters that are not merged,
            or the two do not compute the same.
    """
    model = unwrapped(model)
    if hasattr(model, "merge_and_unload") or any(".base_layer." in name for name, _ in model.named_parameters()):
        raise ValueError("model has adapters that are not merged: merge them first, by peft's model.merge_and_unload()")
    kinds = {kind.__name__: kind.__module__.partition(".")[0] for kind in type(model).__mro__}
    if {"Dinov2ForImageClassification", "Dinov2WithRegistersForImageClassification"} & kinds.keys():
        raise ValueError(
            "model's classifier reads more than its class token, the mean of its patches too, and timm has no such "
            f"pooling: give its backbone, model.{model.base_model_prefix}, and train a new head"
        )
    kind = next((name for name in _TRANSFORMERS if kinds.get(name) == "transformers"), None)
    if kind is None and kinds.get("VisionTransformer") != "torchvision":
        raise TypeError(
            "model must be torchvision's VisionTransformer, or Hugging Face's ViT, DeiT, ViT-MAE, ViT-MSN, DINOv2, "
            f"DINOv3, CLIP or SigLIP, as it is or with a classifier, got {type(model).__name__}"
        )
    _check_weights(model)
    found = _describe_torchvision(model) if kind is None else _describe_transformers(model, kind)
    converted = timm.create_model(found.name, **found.arguments).eval()
    set_norm_eps(converted, found.norm_eps)
    absent = {name: torch.zeros_like(value) for name, value in converted.state_dict().items() if name.endswith("bias")}
    weights = absent | found.weights
    try:
        converted.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{type(model).__name__} has other parts than timm's {found.name}: "
            f"{differences(converted, weights) or cause(error)}"
        ) from error
    converted.to(next(model.parameters()))
    _check_same(model, converted, found)
    return converted


def _check_weights(model: nn.Module) -> None:
    """Refuse weights that are not plain tensors in one place.

    Raises:
        ValueError: saying what to do first.
    """
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1 or "meta" in devices:
        raise ValueError(
            f"model is in pieces, on {', '.join(devices)}: load it whole on one device, without device_map"
        )
    for name, value in model.state_dict().items():
        plain = type(value) in (Tensor, nn.Parameter)
        counts = name.endswith(("position_ids", "num_batches_tracked"))
        if not plain or not (value.is_floating_point() or counts):
            kind = value.dtype if plain else type(value).__name__
            raise ValueError(
                f"model has other weights than floating-point tensors, {name} of {kind}, as a quantised one has: "
                "convert it as it was before"
            )


def _describe_torchvision(model: nn.Module) -> _Description:
    if not isinstance(model.conv_proj, nn.Conv2d):
        raise ValueError("model has more than one convolution before its blocks (conv_stem_configs), timm's has one")
    weights = _renamed(model, _TORCHVISION_NAMES)
    block = model.encoder.layers[0]
    arguments = {
        "img_size": model.image_size,
        "patch_size": model.patch_size,
        "in_chans": model.conv_proj.in_channels,
        "num_classes": _classes(weights),
        "embed_dim": model.hidden_dim,
        "depth": len(model.encoder.layers),
        "num_heads": block.num_heads,
        "mlp_ratio": _ratio(model.mlp_dim, model.hidden_dim),
    }
    return _Description(
        "vit_base_patch16_224", arguments, weights, block.ln_1.eps, lambda images: (None, model(images))
    )


def _describe_transformers(model: nn.Module, kind: str) -> _Description:
    family, outputs = _TRANSFORMERS[kind]
    config = getattr(model.config, "vision_config", model.config)
    weights = _renamed(model, _TRANSFORMERS_NAMES)
    width = config.hidden_size
    arguments = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.num_channels,
        "num_classes": _classes(weights),
        "embed_dim": width,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
    }
    name = family(config, weights, arguments)
    _pack_projections(weights, config.num_hidden_layers)
    hidden = len(weights["blocks.0.mlp.fc1.weight"]) // (2 if arguments.get("swiglu_mlp") else 1)
    arguments["mlp_ratio"] = _ratio(hidden, width)
    return _Description(name, arguments, weights, config.layer_norm_eps, partial(outputs, model))


# What a family of Hugging Face's is in timm: from its configuration to timm's name; weights and arguments in place.


def _vit(config: object, weights: dict[str, Tensor], arguments: dict[str, object]) -> str:
    if config.hidden_act not in _ACTIVATIONS:
        raise ValueError(f"model has hidden_act {config.hidden_act!r}, expected one of {', '.join(_ACTIVATIONS)}")
    arguments["act_layer"] = _ACTIVATIONS[config.hidden_act]
    arguments["qkv_bias"] = getattr(config, "qkv_bias", True)
    return "vit_base_patch16_224"


def _deit(config: object, weights: dict[str, Tensor], arguments: dict[str, object]) -> str:
    _vit(config, weights, arguments)
    if "head.weight" in weights and "head_dist.weight" not in weights:
        # timm averages the heads of both tokens, and here only the class token has one.
        for kind in ("weight", "bias"):
            weights[f"head.{kind}"] = 2 * weights[f"head.{kind}"]
            weights[f"head_dist.{kind}"] = torch.zeros_like(weights[f"head.{kind}"])
    return "deit_base_distilled_patch16_224"


def _dinov2(config: object, weights: dict[str, Tensor], arguments: dict[str, object]) -> str:
    _vit(config, weights, arguments)
    if config.use_swiglu_ffn:
        del arguments["act_layer"]
    size, registers = ("giant" if config.use_swiglu_ffn else "base"), ""
    if "reg_token" in weights:
        registers = "_reg4"
        arguments["reg_tokens"] = weights["reg_token"].shape[1]
        # timm adds the class token's position to the class token itself.
        position, weights["pos_embed"] = weights["pos_embed"][:, :1], weights["pos_embed"][:, 1:]
        weights["cls_token"] = weights["cls_token"] + position
    return f"vit_{size}_patch14{registers}_dinov2"


def _dinov3(config: object, weights: dict[str, Tensor], arguments: dict[str, object]) -> str:
    activation = "silu" if config.use_gated_mlp else "gelu"  # the ones that timm's Eva has
    if config.hidden_act != activation:
        raise ValueError(f"model has hidden_act {config.hidden_act!r}, expected {activation!r}")
    for name in list(weights):
        renamed = re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name)
        renamed = re.sub(r"\.attn\.(q|v)\.bias$", r".attn.\1_bias", renamed)
        renamed = renamed if config.use_gated_mlp else renamed.replace(".mlp.up_proj.", ".mlp.fc1.")
        weights[renamed] = weights.pop(name)
        if renamed.endswith(".attn.k.bias") and weights.pop(renamed).any():
            raise ValueError("model has biases of its keys (key_bias), which timm's Eva has not")
    registers = weights["reg_token"].shape[1]
    if not registers:
        del weights["reg_token"]
    arguments |= {
        "qkv_bias": config.query_bias or config.value_bias,
        "swiglu_mlp": config.use_gated_mlp,
        "num_reg_tokens": registers,
        "rope_temperature": config.rope_theta,
        "global_pool": "token",
    }
    return "vit_small_patch16_dinov3"


def _clip(config: object, weights: dict[str, Tensor], arguments: dict[str, object]) -> str:
    _vit(config, weights, arguments)
    weights["cls_token"] = weights["cls_token"][None, None]
    weights["pos_embed"] = weights["pos_embed"][None]
    return "vit_base_patch16_clip_224"


def _clip_classifier(config: object, weights: dict[str, Tensor], arguments: dict[str, object]) -> str:
    for name in ("norm.weight", "norm.bias"):  # of the class token, which this head does not read
        del weights[name]
    arguments |= {"global_pool": "avg", "final_norm": False}
    return _clip(config, weights, arguments)


def _siglip(config: object, weights: dict[str, Tensor], arguments: dict[str, object]) -> str:
    _vit(config, weights, arguments)
    weights["pos_embed"] = weights["pos_embed"][None]
    if "attn_pool.latent" not in weights:
        arguments |= {"global_pool": "avg", "fc_norm": False}
        return "vit_base_patch16_siglip_224"
    for kind in ("weight", "bias"):
        packed = weights.pop(f"attn_pool.qkv.{kind}")
        weights[f"attn_pool.q.{kind}"], weights[f"attn_pool.kv.{kind}"] = packed.tensor_split([len(packed) // 3])
    return "vit_base_patch16_siglip_224"


def _siglip_classifier(config: object, weights: dict[str, Tensor], arguments: dict[str, object]) -> str:
    for name in [name for name in weights if name.startswith("attn_pool.")]:  # not used before this head
        del weights[name]
    return _siglip(config, weights, arguments)


# What a model of Hugging Face's makes of images, as a description's outputs.


def _hidden(model: nn.Module, images: Tensor) -> tuple[Tensor, None]:
    return model(pixel_values=images).last_hidden_state, None


def _logits(model: nn.Module, images: Tensor) -> tuple[None, Tensor]:
    return None, model(pixel_values=images).logits


def _pooled(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    found = getattr(model, "vision_model", model)(pixel_values=images)
    return found.last_hidden_state, found.pooler_output


def _projected(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    tower = getattr(model, "vision_model", model)
    tokens, pooled = _pooled(model, images)
    return tower.post_layernorm(tokens), model.visual_projection(pooled) if hasattr(
        model, "visual_projection"
    ) else pooled


def _unmasked(model: nn.Module, images: Tensor) -> tuple[Tensor, None]:
    encoder = getattr(model, "vit", model)
    config, patches = encoder.config, encoder.embeddings.position_embeddings.shape[1] - 1
    ratio, config.mask_ratio = config.mask_ratio, 0.0
    try:
        order = torch.arange(patches, device=images.device).expand(len(images), -1)
        return encoder(pixel_values=images, noise=order).last_hidden_state, None
    finally:
        config.mask_ratio = ratio


_TRANSFORMERS = {
    "ViTModel": (_vit, _hidden),
    "ViTForImageClassification": (_vit, _logits),
    "ViTMSNModel": (_vit, _hidden),
    "ViTMSNForImageClassification": (_vit, _logits),
    "ViTMAEModel": (_vit, _unmasked),
    "ViTMAEForPreTraining": (_vit, _unmasked),
    "DeiTModel": (_deit, _hidden),
    "DeiTForImageClassification": (_deit, _logits),
    "DeiTForImageClassificationWithTeacher": (_deit, _logits),
    "Dinov2Model": (_dinov2, _hidden),
    "Dinov2WithRegistersModel": (_dinov2, _hidden),
    "DINOv3ViTModel": (_dinov3, _pooled),
    "CLIPModel": (_clip, _projected),
    "CLIPVisionModel": (_clip, _projected),
    "CLIPVisionTransformer": (_clip, _projected),
    "CLIPVisionModelWithProjection": (_clip, _projected),
    "CLIPForImageClassification": (_clip_classifier, _logits),
    "SiglipModel": (_siglip, _pooled),
    "SiglipVisionModel": (_siglip, _pooled),
    "SiglipVisionTransformer": (_siglip, _pooled),
    "SiglipForImageClassification": (_siglip_classifier, _logits),
}


def _renamed(model: nn.Module, names: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """The model's weights by timm's names, with those of its heads."""
    renamed = {}
    for name, value in model.state_dict().items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        if not _LEFT_OUT.match(name):
            renamed[name] = value
    for attribute, name in _HEADS.items():
        if (head := _linear(getattr(model, attribute, None))) is not None:
            renamed[f"{name}.weight"] = head.weight.detach()
            renamed[f"{name}.bias"] = torch.zeros(head.out_features) if head.bias is None else head.bias.detach()
    return renamed


def _linear(head: nn.Module | None) -> nn.Linear | None:
    """The one layer of a head; ``None`` where there is none.

    Raises:
        ValueError: there are more layers.
    """
    modules = [] if head is None else [module for module in head.modules() if not list(module.children())]
    layers = [module for module in modules if not isinstance(module, (nn.Identity, nn.Dropout, nn.Sequential))]
    if len(layers) > 1 or not all(isinstance(layer, nn.Linear) for layer in layers):
        kinds = ", ".join(type(layer).__name__ for layer in layers)
        raise ValueError(f"model has a layer before its head ({kinds}), which timm's has not: it is one Linear")
    return layers[0] if layers else None


def _classes(weights: dict[str, Tensor]) -> int:
    return len(weights["head.weight"]) if "head.weight" in weights else 0


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


def _check_same(model: nn.Module, converted: PlainModel, found: _Description) -> None:
    like = next(model.parameters())
    shape = (2, converted.patch_embed.proj.in_channels, *converted.patch_embed.img_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            expected = found.outputs(images)
            actual = converted.forward_features(images), converted(images)
    except Exception as error:  # whatever a model's own forward may lead to
        raise ValueError(f"{type(model).__name__} does not run on images of {shape}: {cause(error)}") from error
    finally:
        model.train(training)
    for one, other in zip(expected, actual, strict=True):
        if one is None:
            continue
        greatest = one.abs().max().clamp_min(torch.finfo(like.dtype).tiny)  # a new head gives zeros
        error = ((other - one).abs().max() / greatest).item() if one.shape == other.shape else torch.inf
        if not error <= torch.finfo(like.dtype).eps ** 0.5:
            raise ValueError(
                f"{type(model).__name__} computes something else than timm's {found.name} with its weights: they "
                f"differ by {error:.2g} of the greatest value"
            )
