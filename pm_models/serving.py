"""Prepare models for serving: compile for every batch size before the first request."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .models import frozen, input_size
from .unwrapping import unwrapped


def warmup(
    model: nn.Module, batch_sizes: Sequence[int] = (1, 8), *, dtype: torch.dtype | None = None
) -> Callable[[Tensor], Tensor]:
    """Compile a model for inference and run it at the given batch sizes, so that no request waits for compilation.

    A compressed model is served with its current matrices, see ``freeze``; the given model itself is not frozen. One
    compiled graph serves batches of 1, another all larger ones, so that other batch sizes need no compilation either.
    On a GPU every given batch size is replayed as a CUDA graph; for another one the graph is recorded at its first use.

    Args:
        model: a timm VisionTransformer or Eva, or a :class:`Segmenter`, compressed or not, on its device, or a wrapper
            of one (``torch.compile``, accelerate, ...); it is put into evaluation mode.
        batch_sizes: the batch sizes to expect.
        dtype: the dtype of mixed precision (autocast), such as ``torch.bfloat16``; ``None``: no autocast.

    Returns:
        A function from images (B, C, H, W) to logits, without gradients.

    Raises:
        ValueError: ``batch_sizes`` is empty or has one below 1.
    """
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"batch_sizes must be at least one number, each at least 1, got {list(batch_sizes)}")
    model = frozen(unwrapped(model.eval()))
    like = next(model.parameters())
    on_gpu = like.device.type == "cuda"
    single = torch.compile(model, dynamic=False, mode="reduce-overhead" if on_gpu else "default")
    several = torch.compile(model, dynamic=True, mode="reduce-overhead" if on_gpu else "default")

    def serve(images: Tensor) -> Tensor:
        compiled = single if images.shape[0] == 1 else several
        with torch.inference_mode(), torch.autocast(like.device.type, dtype, enabled=dtype is not None):
            logits = compiled(images)
        return logits.clone() if on_gpu else logits  # the next replay overwrites it

    for count in sorted(set(batch_sizes)):
        images = torch.zeros(count, *input_size(model), dtype=like.dtype, device=like.device)
        if count > 1:
            torch._dynamo.mark_dynamic(images, 0)
            for side in (1, 2, 3):
                torch._dynamo.mark_static(images, side)
        for _ in range(3 if on_gpu else 1):  # compile, record, replay
            serve(images)
    return serve
