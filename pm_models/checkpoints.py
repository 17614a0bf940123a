"""Models on disk: folders of safetensors and JSON."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_model
from timm.models import save_for_hf
from torch import Tensor, nn

from .card import model_card, replaces_card
from .compression import OPTIONS
from .description import describe
from .files import allow_default_mode, locked, unfinished
from .models import Model, compression_of, encoder_of, input_size, set_norm_eps, shared_norm_eps, uncompressed
from .registry import PREFIX, registered_name
from .segmenter import Segmenter
from .unwrapping import unwrapped
from .weights import load_state_file, load_weights, read_file, refusing

__all__ = ["load_pretrained", "load_state_file", "save_pretrained"]

CONFIG_NAME = "config.json"
CARD_NAME = "README.md"
WEIGHTS_NAME = "model.safetensors"


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    model_args: dict | None = None,
    results: Mapping[str, Mapping[str, object]] | None = None,
) -> None:
    """Save a timm VisionTransformer or Eva, or a Segmenter, compressed or not, as safetensors and JSON.

    The folder has the layout of timm's hub folders, with a model card. A compressed model is saved under its registered
    name, ``pm_<name>``, with its plan and options among the arguments: once this package is imported,
    ``timm.create_model("local-dir:<folder>", pretrained=True)`` makes it too. A Segmenter's options are in
    ``config.json`` under ``segmenter``; the rest describes its encoder. Before anything appears in ``folder``, the
    model is rebuilt from the configuration (without weights) and compared, so that what is written does load.

    Args:
        model: a model that ``timm.create_model`` made, or a Segmenter on one, so that its architecture has a name. Of a
            wrapper (``torch.compile``, DistributedDataParallel, accelerate, ...), the model inside is saved.
        folder: created if necessary; a model saved there before is replaced.
        model_args: arguments of ``timm.create_model`` that the model was made with, where timm did not record them.
        results: rows of numbers by model name, for the card.

    Raises:
        TypeError: a part of the model is wrapped on its own.
        ValueError: the model cannot be rebuilt from a name and arguments; the message names what differs.
        OSError: the files cannot be written; a model saved there before is left as it was.
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
    # Inside a folder that exists, because the folder around it may belong to someone else.
    with unfinished(folder / WEIGHTS_NAME if exists else folder) as staging:
        staging.mkdir()
        name = encoder.pretrained_cfg["architecture"].removeprefix(PREFIX)
        arguments = dict(model_args or {})
        if (compression := compression_of(model)) is not None:
            name = registered_name(name)
            arguments |= compression.to_dict()
        extra = {"pretrained_cfg": {"architecture": name}, "norm_eps": shared_norm_eps(encoder)}
        if isinstance(model, Segmenter):
            extra["segmenter"] = {"num_classes": model.num_classes, **model.options}
        try:
            save_for_hf(encoder, str(staging), model_config=extra, model_args=arguments, safe_serialization=True)
            if encoder is not model:
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
        with locked(folder):  # or one model's configuration could end up beside another's weights
            for name in (CARD_NAME, WEIGHTS_NAME, CONFIG_NAME):
                if name != CARD_NAME or replaces_card(folder / name):
                    os.replace(staging / name, folder / name)


def load_pretrained(folder: str | os.PathLike, *, uncompressed: bool = False) -> Model:
    """Load a model that :func:`save_pretrained` wrote: on the CPU, in evaluation mode, in the dtype it was saved in.

    Args:
        folder: the folder that it was saved to.
        uncompressed: leave out the plan and its matrices, and return the plain timm model with the same weights.

    Returns:
        The compressed model, the plain timm model if one was saved, or a :class:`Segmenter`.

    Raises:
        FileNotFoundError: the folder lacks ``config.json`` or ``model.safetensors``.
        ValueError: a file is truncated or foreign, or the two do not match.
    """
    folder = Path(folder)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a saved model: expected {CONFIG_NAME} and {WEIGHTS_NAME} in it")
    path = folder / WEIGHTS_NAME
    weights = read_file(path, "is truncated or not a safetensors file")
    _check_configuration(folder, weights)
    model = _build(folder, plain=uncompressed)
    if uncompressed:
        matrices = ("stages.", "encoder.stages.")
        weights = {name: value for name, value in weights.items() if not name.startswith(matrices)}
    load_weights(model, weights, str(path))
    return model.to(next(value for name, value in weights.items() if name.endswith("patch_embed.proj.weight"))).eval()


def _check_configuration(folder: Path, weights: dict[str, Tensor]) -> None:
    """Refuse a configuration that does not match the weights, before memory is allocated for the model."""
    path = folder / CONFIG_NAME
    with refusing(f"{path} does not describe a model that this version can build"):
        arguments = json.loads(path.read_text(encoding="utf-8")).get("model_args") or {}
        largest = max([len(weights), *(size for value in weights.values() for size in value.shape)])
        depth = arguments.get("depth", 0)
    if not isinstance(depth, int) or depth > largest:
        raise ValueError(f"{path} describes a model of depth {depth!r}, which {WEIGHTS_NAME} does not hold")
    with torch.device("meta"):
        model = _build(folder)
    expected = model.state_dict()
    for name, value in weights.items():
        if name in expected and value.shape != expected[name].shape:
            raise ValueError(
                f"the weights of {folder / WEIGHTS_NAME} are of another model: {name} has shape {tuple(value.shape)}, "
                f"expected {tuple(expected[name].shape)}"
            )
    plain = encoder_of(uncompressed(model)).eval()
    with refusing(f"{path} describes a model that cannot run"), torch.no_grad():
        plain.forward_features(torch.empty(1, *input_size(plain), device="meta"))


def _build(folder: Path, plain: bool = False) -> Model:
    """The model that the folder's configuration describes, with random weights."""
    path = folder / CONFIG_NAME
    with refusing(f"{path} does not describe a model that this version can build"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if "model_type" in config and "architecture" not in config:
            raise ValueError("it is a model of transformers: load it there, and convert it with pm_models.to_timm")
        if config["architecture"].startswith(PREFIX):
            registered_name(config["architecture"])
            if missing := [name for name in OPTIONS if name not in config["model_args"]]:
                raise ValueError(f"model_args lacks {', '.join(missing)}")
        model: Any = timm.create_model(f"local-dir:{folder}", pretrained=False)
        set_norm_eps(model, config.get("norm_eps"))
        model = uncompressed(model) if plain else model
        return Segmenter(model, **config["segmenter"]) if "segmenter" in config else model


def _check_same_model(model: Any, rebuilt: nn.Module) -> None:
    before, after = (
        {name: tuple(value.shape) for name, value in each.state_dict().items()} | describe(each)
        for each in (model, rebuilt)
    )
    different = [name for name in before | after if before.get(name) != after.get(name)]
    if different:
        shown = ", ".join(
            f"{name}: {before.get(name, 'absent')} became {after.get(name, 'absent')}" for name in different[:4]
        )
        raise ValueError(
            f"the model is not {model.pretrained_cfg['architecture']} with the arguments that timm recorded ({shown}); "
            "pass the arguments it was created with as model_args"
        )
