"""Gradient-weighted attention scores of a Vision Transformer's tokens, without an attention matrix."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import fusable_attentions, fuse, fused_attentions
from .compression import Compression
from .data.loaders import images_and_targets
from .models import compression_of, encoder_of, evaluating, tokens_of
from .modules import replace_module
from .unwrapping import unwrapped
from .vision_transformer import PlainModel, check_vision_transformer


def score_tokens(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    batches: int,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Tensor:
    """Score every patch token in every block by the gradient-weighted attention that it receives.

    For block ``l`` and token ``j``: the sum over batches of
    ``|sum over images, heads, queries of A * dLoss/dA| / (B * H * N)`` at ``A``'s column ``j``
    (arXiv 2503.23455, section 3). It is the gradient of a gate on that column, so attention stays fused.

    A compressed model can be scored too, for another round of compression. A block then scores its merged tokens, and
    the block's reconstruct matrix turns these into scores of all patches, ``|R| s``. A patch that it prunes scores 0.

    Under ``torch.distributed`` every process scores batches of its own, and all return the sum.

    Args:
        model: a timm VisionTransformer or Eva, or a :class:`Segmenter`, on any device, compressed or not, or a wrapper
            of one (``torch.compile``, DistributedDataParallel, accelerate, ...). It is left as it was.
        loader: yields (images (B, 3, H, W), targets).
        batches: how many batches to take from this process's loader, at least 1 over all processes. A shorter loader
            is used up, with a warning.
        loss_fn: called as ``loss_fn(logits, targets)``, returns a scalar.

    Returns:
        (L, patches) float32 on the CPU, prefix tokens left out.

    Raises:
        TypeError: the model is of another class, or a batch is not a pair of tensors.
        ValueError: ``batches`` is below 1, the loader is empty, images are not (B, C, H, W), or a block's attention has
            no fused form.
    """
    model = unwrapped(model)
    encoder = encoder_of(model)
    compression = compression_of(model)
    _check_can_be_scored(encoder, compression)
    shared = torch.distributed.is_available() and torch.distributed.is_initialized()
    if batches < (0 if shared else 1):
        raise ValueError(f"batches must be at least 1, got {batches}")
    like = next(model.parameters())
    counts = tokens_of(model)
    # In float64, so that the order of batches and processes makes no difference once rounded to float32.
    scores = [torch.zeros(count, dtype=torch.float64) for count in counts]
    heads = [next(iter(_attentions(block).values())).num_heads for block in encoder.blocks]
    taken = 0
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model), _gated(encoder, counts) as gates:
        for batch in loader if batches else ():
            images, targets = images_and_targets(batch)
            if images.dim() != 4:
                raise ValueError(
                    "loader must yield batches (images, targets) with images (B, C, H, W), got images "
                    f"{tuple(images.shape)}"
                )
            loss = loss_fn(model(images.to(like.device)), targets.to(like.device))
            for index, gradient in enumerate(torch.autograd.grad(loss, gates)):
                weight = len(images) * heads[index] * counts[index]
                scores[index] += gradient.float().abs().cpu().double() / weight
            taken += 1
            if taken == batches:
                break
    if 0 < taken < batches:
        warnings.warn(f"the loader gave {taken} of the {batches} batches asked for", stacklevel=2)
    if shared:
        totals = torch.cat([*scores, torch.tensor([float(taken)])]).to(like.device)
        torch.distributed.all_reduce(totals)
        *scores, taken = totals.cpu().split([*counts, 1])
        taken = int(taken)
    if taken == 0:
        raise ValueError("loader is empty: expected at least one batch of (images, targets)")
    if compression is not None:
        plan = encoder.plan
        blocks = (index for index in range(len(scores)) if plan.stage_of(index) is not None)
        for index, reconstruct in zip(blocks, encoder.reconstruct_matrices(), strict=True):
            scores[index] = reconstruct.detach().abs().cpu().double() @ scores[index]
    return torch.stack(scores)[:, encoder.num_prefix_tokens :].float()


def _check_can_be_scored(encoder: PlainModel, compression: Compression | None) -> None:
    if compression is None:
        check_vision_transformer(encoder)
    elif compression.adaptive:
        raise ValueError(
            "model has an AdaptivePlan, which merges different tokens in each image; score model.uncompressed()"
        )
    for index, block in enumerate(encoder.blocks):
        if not _attentions(block):
            raise ValueError(
                f"block {index} is a {type(block).__name__} without timm's Attention, so its tokens cannot be scored"
            )


def _attentions(block: nn.Module) -> dict[str, Any]:
    return fusable_attentions(block) | fused_attentions(block)


@contextmanager
def _gated(encoder: PlainModel, counts: list[int]) -> Iterator[list[Tensor]]:
    """Put a gate of ones on the keys of every block, ``counts`` of them, and take it off at the end."""
    like = next(encoder.parameters())
    # A float32 gate sums the gradients of half-precision values in float32.
    dtype = torch.promote_types(like.dtype, torch.float32)
    gates = [torch.ones(count, dtype=dtype, device=like.device, requires_grad=True) for count in counts]
    replaced = []
    try:
        for block, gate in zip(encoder.blocks, gates, strict=True):
            for name, attention in _attentions(block).items():
                bias = getattr(attention, "key_bias", None)
                replace_module(block, name, fuse(attention, key_bias=bias, token_gate=gate))
                replaced.append((block, name, attention))
        yield gates
    finally:
        for block, name, attention in replaced:
            replace_module(block, name, attention)
