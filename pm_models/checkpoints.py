"""Models on disk: folders of safetensors and JSON, and the checkpoints that the paper's authors published."""

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import timm
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .card import model_card, replaces_card
from .data import input_size
from .description import describe
from .files import allow_default_mode, unfinished
from .plan import CompressionPlan, StagePlan
from .registry import PREFIX, registered_name
from .segmenter import Model, Segmenter, encoder_of, set_norm_eps, shared_norm_eps
from .unwrapping import unwrapped
from .vision_transformer import COMPRESSION, Compressed, PMVisionTransformer, compress

CONFIG_NAME = "config.json"
CARD_NAME = "README.md"
WEIGHTS_NAME = "model.safetensors"
VARIANT_NAME = "variant.yml"  # beside a published Segmenter

# What its images were normalised by: mean and standard deviation.
_NORMALISATIONS = {
    "vit": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
    "deit": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
}


def save_pretrained(
    model: Model,
    folder: str | os.PathLike,
    *,
    model_args: dict | None = None,
    results: Mapping[str, Mapping[str, object]] | None = None,
) -> None:
    """Save a timm VisionTransformer or Eva, or a Segmenter, compressed or not, as safetensors and JSON.

    The folder has the layout of timm's hub folders, with a model card. A compressed model stands there under its
    registered name, ``pm_<name>``, its plan and options among the arguments: once this package is imported,
    ``timm.create_model("local-dir:<folder>", pretrained=True)`` makes it too. A Segmenter's options stand in
    ``config.json`` under ``segmenter``, and the rest is its encoder's. What is written is known to load: the model is
    rebuilt from the configuration (without weights) and compared before anything appears in ``folder``.

    Args:
        model: made by ``timm.create_model``, or its encoder was, so that its architecture has a name. Of a wrapper
            (``torch.compile``, DistributedDataParallel, accelerate, ...), the model inside is saved.
        folder: created if need be; a model saved there before is replaced.
        model_args: arguments of ``timm.create_model`` that the model was made with, where timm did not record them.
        results: a row of numbers for each of some models, by their names, for the card.

    Raises:
        TypeError: a part of the model is wrapped on its own.
        ValueError: the model cannot be rebuilt from a name and arguments; the message names what differs.
        OSError: the files cannot be written; what was saved there before is untouched.
    """
    model = unwrapped(model)
    encoder = encoder_of(model)
    if not getattr(encoder, "pretrained_cfg", None) or not encoder.pretrained_cfg.get("architecture"):
        raise ValueError(
            "model has no architecture name to rebuild it from; create it with timm.create_model(name, ...), which "
            "takes every argument of VisionTransformer"
        )
    folder = Path(os.path.abspath(folder))
    exists = folder.is_dir()
    # In a folder that exists, as what is beside it may be another's.
    with unfinished(folder / WEIGHTS_NAME if exists else folder) as staging:
        staging.mkdir()
        name = encoder.pretrained_cfg["architecture"].removeprefix(PREFIX)
        arguments = dict(model_args or {})
        if isinstance(encoder, Compressed):
            name = registered_name(name)
            arguments |= encoder.compression
        extra = {"pretrained_cfg": {"architecture": name}, "norm_eps": shared_norm_eps(encoder)}
        if isinstance(model, Segmenter):
            extra["segmenter"] = {"num_classes": model.num_classes, **model.options}
        try:
            save_for_hf(encoder, staging, model_config=extra, model_args=arguments, safe_serialization=True)
            if isinstance(model, Segmenter):
                save_model(model, str(staging / WEIGHTS_NAME))
        except SafetensorError as error:
            raise OSError(f"the model could not be written to {folder}: {error}") from error
        with torch.device("meta"):
            rebuilt = _build(staging)
        _check_same_model(model, rebuilt)
        (staging / CARD_NAME).write_text(model_card(model, name, results or {}), encoding="utf-8")
        allow_default_mode(staging / WEIGHTS_NAME)
        if not exists:
            with suppress(OSError):  # another process was first
                staging.rename(folder)
                return
        for name in (CARD_NAME, WEIGHTS_NAME, CONFIG_NAME):
            if name != CARD_NAME or replaces_card(folder / name):
                os.replace(staging / name, folder / name)


def load_pretrained(folder: str | os.PathLike, *, uncompressed: bool = False) -> Model:
    """Load a model that :func:`save_pretrained` wrote, on the CPU, in evaluation mode, in the dtype it was saved in.

    Args:
        folder: what was saved to.
        uncompressed: leave the plan and its matrices out: the plain timm model with the same weights.

    Returns:
        The compressed model, or the plain timm model where that was saved; a :class:`Segmenter` on it.

    Raises:
        FileNotFoundError: the folder lacks ``config.json`` or ``model.safetensors``.
        ValueError: a file is truncated, foreign, or does not fit the other.
    """
    folder = Path(folder)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no saved model: expected {CONFIG_NAME} and {WEIGHTS_NAME} in it")
    path = folder / WEIGHTS_NAME
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error
    _check_configuration(folder, weights)
    model = _build(folder, uncompressed)
    if uncompressed:
        stages = "encoder.stages." if isinstance(model, Segmenter) else "stages."
        weights = {name: value for name, value in weights.items() if not name.startswith(stages)}
    _load_weights(model, weights, path)
    return model.to(next(value for name, value in weights.items() if name.endswith("patch_embed.proj.weight"))).eval()


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
    _load_weights(model.decoder, parts["decoder"], path)
    return model.eval()


