"""Load published checkpoints: those of the paper's authors, and those of Segmenter."""

import math
import os
import re
from pathlib import Path

import timm
import torch
import yaml
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from .models import set_norm_eps, tokens_of
from .plan import CompressionPlan, StagePlan
from .segmenter import Segmenter
from .vision_transformer import PMVisionTransformer, compress
from .weights import (
    arguments_of,
    is_weights,
    load_state_file,
    load_weights,
    read_file,
    refusing,
    without_wrappers,
)

VARIANT_NAME = "variant.yml"  # beside a published Segmenter

# Mean and standard deviation that its images were normalised with.
_NORMALISATIONS = {
    "vit": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
    "deit": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
}


def load_authors_checkpoint(
    path: str | os.PathLike, *, num_heads: int | None = None, img_size: tuple[int, int] | None = None
) -> PMVisionTransformer:
    """Load a checkpoint of the published Prune and Merge code, ``{"model": state_dict, "channels": [...]}``.

    The file is read without running code from it (``weights_only``). Its matrices are dense. ``model.plan`` is read off
    them: a patch belongs to the merged token whose row gives it the largest weight.

    Args:
        path: the ``.pth`` file.
        num_heads: attention heads, which the file does not record; ``None``: heads of width 64.
        img_size: (height, width) in pixels; ``None``: square.

    Returns:
        The model on the CPU, in evaluation mode, with ``train_matrices="dense"``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or is not such a checkpoint; the message says what was expected.
    """
    state, channels = _read_authors_file(path)
    return _from_authors_weights(path, state, channels, num_heads, img_size).eval()


def load_segmenter_checkpoint(path: str | os.PathLike) -> Segmenter:
    """Load a published Segmenter checkpoint, ``{"model": weights}`` with its ``variant.yml`` beside it.

    The encoder may have the matrices of Prune and Merge, named as in the authors' classification checkpoints. Files are
    read without running code from them.

    Args:
        path: the ``.pth`` file, or the folder that holds ``checkpoint.pth``.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file, or no ``variant.yml`` beside it.
        ValueError: a file is truncated or foreign, or the two do not match.
    """
    path = Path(path)
    path = path / "checkpoint.pth" if path.is_dir() else path
    variant_path = path.parent / VARIANT_NAME
    weights = load_state_file(path)
    if not variant_path.is_file():
        raise FileNotFoundError(f"no {variant_path}: it describes the network of {path}")
    with refusing(f"{variant_path} does not describe a Segmenter"):
        network = yaml.safe_load(variant_path.read_text(encoding="utf-8"))["net_kwargs"]
        width, heads, num_classes = (int(network[name]) for name in ("d_model", "n_heads", "n_cls"))
        size, decoder = network["image_size"], network["decoder"]
        img_size = tuple(int(side) for side in (size if isinstance(size, (list, tuple)) else (size, size)))
        options = {
            "decoder": "linear" if "linear" in decoder["name"] else decoder["name"],
            "decoder_depth": int(decoder.get("n_layers", 2)),
            "decoder_drop_path": float(decoder.get("drop_path_rate", 0.0)),
            "decoder_dropout": float(decoder.get("dropout", 0.0)),
        }
        mean, std = _NORMALISATIONS[network.get("normalization", "vit")]
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}}
    for name, value in weights.items():
        part, _, rest = name.partition(".")
        if part not in parts:
            raise ValueError(f"{path}: weights of a Segmenter begin with encoder. or decoder., got {name}")
        # The classifier that the encoder was pretrained with is stored too, but never used.
        if part == "decoder" or not rest.startswith(("head", "pre_logits")):
            parts[part][rest] = value
    encoder = _from_authors_weights(path, parts["encoder"], None, heads, img_size)
    if encoder.embed_dim != width:
        raise ValueError(f"{variant_path} says d_model {width}, but the weights of {path} have {encoder.embed_dim}")
    encoder.pretrained_cfg = {**encoder.pretrained_cfg, "mean": mean, "std": std}
    set_norm_eps(encoder, Segmenter.PUBLISHED_NORM_EPS)
    model = Segmenter(encoder, num_classes, **options)
    load_weights(model.decoder, parts["decoder"], str(path))
    return model.eval()


def _read_authors_file(path: str | os.PathLike) -> tuple[dict[str, Tensor], list[int]]:
    expected = "a Prune and Merge checkpoint is {'model': weights, 'channels': tokens per block}"
    content = read_file(path, f"is truncated or foreign; {expected}")
    if not isinstance(content, dict) or not {"model", "channels"} <= content.keys():
        raise ValueError(f"{os.fspath(path)} is foreign; {expected}")
    state, channels = content["model"], content["channels"]
    if not is_weights(state):
        raise ValueError(f"{os.fspath(path)}: 'model' must hold tensors by name")
    state = without_wrappers(state)
    if not any(name.endswith(".attn.merge_matrix") for name in state):
        raise ValueError(f"{os.fspath(path)} has no merge matrices (blocks.0.attn.merge_matrix and so on); {expected}")
    if not isinstance(channels, (list, tuple)) or not all(isinstance(tokens, int) for tokens in channels):
        raise ValueError(f"{os.fspath(path)}: 'channels' must hold the number of tokens of each block")
    return state, list(channels)


