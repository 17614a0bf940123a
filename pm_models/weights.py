"""Read weights from the files that timm, DeiT, Lightning and others write, and load them into models."""

import itertools
import os
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from timm.models import adapt_input_conv, eva, vision_transformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .vision_transformer import PlainModel

# Keys under which training scripts store weights, in order of preference: averaged ones before the last step's.
_HOLDERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "module", "teacher", "student")
# What torch.compile, FSDP and activation checkpointing insert anywhere in names, and prefixes of a whole model.
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PREFIXES = ("module.", "model.")
_PIECE = re.compile(r"-\d{5}-of-(?!00001)\d{5}\b|\.index\.json$")
_OTHER_FORMATS = {".gguf", ".h5", ".hdf5", ".index", ".json", ".msgpack", ".npy", ".npz", ".onnx", ".pb", ".pt2"}
_HEAD = {"attn_pool", "fc_norm", "head", "head_dist"}  # timm's modules that read the tokens


class _Unread:
    """A placeholder for objects that a file holds besides its weights; it accepts and drops any state."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


# Training scripts store arguments and metrics with the weights. No code of these classes runs.
_UNREAD = [
    (_Unread, f"{module}.{name}")
    for modules, names in (
        (["argparse"], ["Namespace"]),
        (["numpy.core.multiarray", "numpy._core.multiarray"], ["scalar", "_reconstruct"]),
        (["numpy"], ["dtype", "ndarray"]),
        (["pathlib", "pathlib._local"], ["PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"]),
    )
    for module, name in itertools.product(modules, names)
]


def load_state_file(path: str | os.PathLike) -> dict[str, Tensor]:
    """The weights in a ``.safetensors`` file, or in one of ``torch.save`` as timm, DeiT, Lightning and others write it.

    Anything else that a training script stores is ignored. Prefixes that DDP, ``torch.compile`` or Lightning put before
    all names are removed: ``module.``, ``_orig_mod.``, ``model.``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, one of several shards, of another format, or holds no weights. Pickled code
            is never run.
    """
    content = read_file(path, "is truncated or not a checkpoint that loads without running code")
    for _ in range(3):  # bounded, because a file may contain itself
        content = next((content[key] for key in _HOLDERS if _holds(content, key)), content)
    if not is_weights(content):
        raise ValueError(f"{os.fspath(path)} holds no weights: expected tensors by name, or such a dict under 'model'")
    return without_wrappers(content)


def load_checkpoint(model: PlainModel, path: str | os.PathLike, *, new_head: bool = False) -> None:
    """Load the weights of a file into a timm model, renamed and resized by timm's own rules.

    Args:
        model: the model, changed in place.
        path: a file that :func:`load_state_file` reads, or an ``.npz`` of the original JAX weights.
        new_head: keep the model's own head, with a warning, if the file has none or one for other classes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or holds the weights of another model; the message says how it differs.
    """
    path = Path(path)
    if path.suffix == ".npz" and path.is_file() and isinstance(model, VisionTransformer):
        _load_npz(model, path, new_head)
        return
    refusal = f"{path} does not hold the weights of {model.pretrained_cfg.get('architecture', 'the model')}"
    weights = _of_encoder(load_state_file(path))
    renamed = partial(vision_transformer.checkpoint_filter_fn, adapt_layer_scale=True)
    try:
        weights = (eva.checkpoint_filter_fn if isinstance(model, eva.Eva) else renamed)(weights, model)
        patches, in_chans = "patch_embed.proj.weight", model.patch_embed.proj.in_channels
        if patches in weights and weights[patches].shape[1] != in_chans:  # as timm does with pretrained weights
            weights[patches] = adapt_input_conv(in_chans, weights[patches], base_chans=weights[patches].shape[1])
        classes = len(weights["head.weight"]) if "head.weight" in weights else 0
    except Exception as error:  # of names and shapes that timm did not expect, of whatever kind
        raise ValueError(f"{refusal}: {_about_positions(model, weights, error)}") from error
    if new_head or not model.num_classes:
        weights = _with_own_head(model, weights)
    different = _different_names(model, weights)
    if all(_is_head(name) for name in different):
        check_head(str(path), classes, model.num_classes, new_head=new_head)
    if different:
        raise ValueError(f"{refusal}: {_differences(model, weights)}")
    load_weights(model, weights, str(path))


def check_head(source: str, classes: int, wanted: int, *, new_head: bool) -> None:
    """Warn about weights whose head has another number of classes than the model, or refuse them; 0 means no head.

    Raises:
        ValueError: the numbers differ, and ``new_head`` is not set.
    """
    if wanted in (0, classes):
        return
    head = f"a head for {classes} classes" if classes else "no head"
    difference = f"{source} has {head}, and the model is for {wanted}"
    if new_head:
        warnings.warn(f"{difference}: the head starts anew", stacklevel=2)
        return
    way = f"give --num-classes {classes}, or train" if classes else "train"
    raise ValueError(f"{difference}: {way} a new one first, with pm-vit train")


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load weights that must match the model exactly; ``source`` says in errors where they come from.

    Raises:
        ValueError: they are of another model; the message counts and names the differences.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        difference = _differences(model, weights) or cause(error)
        raise ValueError(f"the weights of {source} are of another model: {difference}") from error


def arguments_of(weights: dict[str, Tensor]) -> dict[str, object]:
    """Arguments of ``timm.create_model`` derived from weights: sizes, classes, biases, layer scale.

    Raises:
        KeyError: a weight of a Vision Transformer is missing.
        ValueError: a block's number is too large.
    """
    width, in_chans, *patch_size = weights["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    if depth > len(weights):  # before memory is allocated for them
        raise ValueError(f"it has a weight of block {depth - 1}, but no more than {len(weights)} weights")
    return {
        "patch_size": tuple(patch_size),
        "in_chans": in_chans,
        "num_classes": len(weights["head.weight"]) if "head.weight" in weights else 0,
        "embed_dim": width,
        "depth": depth,
        "mlp_ratio": mlp_ratio(len(weights["blocks.0.mlp.fc1.weight"]), width),
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        **({"init_values": 1e-5} if "blocks.0.ls1.gamma" in weights else {}),
    }


def mlp_ratio(hidden: int, width: int) -> float:
    """The ``mlp_ratio`` from which timm computes ``hidden``."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


