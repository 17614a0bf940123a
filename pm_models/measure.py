"""Speed and cost of models: throughput side by side, and multiply-accumulates."""

import copy
import random
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .models import Model, encoder_of, evaluating, input_size, tokens_of
from .segmenter import Segmenter
from .unwrapping import unwrapped


def alternate(functions: Mapping[str, Callable[[], object]], rounds: int, synchronize: bool) -> dict[str, list[float]]:
    """Seconds of ``rounds`` calls of each function, taken in turn, so that drift of the machine affects all alike.

    The order changes from round to round, because a function may find in the cache what the one before it left there.
    Each is first called twice without being timed. ``synchronize`` waits for the CUDA device around every call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order = random.Random(0)
    for round_ in range(-2, rounds):
        for name, function in order.sample(list(functions.items()), len(functions)):
            if synchronize:
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if synchronize:
                torch.cuda.synchronize()
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def throughput(models: Mapping[str, nn.Module], images: Tensor, *, rounds: int = 10) -> dict[str, float]:
    """Images per second of each model in inference on ``images`` (B, 3, H, W): the median over alternating rounds."""
    with torch.inference_mode():
        seconds = alternate({name: partial(model, images) for name, model in models.items()}, rounds, images.is_cuda)
    return {name: len(images) / statistics.median(times) for name, times in seconds.items()}


def speed_beside_dense(model: Model, dense: Model, batch: int) -> dict[str, float]:
    """Images per second of a compressed model, of the dense one, and of an ``ideal``, alternated, at a batch size.

    The ideal is the dense model with as many tokens in each block as the compressed model has there, and no work to get
    them.

    Args:
        model: compressed, in evaluation mode; it runs on random images on its device.
        dense: as it is without its plan, on the same device.
        batch: images at a time.
    """
    encoder, planned = encoder_of(dense), tokens_of(model)
    weight = encoder.patch_embed.proj.weight
    images = torch.randn(batch, *input_size(dense)).to(weight)
    tokens = {count: torch.randn(batch, count, encoder.embed_dim).to(weight) for count in {*planned}}
    around = copy.copy(encoder)
    around._modules = encoder._modules | {"blocks": nn.Sequential()}
    around = dense.with_encoder(around) if isinstance(dense, Segmenter) else around

    def ideal() -> None:
        around(images)
        for block, count in zip(encoder.blocks.children(), planned, strict=True):
            block(tokens[count])

    calls: dict[str, Callable[[], object]] = {
        "dense": partial(dense, images),
        "compressed": partial(model, images),
        "ideal": ideal,
    }
    with torch.inference_mode():
        seconds = alternate(calls, max(5, 24 // batch), images.is_cuda)
    return {name: batch / statistics.median(times) for name, times in seconds.items()}


def count_gmacs(model: nn.Module, image_size: tuple[int, ...]) -> float:
    """Billions of multiply-accumulates for one image (channels, height, width), from torch's FLOP counter.

    For a single block, ``image_size`` is the shape of its tokens (N, D). A wrapper (``torch.compile``,
    DistributedDataParallel, accelerate, ...) counts as the model inside.
    """
    model = unwrapped(model)
    like = next(model.parameters())
    image = torch.zeros(1, *image_size, dtype=like.dtype, device=like.device)
    # With all weights frozen, because torch's counter fails on a parameter that is a module's input, and with attention
    # as two matrix products, which every version of torch counts.
    with evaluating(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(image)  # static matrices are computed now, and not counted
        with FlopCounterMode(display=False) as counter:
            model(image)
    return counter.get_total_flops() / 2e9