def load_state_file(path: str | os.PathLike) -> dict[str, Tensor]:
    """The weights in a ``.safetensors`` file, or in a ``.pth`` file as timm, DeiT and others write it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or holds no weights. Pickled code is never run.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise a dozen kinds for a broken file
        raise ValueError(f"{path} is truncated or no checkpoint that loads without running code: {error}") from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    weights = content if isinstance(content, dict) else {}
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path} holds no weights: expected tensors by name, or such a dict under 'model'")
    return {name.removeprefix("module."): value for name, value in weights.items()}


def _check_configuration(folder: Path, weights: dict[str, Tensor]) -> None:
    """Refuse a configuration of a model that is not the weights', before memory is taken for it."""
    path = folder / CONFIG_NAME
    try:
        arguments = json.loads(path.read_text(encoding="utf-8")).get("model_args") or {}
        largest = max([len(weights), *(size for value in weights.values() for size in value.shape)])
        depth = arguments.get("depth", 0)
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} does not describe a model that this version can build: {error!r}") from error
    if not isinstance(depth, int) or depth > largest:
        raise ValueError(f"{path} describes a model of depth {depth!r}, and {WEIGHTS_NAME} is not one's")
    with torch.device("meta"):
        model = _build(folder)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    different = [name for name, value in weights.items() if expected.get(name, value.shape) != tuple(value.shape)]
    if different:
        raise ValueError(
            f"the weights of {folder / WEIGHTS_NAME} are of another model: {different[0]} has shape "
            f"{tuple(weights[different[0]].shape)}, expected {expected[different[0]]}"
        )
    encoder = encoder_of(model)
    plain = encoder.uncompressed() if isinstance(encoder, Compressed) else encoder
    try:
        with torch.no_grad():
            plain.eval().forward_features(torch.empty(1, *input_size(plain), device="meta"))
    except Exception as error:  # sizes of parts that do not fit each other, of whatever kind
        raise ValueError(f"{path} describes a model that cannot run: {error!r}") from error


def _build(folder: Path, uncompressed: bool = False) -> Model:
    """The model that the folder's configuration describes, with random weights."""
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config["architecture"].startswith(PREFIX):
            registered_name(config["architecture"])
            if missing := [name for name in COMPRESSION if name not in config["model_args"]]:
                raise ValueError(f"model_args lacks {', '.join(missing)}")
        model = timm.create_model(f"local-dir:{folder}", pretrained=False)
        set_norm_eps(model, config.get("norm_eps"))
        if uncompressed and isinstance(model, Compressed):
            model = model.uncompressed()
        return Segmenter(model, **config["segmenter"]) if "segmenter" in config else model
    except Exception as error:  # whatever the arguments of some model lead to
        raise ValueError(f"{path} does not describe a model that this version can build: {error!r}") from error


def _load_weights(model: nn.Module, weights: dict[str, Tensor], path: str | os.PathLike) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the weights of {os.fspath(path)} are of another model: {error}") from error


def _check_same_model(model: nn.Module, rebuilt: nn.Module) -> None:
    wanted, found = _description(model), _description(rebuilt)
    different = [name for name in wanted | found if wanted.get(name) != found.get(name)]
    if different:
        shown = ", ".join(
            f"{name}: {wanted.get(name, 'absent')} became {found.get(name, 'absent')}" for name in different[:4]
        )
        raise ValueError(
            f"the model is not {model.pretrained_cfg['architecture']} with the arguments that timm recorded ({shown}); "
            "pass the arguments it was created with as model_args"
        )


def _description(model: nn.Module) -> dict[str, object]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()} | describe(model)


def _read_authors_file(path: str | os.PathLike) -> tuple[dict[str, Tensor], list[int]]:
    expected = "a Prune and Merge checkpoint is {'model': weights, 'channels': tokens per block}"
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint file at {os.fspath(path)}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise a dozen kinds for a broken file
        raise ValueError(f"{os.fspath(path)} is truncated or foreign; {expected}: {error}") from error
    if not isinstance(content, dict) or not {"model", "channels"} <= content.keys():
        raise ValueError(f"{os.fspath(path)} is foreign; {expected}")
    state, channels = content["model"], content["channels"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{os.fspath(path)}: 'model' must hold tensors by name")
    if not any(name.endswith(".attn.merge_matrix") for name in state):
        raise ValueError(f"{os.fspath(path)} has no merge matrices (blocks.0.attn.merge_matrix and so on); {expected}")
    return state, [int(tokens) for tokens in channels]


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
        matrix = parts[-1] if parts[0] == "blocks" and parts[2:3] == ["attn"] else None
        if matrix in ("merge_matrix", "recover_matrix", "token_mask"):
            matrices.setdefault(int(parts[1]), {})[matrix] = value.float()
        elif matrix != "bias" or len(parts) != 4:  # blocks.l.attn.bias is stored there, but never used
            weights[name] = value.float()
    try:
        dense = _build_dense(weights, num_heads, img_size)
    except (KeyError, IndexError) as error:
        raise ValueError(f"{os.fspath(path)} lacks the weight {error} of a Vision Transformer") from error
    _load_weights(dense, weights, path)
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
