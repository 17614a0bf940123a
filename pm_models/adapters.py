"""Convert the Vision Transformers of torchvision and Hugging Face to timm's, with the same weights."""

import re
from collections.abc import Callable
from types import SimpleNamespace

import timm
import torch
from torch import Tensor, nn

from .models import input_size, set_norm_eps
from .unwrapping import unwrapped
from .vision_transformer import PlainModel
from .weights import arguments_of, load_weights, mlp_ratio, refusing

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}

# Patterns of other libraries' names of weights, and timm's names.
_NAMES = (
    # torchvision
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
    # Hugging Face, which renamed some with version 5
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
# Weights that timm's forward does not use, and those of heads, which are read from their modules.
_LEFT_OUT = re.compile(
    r"^(pooler|text_model|text_projection|decoder|rope_embeddings|heads|classifier|\w+_classifier|visual_projection)\.|^logit_"
    r"|^embeddings\.(mask_token|position_ids)$"
)
_HEADS = {  # attributes of the models, and timm's names for them
    "heads": "head",
    "classifier": "head",
    "cls_classifier": "head",
    "distillation_classifier": "head_dist",
    "visual_projection": "head",
}

_LIBRARIES = ("transformers", "torchvision")
Weights = dict[str, Tensor]
Conversion = tuple[
    str, dict[str, object]
]  # the name of a timm model, and arguments that cannot be derived from weights


def to_timm(model: nn.Module) -> PlainModel:
    """A timm VisionTransformer or Eva that computes the same as another library's model, with a copy of its weights.

    Takes torchvision's ``VisionTransformer``, whose attention is ``nn.MultiheadAttention``, and Hugging Face's ViT,
    DeiT, ViT-MAE, ViT-MSN, DINOv2 with and without registers, DINOv3, and the vision towers of CLIP and SigLIP, alone
    or within the whole model. The image size is that of the given model.

    Models without a head become timm models with ``num_classes=0``, whose ``forward_features`` gives the last hidden
    state (for CLIP after its last norm); untrained poolers are left out. CLIP's projection becomes the head, without a
    bias.

    Args:
        model: the model to convert, which is left as it was. Of a wrapper (``torch.compile``, accelerate, ...), the
            model inside is converted.

    Returns:
        The timm model on the same device, in the same dtype, in evaluation mode. Both were run and compared.

    Raises:
        TypeError: the model is of another class.
        ValueError: it has a part that timm's model lacks, is quantised, spread over devices or has unmerged adapters,
            or the two do not compute the same.
    """
    model = unwrapped(model)
    if hasattr(model, "merge_and_unload") or any(".base_layer." in name for name, _ in model.named_parameters()):
        raise ValueError("model has adapters that are not merged: merge them first, by peft's model.merge_and_unload()")
    classes = {kind.__name__ for kind in type(model).__mro__ if kind.__module__.partition(".")[0] in _LIBRARIES}
    if {"Dinov2ForImageClassification", "Dinov2WithRegistersForImageClassification"} & classes:
        raise ValueError(
            "model's classifier also reads the mean of its patches, and timm has no such pooling: pass its backbone, "
            f"model.{model.base_model_prefix}, and train a new head"
        )
    convert, outputs = next((_MODELS[name] for name in _MODELS if name in classes), (None, None))
    if convert is None:
        raise TypeError(
            "model must be torchvision's VisionTransformer, or Hugging Face's ViT, DeiT, ViT-MAE, ViT-MSN, DINOv2, "
            f"DINOv3, CLIP or SigLIP, as it is or with a classifier, got {type(model).__name__}"
        )
    _check_weights(model)
    config, weights = _config(model), _renamed(model)
    name, arguments = convert(config, weights)
    _pack_projections(weights)
    sizes = {"img_size": config.image_size, "num_heads": config.num_attention_heads}
    converted = timm.create_model(name, **arguments_of(weights) | sizes | arguments).eval()
    set_norm_eps(converted, config.layer_norm_eps)
    absent = {name: torch.zeros_like(value) for name, value in converted.state_dict().items() if name.endswith("bias")}
    load_weights(converted, absent | weights, f"{type(model).__name__}, as timm's {name},")
    converted.to(next(model.parameters()))
    _check_same(model, converted, outputs)
    return converted


def _check_weights(model: nn.Module) -> None:
    """Refuse weights that are not plain tensors on one device.

    Raises:
        ValueError: saying what to do first.
    """
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1 or "meta" in devices:
        raise ValueError(f"model is spread over {', '.join(devices)}: load all of it on one device, without device_map")
    for name, value in model.state_dict().items():
        plain = type(value) in (Tensor, nn.Parameter)
        counts = name.endswith(("position_ids", "num_batches_tracked"))
        if not plain or not (value.is_floating_point() or counts):
            kind = value.dtype if plain else type(value).__name__
            raise ValueError(
                f"model has weights that are not floating-point tensors ({name} of {kind}), as quantised models have: "
                "convert the original model"
            )


def _config(model: nn.Module) -> object:
    """The configuration of a transformers model or its vision part; for torchvision's model, one of the same form."""
    if hasattr(model, "config"):
        return getattr(model.config, "vision_config", model.config)
    if not isinstance(model.conv_proj, nn.Conv2d):
        raise ValueError("model has more than one convolution before its blocks (conv_stem_configs), timm's has one")
    block = model.encoder.layers[0]
    return SimpleNamespace(
        image_size=model.image_size,
        num_attention_heads=block.num_heads,
        layer_norm_eps=block.ln_1.eps,
        hidden_act="gelu",
    )


# The timm model of each family. Weights, under timm's names, are changed in place.


def _vit(config: object, weights: Weights, name: str = "vit_base_patch16_224") -> Conversion:
    if config.hidden_act not in _ACTIVATIONS:
        raise ValueError(f"model has hidden_act {config.hidden_act!r}, expected one of {', '.join(_ACTIVATIONS)}")
    return name, {"act_layer": _ACTIVATIONS[config.hidden_act]}


def _deit(config: object, weights: Weights) -> Conversion:
    if "head.weight" in weights and "head_dist.weight" not in weights:
        # timm averages the heads of both tokens, but here only the class token has one.
        for kind in ("weight", "bias"):
            weights[f"head.{kind}"] = 2 * weights[f"head.{kind}"]
            weights[f"head_dist.{kind}"] = torch.zeros_like(weights[f"head.{kind}"])
    return _vit(config, weights, "deit_base_distilled_patch16_224")


def _dinov2(config: object, weights: Weights) -> Conversion:
    name, arguments = _vit(config, weights, "vit_base_patch14_dinov2")
    if config.use_swiglu_ffn:
        name, arguments = "vit_giant_patch14_dinov2", {}
    if "reg_token" in weights:
        name = name.replace("_dinov2", "_reg4_dinov2")
        arguments["reg_tokens"] = weights["reg_token"].shape[1]
        # timm adds the class token's position to the class token itself.
        position, weights["pos_embed"] = weights["pos_embed"][:, :1], weights["pos_embed"][:, 1:]
        weights["cls_token"] = weights["cls_token"] + position
    return name, arguments


def _dinov3(config: object, weights: Weights) -> Conversion:
    gated = config.use_gated_mlp
    activation = "silu" if gated else "gelu"  # those of timm's Eva
    if config.hidden_act != activation:
        raise ValueError(f"model has hidden_act {config.hidden_act!r}, expected {activation!r}")
    for name in list(weights):
        renamed = re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name)
        renamed = re.sub(r"\.attn\.(q|v)\.bias$", r".attn.\1_bias", renamed)
        renamed = renamed if gated else renamed.replace(".mlp.up_proj.", ".mlp.fc1.")
        weights[renamed] = weights.pop(name)
        if renamed.endswith(".attn.k.bias") and weights.pop(renamed).any():
            raise ValueError("model has key biases (key_bias), which timm's Eva lacks")
    registers = weights["reg_token"].shape[1]
    if not registers:
        del weights["reg_token"]
    return "vit_small_patch16_dinov3", {
        "qkv_bias": config.query_bias or config.value_bias,
        "swiglu_mlp": gated,
        "mlp_ratio": mlp_ratio(config.intermediate_size, config.hidden_size),
        "num_reg_tokens": registers,
        "rope_temperature": config.rope_theta,
        "global_pool": "token",
    }


