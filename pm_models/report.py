"""A page about a compressed model: what its tokens stand for in images, how fast it is, what is left of its answers."""

import base64
import io
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
import timm
import torch
import torch.nn.functional as F
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .data import Sample
from .measure import count_gmacs, speed_beside_dense
from .models import Model, compression_of, encoder_of, input_size, uncompressed
from .segmenter import Segmenter
from .training import measures
from .visualize import token_layers

_DRAWN = 12  # images
_BATCH = 8  # images at a time, to compare answers


def report_page(
    model: Model,
    samples: Mapping[str, Sample],
    *,
    name: str,
    dense: Model | None = None,
    dense_is: str = "",
    batches: Sequence[int] = (1, 2, 4, 8),
) -> str:
    """One HTML file that needs no other: tokens, what merges in images, speed and fidelity of a compressed model.

    Speed is measured on the model's device, by :func:`pm_models.measure.speed_beside_dense`.

    Args:
        model: compressed, in evaluation mode.
        samples: at least one image, by name, as :func:`pm_models.data.read_sample` gives them; the first twelve are
            drawn.
        name: of the model.
        dense: the model whose answers its own are compared with, on the same device: as it is without its plan, with
            whatever weights; ``None``: they are not compared.
        dense_is: in words, which model ``dense`` is, or why there is none.
        batches: images at a time, for the speed.

    Raises:
        ValueError: the model is not compressed.
    """
    size, compression = input_size(model), compression_of(model)
    if compression is None:
        raise ValueError("model must be compressed, got one without a plan")
    plain = uncompressed(model) if dense is None else dense
    speed = {batch: speed_beside_dense(model, plain, batch) for batch in tqdm(sorted({*batches}), "speed", leave=False)}
    fastest = max(max(row.values()) for row in speed.values())
    images = torch.stack([sample.image for sample in samples.values()])
    drawn = tqdm([*samples.items()][:_DRAWN], "images", leave=False)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["data_uri"] = _data_uri
    template = environment.from_string(files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    return template.render(
        name=name,
        architecture=encoder_of(model).pretrained_cfg["architecture"].removeprefix("pm_"),
        plan=compression.plan,
        patch_size=encoder_of(model).patch_embed.patch_size,
        gmacs={"dense": count_gmacs(plain, size), "compressed": count_gmacs(model, size)},
        speed=speed,
        ticks=[float(tick) for tick in MaxNLocator(4).tick_values(0, fastest)],
        images=[*samples],
        pictures={name: _picture(model, sample) for name, sample in drawn},
        answers=None if dense is None else compare_answers(model, dense, images),
        dense_is=dense_is,
        device=_device_name(encoder_of(model).patch_embed.proj.weight.device),
        versions=f"torch {torch.__version__}, timm {timm.__version__}",
    )


@torch.inference_mode()
def compare_answers(model: Any, dense: Any, images: Tensor) -> dict[str, list[float] | float]:
    """How near a model's answers to images (B, C, H, W) are to the dense model's.

    Returns:
        Of a classifier, for each image: ``cosine`` of the features that the head is given, and, where there is a head,
        ``same``, whether the class is. Of a Segmenter, for each image: ``pixels``, the percentage of pixels of the same
        class; and ``miou``, of all images, with the dense model's maps as labels.
    """
    found: dict[str, list[float]] = {}
    classes = model.num_classes
    confusion = torch.zeros(classes, classes, dtype=torch.long)
    for part in tqdm(images.split(_BATCH), "answers", leave=False):
        part = part.to(encoder_of(model).patch_embed.proj.weight)
        if isinstance(model, Segmenter):
            ours, theirs = (each(part).argmax(dim=1).flatten(1) for each in (model, dense))
            row = {"pixels": 100 * (ours == theirs).float().mean(dim=1)}
            pairs = (theirs * classes + ours).flatten()
            confusion += torch.bincount(pairs, minlength=classes**2).view(classes, classes).cpu()
        else:
            tokens = [each.forward_features(part) for each in (model, dense)]
            heads = (model.forward_head, dense.forward_head)
            ours, theirs = (head(x, pre_logits=True).flatten(1) for head, x in zip(heads, tokens, strict=True))
            row = {"cosine": F.cosine_similarity(ours.float(), theirs.float())}
            if classes:
                ours, theirs = (head(x).argmax(dim=1) for head, x in zip(heads, tokens, strict=True))
                row["same"] = ours == theirs
        for measure, values in row.items():
            found.setdefault(measure, []).extend(values.tolist())
    return found | ({"miou": measures(confusion).miou} if isinstance(model, Segmenter) else {})


def _picture(model: Model, sample: Sample) -> dict[str, object]:
    """The image in colours, and its layers."""
    picture = sample.picture if sample.picture.ndim == 3 else sample.picture[..., None].repeat(3, axis=-1)
    return {"picture": picture, "layers": token_layers(model, sample.image, picture)}


def _data_uri(pixels: np.ndarray) -> str:
    """An image (H, W, 3), or (H, W, 4) with its opacity, from 0 to 1."""
    kind = "jpeg" if pixels.shape[-1] == 3 else "png"
    content = io.BytesIO()
    Image.fromarray((255 * pixels).round().astype(np.uint8)).save(content, kind, quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' if threads > 1 else ''} of a CPU"