@contextmanager
def refusing(refusal: str) -> Iterator[None]:
    """Turn an error of any kind into a one-line ValueError that says what is refused and why.

    For other libraries' code, which raises a dozen kinds where names, shapes or files are not what it expects.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{refusal}: {cause(error)}") from error


def cause(error: Exception) -> str:
    """An error's message in one line, without terminal codes and without torch's text around the cause."""
    text = str(error) if str(error) and not isinstance(error, KeyError) else repr(error)
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).split("WeightsUnpickler error:")[-1].split(" In PyTorch 2.6")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    line = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    return line if len(line) <= 300 else f"{line[:300]} ..."


def read_file(path: str | os.PathLike, refusal: str) -> Any:
    """The content of a file, with an :class:`_Unread` in place of objects that are not needed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read; the message is ``refusal`` and the reason.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a file of weights such as model.safetensors or model.pth")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    if _PIECE.search(path.name):
        raise ValueError(f"{path} is one of several files of a checkpoint (shards): save the weights as one file first")
    if path.suffix.lower() in _OTHER_FORMATS:
        raise ValueError(f"{path} has an unsupported format: expected .safetensors, or what torch.save wrote")
    try:
        with path.open("rb") as file:
            start = file.read(9)
        if path.suffix.lower() == ".safetensors" or start[8:] == b"{":
            return load_file(path)
        if not start.startswith((b"PK", b"\x80")):
            raise ValueError("it does not begin as a file of torch.save does")
        if start.startswith(b"PK") and not zipfile.is_zipfile(path):
            raise ValueError("its end is missing")
        with torch.serialization.safe_globals(_UNREAD), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and safetensors raise a dozen kinds for a broken file
        raise ValueError(f"{path} {refusal}: {_what_needs_code(path, error) or cause(error)}") from error


def _what_needs_code(path: Path, error: Exception) -> str:
    """The classes and functions that a ``torch.save`` file cannot be read without, and what to do about them."""
    try:
        with torch.serialization.safe_globals(_UNREAD):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a file from torch before 1.6, or a broken one
        names = re.findall(r"GLOBAL (\S+) w", str(error))
    if not names:
        return ""
    shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
    return f"it holds {shown}; save the weights alone, torch.save(model.state_dict(), ...)"


def _holds(content: object, key: str) -> bool:
    return isinstance(content, dict) and isinstance(content.get(key), dict) and bool(content[key])