def _from_authors_weights(
    path: str | os.PathLike,
    state: dict[str, Tensor],
    channels: list[int] | None,
    num_heads: int | None,
    img_size: tuple[int, int] | None,
) -> VisionTransformer:
    """The model of these weights: compressed if any block has matrices, otherwise plain."""
    matrices: dict[int, dict[str, Tensor]] = {}
    weights = {}
    for name, value in state.items():
        match = re.fullmatch(r"blocks\.(\d+)\.attn\.(merge_matrix|recover_matrix|token_mask|bias)", name)
        if match is None:
            weights[name] = value.float()
        elif match[2] != "bias":  # blocks.l.attn.bias is stored there, but never used
            matrices.setdefault(int(match[1]), {})[match[2]] = value.float()
    with refusing(f"{os.fspath(path)} holds no weights of a Vision Transformer"):
        try:
            dense = _build_dense(weights, num_heads, img_size)
        except KeyError as error:
            raise ValueError(f"it lacks the weight {error}") from error
    load_weights(dense, weights, os.fspath(path))
    if not matrices:
        return dense
    blocks, prefix = sorted(matrices), dense.num_prefix_tokens
    for block in blocks:
        _check_matrices(f"{os.fspath(path)}, block {block}", matrices[block], tokens_of(dense)[0], channels, block)
    plan = CompressionPlan(
        grid=tuple(dense.patch_embed.grid_size),
        depth=len(dense.blocks),
        num_prefix_tokens=prefix,
        stages=tuple(_read_stage(block, matrices[block], prefix) for block in blocks),
    )
    model = compress(dense, plan, train_matrices="dense")
    with torch.no_grad():
        for block, merge, reconstruct in zip(blocks, model.merge_matrices(), model.reconstruct_matrices(), strict=True):
            merge.copy_(matrices[block]["merge_matrix"])
            reconstruct.copy_(matrices[block]["recover_matrix"])
    return model


def _build_dense(
    weights: dict[str, Tensor], num_heads: int | None, img_size: tuple[int, int] | None
) -> VisionTransformer:
    """The uncompressed model that fits weights with timm's names, with random weights."""
    arguments, distilled = arguments_of(weights), "dist_token" in weights
    if img_size is None:
        side = math.isqrt(weights["pos_embed"].shape[1] - 1 - distilled)
        img_size = tuple(side * patch for patch in arguments["patch_size"])
    return timm.create_model(
        "deit_small_distilled_patch16_224" if distilled else "deit_small_patch16_224",
        **arguments,
        img_size=tuple(img_size),
        num_heads=num_heads or max(arguments["embed_dim"] // 64, 1),
        global_pool="avg" if "fc_norm.weight" in weights else "token",
    )


def _check_matrices(
    where: str, matrices: dict[str, Tensor], tokens: int, channels: list[int] | None, block: int
) -> None:
    """Refuse a block's matrices if some are missing, or if their shapes do not match ``channels`` where it is given."""
    if matrices.keys() != {"merge_matrix", "recover_matrix", "token_mask"}:
        raise ValueError(f"{where}: expected merge_matrix, recover_matrix and token_mask, got {sorted(matrices)}")
    if channels is not None and block >= len(channels):
        raise ValueError(f"{where}: 'channels' has {len(channels)} entries, expected one for every block")
    merged = len(matrices["merge_matrix"]) if channels is None else channels[block]
    shapes = {name: tuple(value.shape) for name, value in matrices.items()}
    expected = {"merge_matrix": (merged, tokens), "recover_matrix": (tokens, merged), "token_mask": (tokens,)}
    if shapes != expected:
        raise ValueError(f"{where}: expected the shapes {expected}, got {shapes}")


def _read_stage(block: int, matrices: dict[str, Tensor], prefix: int) -> StagePlan:
    """The stage of a block, as far as its matrices determine it."""
    merge = matrices["merge_matrix"][prefix:, prefix:]
    kept_or_merged = matrices["token_mask"][prefix:] != 0
    weighed = merge.abs() * kept_or_merged
    segments = weighed.argmax(dim=0)
    # Each row keeps the patch that it weighs most, even if another row weighs that patch more.
    segments[weighed.argmax(dim=1)] = torch.arange(len(merge))
    segments[~kept_or_merged] = -1
    weights = torch.where(kept_or_merged, merge.gather(0, segments.clamp_min(0)[None])[0], 0)
    return StagePlan(block, block, tuple(segments.tolist()), tuple(weights.tolist()))
