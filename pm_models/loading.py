"""Models by what a user calls them: a folder that was saved here, a published Segmenter's, or a name of timm's."""

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

_SOURCES = ("hf-hub", "hf_hub", "local-dir")  # of timm's names of models that it does not have itself


def load_model(source: str | Path, *, option: str | None = None) -> Model:
    """The model of a folder, with its weights, or of a name of timm's, with random ones.

    Args:
        source: a folder that :func:`~pm_models.save_pretrained` wrote, or that of a published Segmenter; or a name.
        option: the name of the option that ``source`` was given to, for errors. ``None``: only a folder will do.

    Raises:
        FileNotFoundError: it is a folder without a model, or there is no such folder.
        ValueError: a file in it is broken or foreign, or timm makes no model of that name.
        TypeError: timm's is no Vision Transformer that can be compressed.
    """
    path = Path(source)
    if option is not None and not path.is_dir():
        check_name(str(source), option)
        return make_model(str(source), option)
    if (path / VARIANT_NAME).is_file() and not (path / CONFIG_NAME).is_file():
        return load_segmenter_checkpoint(path)
    return load_pretrained(path)


def check_name(name: str, option: str) -> None:
    """Refuse what is neither a folder nor a name that timm makes a model of, with names like it.

    Raises:
        ValueError: it is none of timm's models, and says of no hub or folder that timm is to look in.
    """
    if name.partition(":")[0].lower() in _SOURCES or timm.is_model(name):
        return
    similar = timm.list_models(f"*{name}*")[:3] or difflib.get_close_matches(name, timm.list_models(), 3)
    similar = similar or ([f"hf-hub:{name}"] if "/" in name else [])
    hint = f"; did you mean {', '.join(similar)}?" if similar else ""
    raise ValueError(f"{option} {name} is neither a saved folder nor a timm model{hint}")


def make_model(name: str, option: str, **arguments: Any) -> PlainModel:
    """The model of timm that an option names; arguments of ``None`` are timm's own.

    Raises:
        ValueError: timm cannot make it: of an argument, a folder or a hub.
        TypeError: it is no Vision Transformer that can be compressed.
    """
    with refusing(f"{option} {name} cannot be made"):
        model: Any = timm.create_model(name, **{key: value for key, value in arguments.items() if value is not None})
    check_encoder(model)
    return model
