"""Published checkpoints: of the paper's authors, and of Segmenter."""

import math
import os
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

from .plan import CompressionPlan, StagePlan
from .segmenter import Segmenter, set_norm_eps
from .vision_transformer import PMVisionTransformer, compress
from .weights import cause, is_weights, load_state_file, load_weights, read_file, unwrapped

VARIANT_NAME = "variant.yml"  # beside a published Segmenter

# What its images were normalised by: mean and standard deviation.
_NORMALISATIONS = {
    "vit": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
    "deit": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
}


def load_authors_checkpoint(
    path: str | os.PathLike, *, num_heads: int | None = None, img_size: tuple[int, int] | None = None
) -> PMVisionTransformer:
    """Load a checkpoint of the published Prune and Merge code, ``{"model": state_dict, "channels": [...]}``.

    The file is read without running code from it (``weights_only``). Its matrices are dense; which patches a merged
    token stands for in ``model.plan`` is read off them: a patch belongs to the token whose row weighs it most.

    Args:
        path: the ``.pth`` file.
        num_heads: attention heads, which the file does not tell; ``None``: heads of width 64.
        img_size: (height, width) in pixels; ``None``: square.

    Returns:
        The model on the CPU, in evaluation mode, with ``train_matrices="dense"``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, or is no such checkpoint; the message says what was expected.
    """
    state, channels = _read_authors_file(path)
    return _from_authors_weights(path, state, channels, num_heads, img_size).eval()


def load_segmenter_checkpoint(path: str | os.PathLike) -> Segmenter:
    """Load a published Segmenter checkpoint, ``{"model": weights}`` with its ``variant.yml`` beside it.

    Its encoder may have the matrices of Prune and Merge, named as in the authors' classification checkpoints. Files are
    read without running code from them.

    Args:
        path: the ``.pth`` file, or the folder that holds ``checkpoint.pth``.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file, or no ``variant.yml`` beside it.
        ValueError: a file is truncated or foreign, or they do not fit each other.
    """
    path = Path(path)
    path = path / "checkpoint.pth" if path.is_dir() else path
    variant_path = path.parent / VARIANT_NAME
    weights = load_state_file(path)
    if not variant_path.is_file():
        raise FileNotFoundError(f"no {variant_path}: it describes the network of {path}")
    try:
        network = yaml.safe_load(variant_path.read_text(encoding="utf-8"))["net_kwargs"]
        width, heads, decoder = int(network["d_model"]), int(network["n_heads"]), network["decoder"]
        size = network["image_size"]
        img_size = tuple(int(side) for side in (size if isinstance(size, (list, tuple)) else (size, size)))
        kind = "linear" if "linear" in decoder["name"] else decoder["name"]
        options = {
            "decoder": kind,
            "decoder_depth": int(decoder.get("n_layers", 2)),
            "decoder_drop_path": float(decoder.get("drop_path_rate", 0.0)),
            "decoder_dropout": float(decoder.get("dropout", 0.0)),
        }
        num_classes = int(network["n_cls"])
        mean, std = _NORMALISATIONS[network.get("normalization", "vit")]
    except (yaml.YAMLError, KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{variant_path} does not describe a Segmenter: {error!r}") from error
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}}
    for name, value in weights.items():
        part, _, rest = name.partition(".")
        if part not in parts:
            raise ValueError(f"{path}: weights of a Segmenter begin with encoder. or decoder., got {name}")
        # The classifier that the encoder was trained with is stored too, but never used.
        if part == "decoder" or not rest.startswith(("head", "pre_logits")):
            parts[part][rest] = value
    encoder = _from_authors_weights(path, parts["encoder"], None, heads, img_size)
    if encoder.embed_dim != width:
        raise ValueError(f"{variant_path} says d_model {width}, but the weights of {path} have {encoder.embed_dim}")
    encoder.pretrained_cfg = {**encoder.pretrained_cfg, "mean": mean, "std": std}
    set_norm_eps(encoder, Segmenter.PUBLISHED_NORM_EPS)
    model = Segmenter(encoder, num_classes, **options)
    load_weights(model.decoder, parts["decoder"], path)
    return model.eval()