def is_weights(content: object) -> bool:
    """Whether the content is a dict of at least one tensor by name."""
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())
    )


def without_wrappers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names that they have in the model inside all wrappers."""
    # torch.optim.swa_utils.AveragedModel also stores a counter.
    weights = {name: value for name, value in weights.items() if name != "n_averaged"}
    names = [_WRAPPERS.sub("", name) for name in weights]
    while prefix := next((start for start in _PREFIXES if names and all(name.startswith(start) for name in names)), ""):
        names = [name.removeprefix(prefix) for name in names]
    return dict(zip(names, weights.values(), strict=True)) if len(set(names)) == len(names) else weights


def _of_encoder(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the one Vision Transformer in a larger model, such as a Lightning module's ``backbone.``."""
    first = "patch_embed.proj.weight"
    prefixes = [name.removesuffix(first) for name in weights if name.endswith(f".{first}")]
    # timm extracts those of OpenCLIP itself, with the head that belongs to them.
    if first in weights or len(prefixes) != 1 or prefixes[0].startswith("visual."):
        return weights
    return {name.removeprefix(prefixes[0]): value for name, value in weights.items() if name.startswith(prefixes[0])}


def _with_own_head(model: PlainModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with the model's own head where theirs differs, and without a head that the model lacks."""
    expected = model.state_dict()
    missing, unexpected = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    if model.num_classes and "fc_norm.weight" in missing and "norm.weight" in unexpected:
        # A better start than a new norm; timm does the same for EVA.
        weights = {re.sub(r"^norm\.", "fc_norm.", name): value for name, value in weights.items()}
    other = [name for name in _different_names(model, weights) if _is_head(name)]
    own = {name: expected[name] for name in other if name in expected}
    return {name: value for name, value in weights.items() if name not in other} | own


def _is_head(name: str) -> bool:
    return name.split(".")[0] in _HEAD


def _load_npz(model: VisionTransformer, path: Path, new_head: bool) -> None:
    with refusing(f"{path} is not a checkpoint in JAX's layout of the model"):
        with np.load(path, allow_pickle=False) as arrays:
            classes = next((len(arrays[name]) for name in arrays.files if name.endswith("head/bias")), 0)
        model.load_pretrained(str(path))
    check_head(str(path), classes, model.num_classes, new_head=new_head)


def _different_names(model: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    """Names that the model or the weights lack, and names whose shapes differ."""
    wanted, given = ({name: value.shape for name, value in of.items()} for of in (model.state_dict(), weights))
    return [name for name in wanted | given if wanted.get(name) != given.get(name)]


def _differences(model: nn.Module, weights: dict[str, Tensor]) -> str:
    """How weights differ from the model's: the number of differences, and the first few with their shapes."""
    expected, different = model.state_dict(), _different_names(model, weights)

    def shapes(name: str) -> str:
        return " instead of ".join(str(tuple(of[name].shape)) for of in (weights, expected) if name in of)

    kinds = {
        "Missing keys": [name for name in different if name not in weights],
        "Unexpected keys": [name for name in different if name not in expected],
        "Other shapes": [name for name in different if name in weights and name in expected],
    }
    return "; ".join(
        f"{kind} ({len(names)}): {', '.join(f'{name} {shapes(name)}' for name in names[:3])}"
        + (", ..." if len(names) > 3 else "")
        for kind, names in kinds.items()
        if names
    )


def _about_positions(model: PlainModel, weights: dict[str, Tensor], error: Exception) -> str:
    """Why positions cannot be resized: different prefix tokens, or patches that form no square."""
    expected = model.state_dict()
    reasons = []
    for name, tokens in (("cls_token", "class"), ("dist_token", "distillation"), ("reg_token", "register")):
        if (name in weights) != (name in expected):
            has, other = ("no", "one") if name in expected else ("a", "none")
            reasons.append(f"it has {has} {tokens} token, and the model has {other}")
    if not reasons and "pos_embed" in weights and "pos_embed" in expected:
        shapes = (tuple(of["pos_embed"].shape) for of in (weights, expected))
        reasons = ["its pos_embed {} cannot be resized to {}".format(*shapes)]
    if "cls_token" in expected.keys() - weights.keys():
        reasons.append("--model-kwargs class_token=False global_pool=avg makes a model without")
    return "; ".join(reasons) or cause(error)