def _clip(config: object, weights: Weights) -> Conversion:
    return _vit(config, weights, "vit_base_patch16_clip_224")


def _clip_classifier(config: object, weights: Weights) -> Conversion:
    for kind in ("weight", "bias"):  # of the class token's norm, which this head does not read
        del weights[f"norm.{kind}"]
    name, arguments = _clip(config, weights)
    return name, arguments | {"global_pool": "avg", "final_norm": False}


def _siglip(config: object, weights: Weights) -> Conversion:
    name, arguments = _vit(config, weights, "vit_base_patch16_siglip_224")
    if "attn_pool.latent" not in weights:
        return name, arguments | {"global_pool": "avg", "fc_norm": False}
    for kind in ("weight", "bias"):
        packed = weights.pop(f"attn_pool.qkv.{kind}")
        weights[f"attn_pool.q.{kind}"], weights[f"attn_pool.kv.{kind}"] = packed.tensor_split([len(packed) // 3])
    return name, arguments


def _siglip_classifier(config: object, weights: Weights) -> Conversion:
    for name in [name for name in weights if name.startswith("attn_pool.")]:  # not used before this head
        del weights[name]
    return _siglip(config, weights)


# A model's normalised tokens and the output to compare with timm's forward; None is not compared.
Outputs = Callable[[nn.Module, Tensor], tuple[Tensor | None, Tensor | None]]


def _hidden(model: nn.Module, images: Tensor) -> tuple[Tensor, None]:
    return model(pixel_values=images).last_hidden_state, None


def _logits(model: nn.Module, images: Tensor) -> tuple[None, Tensor]:
    output = model(images)
    return None, getattr(output, "logits", output)


def _pooled(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    output = getattr(model, "vision_model", model)(pixel_values=images)
    return output.last_hidden_state, output.pooler_output


def _projected(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    tokens, pooled = _pooled(model, images)
    tokens = getattr(model, "vision_model", model).post_layernorm(tokens)
    return tokens, model.visual_projection(pooled) if hasattr(model, "visual_projection") else pooled


def _unmasked(model: nn.Module, images: Tensor) -> tuple[Tensor, None]:
    encoder = getattr(model, "vit", model)
    config, patches = encoder.config, encoder.embeddings.position_embeddings.shape[1] - 1
    ratio, config.mask_ratio = config.mask_ratio, 0.0
    try:
        order = torch.arange(patches, device=images.device).expand(len(images), -1)
        return encoder(pixel_values=images, noise=order).last_hidden_state, None
    finally:
        config.mask_ratio = ratio


# By class names, because transformers need not be installed.
_MODELS: dict[str, tuple[Callable[[object, Weights], Conversion], Outputs]] = {
    "VisionTransformer": (_vit, _logits),  # torchvision's
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


def _renamed(model: nn.Module) -> Weights:
    """The model's weights under timm's names, including those of its heads."""
    renamed = {}
    for name, value in model.state_dict().items():
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        if name in ("cls_token", "pos_embed"):  # CLIP and SigLIP have them without a batch
            value = value.reshape(1, -1, value.shape[-1])
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
        raise ValueError(f"model's head consists of {kinds}, but timm's is a single Linear")
    return layers[0] if layers else None


def _pack_projections(weights: Weights) -> None:
    """Pack the projections to queries, keys and values into one, and a gated MLP's two likewise, in place."""
    packed = {"attn.q.": ("attn.qkv.", "attn.k.", "attn.v."), "mlp.gate_proj.": ("mlp.fc1.", "mlp.up_proj.")}
    for name in list(weights):
        for first, (whole, *others) in packed.items():
            if first in name:
                parts = [weights.pop(name.replace(first, part)) for part in (first, *others)]
                weights[name.replace(first, whole)] = torch.cat(parts)


def _check_same(model: nn.Module, converted: PlainModel, outputs: Outputs) -> None:
    like, kind = next(model.parameters()), type(model).__name__
    shape = (2, *input_size(converted))
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)
    training = model.training
    try:
        with refusing(f"{kind} does not run on images of {shape}"), torch.inference_mode():
            expected = outputs(model.eval(), images)
            actual = converted.forward_features(images), converted(images)
    finally:
        model.train(training)
    for one, other in zip(expected, actual, strict=True):
        if one is None:
            continue
        greatest = one.abs().max().clamp_min(torch.finfo(like.dtype).tiny)  # a new head gives zeros
        error = ((other - one).abs().max() / greatest).item() if one.shape == other.shape else torch.inf
        if not error <= torch.finfo(like.dtype).eps ** 0.5:
            name = converted.pretrained_cfg["architecture"]
            raise ValueError(
                f"{kind} does not compute the same as timm's {name} with its weights: they differ by {error:.2g} of "
                "the largest value"
            )
