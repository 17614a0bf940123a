"""Load models by what a user names: a folder saved by pm-vit, a published Segmenter's folder, or a timm name."""

import difflib
from pathlib import Path
from typing import Any

import timm

from .checkpoints import CONFIG_NAME, load_pretrained
from .models import Model
from .published import VARIANT_NAME, load_segmenter_checkpoint
from .segmenter import check_encoder
from .vision_transformer import PlainModel
from .weights import refusing

_SOURCES = ("hf-hub", "hf_hub", "local-dir")  # prefixes of timm's names for models from elsewhere


def load_model(source: str | Path, *, option: str | None = None) -> Model:
    """The model in a folder, with its weights, or the timm model of a name, with random ones.

    Args:
        source: a folder that :func:`~pm_models.save_pretrained` wrote, that of a published Segmenter, or a timm name.
        option: the command-line option that gave ``source``, for error messages. ``None``: only folders are accepted.

    Raises:
        FileNotFoundError: it is a folder without a model, or there is no such folder.
        ValueError: a file in it is broken or foreign, or timm has no model of that name.
        TypeError: the timm model is not a Vision Transformer that can be compressed.
    """
    path = Path(source)
    if option is not None and not path.is_dir():
        check_name(str(source), option)
        return make_model(str(source), option)
    if (path / VARIANT_NAME).is_file() and not (path / CONFIG_NAME).is_file():
        return load_segmenter_checkpoint(path)
    return load_pretrained(path)


def check_name(name: str, option: str) -> None:
    """Refuse a name that is neither a folder nor a timm model, and suggest similar names.

    Raises:
        ValueError: it is not a timm model, and has no prefix of a hub or folder that timm should look in.
    """
    if name.partition(":")[0].lower() in _SOURCES or timm.is_model(name):
        return
    similar = timm.list_models(f"*{name}*")[:3] or difflib.get_close_matches(name, timm.list_models(), 3)
    similar = similar or ([f"hf-hub:{name}"] if "/" in name else [])
    hint = f"; did you mean {', '.join(similar)}?" if similar else ""
    raise ValueError(f"{option} {name} is neither a saved folder nor a timm model{hint}")


def make_model(name: str, option: str, **arguments: Any) -> PlainModel:
    """The timm model that an option names; arguments that are ``None`` take timm's defaults.

    Raises:
        ValueError: timm cannot make it, because of an argument, a folder or a hub.
        TypeError: it is not a Vision Transformer that can be compressed.
    """
    with refusing(f"{option} {name} cannot be made"):
        model: Any = timm.create_model(name, **{key: value for key, value in arguments.items() if value is not None})
    check_encoder(model)
    return model