def _read_authors_file(path: str | os.PathLike) -> tuple[dict[str, Tensor], list[int]]:
    expected = "a Prune and Merge checkpoint is {'model': weights, 'channels': tokens per block}"
    content = read_file(path, f"is truncated or foreign; {expected}")
    if not isinstance(content, dict) or not {"model", "channels"} <= content.keys():
        raise ValueError(f"{os.fspath(path)} is foreign; {expected}")
    state, channels = content["model"], content["channels"]
    if not is_weights(state):
        raise ValueError(f"{os.fspath(path)}: 'model' must hold tensors by name")
    state = unwrapped(state)
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
    """The model of weights in which compressed blocks have matrices; a plain one where none has."""
    matrices: dict[int, dict[str, Tensor]] = {}
    weights = {}
    for name, value in state.items():
        parts = name.split(".")
        of_attention = parts[0] == "blocks" and parts[2:3] == ["attn"] and parts[1].isdecimal()
        matrix = parts[-1] if of_attention else None
        if matrix in ("merge_matrix", "recover_matrix", "token_mask"):
            matrices.setdefault(int(parts[1]), {})[matrix] = value.float()
        elif matrix != "bias" or len(parts) != 4:  # blocks.l.attn.bias is stored there, but never used
            weights[name] = value.float()
    try:
        dense = _build_dense(weights, num_heads, img_size)
    except (KeyError, IndexError) as error:
        raise ValueError(f"{os.fspath(path)} lacks the weight {error} of a Vision Transformer") from error
    except Exception as error:  # of sizes that do not fit each other, of whatever kind
        raise ValueError(f"{os.fspath(path)} holds no weights of a Vision Transformer: {cause(error)}") from error
    load_weights(dense, weights, path)
    if not matrices:
        return dense
    grid, prefix = tuple(dense.patch_embed.grid_size), dense.num_prefix_tokens
    for block, found in matrices.items():
        _check_authors_matrices(path, block, found, grid[0] * grid[1] + prefix, channels)
    plan = CompressionPlan(
        grid=grid,
        depth=len(dense.blocks),
        num_prefix_tokens=prefix,
        stages=tuple(_read_stage(block, matrices[block], prefix) for block in sorted(matrices)),
    )
    model = compress(dense, plan, train_matrices="dense")
    with torch.no_grad():
        for block, merge, reconstruct in zip(
            sorted(matrices), model.merge_matrices(), model.reconstruct_matrices(), strict=True
        ):
            merge.copy_(matrices[block]["merge_matrix"])
            reconstruct.copy_(matrices[block]["recover_matrix"])
    return model


def _build_dense(
    weights: dict[str, Tensor], num_heads: int | None, img_size: tuple[int, int] | None
) -> VisionTransformer:
    """The uncompressed model that weights of timm's names belong to, with random weights."""
    width, in_chans, *patch = weights["patch_embed.proj.weight"].shape
    prefix = 1 + ("dist_token" in weights)
    if img_size is None:
        side = math.isqrt(weights["pos_embed"].shape[1] - prefix)
        img_size = (side * patch[0], side * patch[1])
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    if depth > len(weights):  # before memory is taken for them
        raise ValueError(f"it has a weight of block {depth - 1}, but no more than {len(weights)} weights")
    return timm.create_model(
        "deit_small_distilled_patch16_224" if "dist_token" in weights else "deit_small_patch16_224",
        img_size=tuple(img_size),
        patch_size=tuple(patch),
        in_chans=in_chans,
        num_classes=len(weights["head.weight"]) if "head.weight" in weights else 0,
        embed_dim=width,
        depth=depth,
        num_heads=num_heads or max(width // 64, 1),
        mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / width,
        qkv_bias="blocks.0.attn.qkv.bias" in weights,
        init_values=1e-5 if "blocks.0.ls1.gamma" in weights else None,
        global_pool="avg" if "fc_norm.weight" in weights else "token",
    )


def _check_authors_matrices(
    path: str | os.PathLike, block: int, found: dict[str, Tensor], tokens: int, channels: list[int] | None
) -> None:
    where = f"{os.fspath(path)}, block {block}"
    if found.keys() != {"merge_matrix", "recover_matrix", "token_mask"}:
        raise ValueError(f"{where}: expected merge_matrix, recover_matrix and token_mask, got {sorted(found)}")
    if channels is None:
        channels = {block: len(found["merge_matrix"])}
    elif block >= len(channels):
        raise ValueError(f"{where}: 'channels' has {len(channels)} entries, expected one for every block")
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    merged = channels[block]
    expected = {"merge_matrix": (merged, tokens), "recover_matrix": (tokens, merged), "token_mask": (tokens,)}
    if shapes != expected:
        raise ValueError(f"{where}: expected the shapes {expected}, got {shapes}")


def _read_stage(block: int, found: dict[str, Tensor], prefix: int) -> StagePlan:
    """The stage of a block as far as its matrices tell."""
    merge = found["merge_matrix"][prefix:, prefix:]
    kept_or_merged = found["token_mask"][prefix:] != 0
    weighed = merge.abs() * kept_or_merged
    segments = weighed.argmax(dim=0)
    # Each row has the patch that it weighs most, even one that another row weighs more.
    segments[weighed.argmax(dim=1)] = torch.arange(len(merge))
    segments[~kept_or_merged] = -1
    weights = torch.where(kept_or_merged, merge.gather(0, segments.clamp_min(0)[None])[0], 0)
    return StagePlan(block, block, tuple(segments.tolist()), tuple(weights.tolist()))
