"""Semantic segmentation on a plain or compressed encoder: Segmenter (Strudel et al., arXiv 2105.05633)."""

import copy
import itertools
import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .adaptive_plan import AdaptivePlan
from .plan import CompressionPlan
from .unwrapping import unwrapped
from .vision_transformer import Compressed, PlainModel, check_vision_transformer, compress

DECODERS = ("mask_transformer", "linear")


class LinearDecoder(nn.Module):
    """A linear layer from each patch's token to its class scores (section 3.2).

    Args:
        width: of the encoder's tokens.
        num_classes: classes to tell apart.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, num_classes)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, h*w, D) to (B, h*w, classes)."""
        return self.head(patches)


class MaskTransformer(nn.Module):
    """Blocks over the patches and one embedding per class; masks are their normalised scalar products (section 3.2).

    Parameters are named as in the published checkpoints.

    Args:
        width: of the encoder's tokens.
        num_classes: classes to tell apart.
        depth: blocks.
        num_heads: heads of each.
        drop_path_rate: of the last block; the others' grow to it.
        drop_rate: dropout of the blocks' projections.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        *,
        depth: int = 2,
        num_heads: int = 1,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        rates = [drop_path_rate * index / max(depth - 1, 1) for index in range(depth)]
        self.blocks = nn.ModuleList(
            Block(width, num_heads, qkv_bias=True, drop_path=rate, proj_drop=drop_rate, norm_layer=nn.LayerNorm)
            for rate in rates
        )
        self.cls_emb = nn.Parameter(torch.randn(1, num_classes, width))
        self.proj_dec = nn.Linear(width, width)
        self.proj_patch = nn.Parameter(width**-0.5 * torch.randn(width, width))
        self.proj_classes = nn.Parameter(width**-0.5 * torch.randn(width, width))
        self.decoder_norm = nn.LayerNorm(width)
        self.mask_norm = nn.LayerNorm(num_classes)
        trunc_normal_(self.cls_emb, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, h*w, D) to (B, h*w, classes)."""
        classes = self.cls_emb.shape[1]
        x = torch.cat([self.proj_dec(patches), self.cls_emb.expand(patches.shape[0], -1, -1)], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_norm(x)
        patches, embeddings = x[:, :-classes] @ self.proj_patch, x[:, -classes:] @ self.proj_classes
        masks = F.normalize(patches, dim=-1) @ F.normalize(embeddings, dim=-1).mT
        return self.mask_norm(masks)


def check_encoder(model: nn.Module) -> None:
    """Refuse any model that is not a timm VisionTransformer or Eva, compressed or not.

    Raises:
        TypeError: the model is of another class.
    """
    if not isinstance(model, Compressed):
        check_vision_transformer(model)


class Segmenter(nn.Module):
    """A Vision Transformer with a decoder from its patches to a map of classes.

    Weights are named ``encoder.*``, then as in timm, and ``decoder.*``, then as in the published checkpoints.

    Args:
        encoder: a timm VisionTransformer or Eva, plain or compressed; its head is not used. It is not copied.
        num_classes: classes to tell apart.
        decoder: ``"mask_transformer"`` or ``"linear"``.
        decoder_depth: blocks of the mask transformer.
        decoder_heads: heads of each; ``None``: heads of width 64, at least one.
        decoder_drop_path: stochastic depth in it.
        decoder_dropout: dropout in it.

    Raises:
        TypeError: ``encoder`` is neither.
        ValueError: ``decoder`` is unknown, a number is out of range, or patches do not cover the images.
    """

    PUBLISHED_NORM_EPS = 1e-5  # in the norms of the published encoders; timm's is 1e-6

    def __init__(
        self,
        encoder: nn.Module,
        num_classes: int,
        *,
        decoder: str = "mask_transformer",
        decoder_depth: int = 2,
        decoder_heads: int | None = None,
        decoder_drop_path: float = 0.0,
        decoder_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        encoder = unwrapped(encoder)
        check_encoder(encoder)
        if decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {', '.join(map(repr, DECODERS))}, got {decoder!r}")
        embed = encoder.patch_embed
        whole = all(side % patch == 0 for side, patch in zip(embed.img_size, embed.patch_size, strict=True))
        if not whole and not getattr(embed, "dynamic_img_pad", False):
            raise ValueError(
                f"encoder must take images whose sides (img_size) are multiples of its patches' "
                f"{' x '.join(map(str, embed.patch_size))} pixels, got {' x '.join(map(str, embed.img_size))}"
            )
        for name, value in (("num_classes", num_classes), ("decoder_depth", decoder_depth)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        width = encoder.embed_dim
        heads = decoder_heads or max(width // 64, 1)
        if width % heads:
            raise ValueError(f"decoder_heads must divide the encoder's width {width}, got {heads}")
        self.num_classes = num_classes
        self.encoder: PlainModel = encoder
        self.options = {
            "decoder": decoder,
            "decoder_depth": decoder_depth,
            "decoder_heads": heads,
            "decoder_drop_path": decoder_drop_path,
            "decoder_dropout": decoder_dropout,
        }
        self.decoder = (
            LinearDecoder(width, num_classes)
            if decoder == "linear"
            else MaskTransformer(
                width,
                num_classes,
                depth=decoder_depth,
                num_heads=heads,
                drop_path_rate=decoder_drop_path,
                drop_rate=decoder_dropout,
            )
        )
        self.decoder.to(embed.proj.weight).train(encoder.training)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that the encoder takes."""
        return tuple(self.encoder.patch_embed.img_size)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, classes, H, W), interpolated from those of the patches.

        Raises:
            ValueError: the images do not have the encoder's size.
        """
        height, width = images.shape[-2:]
        logits = self.patch_logits(images)
        rows, columns = self.encoder.patch_embed.patch_size
        # If the encoder pads images, patches reach beyond the image.
        padded = (logits.shape[-2] * rows, logits.shape[-1] * columns)
        return F.interpolate(logits, padded, mode="bilinear", align_corners=False)[..., :height, :width]

    def patch_logits(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, classes, h, w) on the grid of patches.

        Raises:
            ValueError: the images do not have the encoder's size.
        """
        size = tuple(images.shape[-2:])
        grid = tuple(self.encoder.patch_embed.grid_size)
        if getattr(self.encoder, "dynamic_img_size", False) and not isinstance(self.encoder, Compressed):
            grid = self.encoder.patch_embed.dynamic_feat_size(size)
        elif size != self.image_size:
            raise ValueError(
                f"images must be {self.image_size[0]} x {self.image_size[1]} pixels, got {size[0]} x {size[1]}; "
                "predict and sliding_window take larger ones"
            )
        patches = self.encoder.forward_features(images)[:, self.encoder.num_prefix_tokens :]
        return self.decoder(patches).transpose(1, 2).unflatten(2, grid)

    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's layer groups of the encoder, for a learning rate per layer; the decoder comes after them."""

        def of_encoder(pattern: str) -> str:
            return r"^encoder\.(?:" + re.sub(r"(^|[|(])\^", r"\1", pattern) + ")"

        groups = self.encoder.group_matcher(coarse)
        blocks = [(of_encoder(pattern), order) for pattern, order in groups["blocks"]]
        return {"stem": of_encoder(groups["stem"]), "blocks": blocks}

    def compressed(self, plan: CompressionPlan | AdaptivePlan, **options: Any) -> "Segmenter":
        """A copy whose encoder is compressed by a plan, with the ``options`` of :func:`pm_models.compress`.

        Raises:
            TypeError, ValueError: as :func:`pm_models.compress` does.
        """
        return copy.deepcopy(self.with_encoder(compress(self.encoder, plan, **options)))

    def uncompressed(self) -> "Segmenter":
        """A copy with the same weights and a plain encoder."""
        encoder = self.encoder
        return copy.deepcopy(self.with_encoder(encoder.uncompressed() if isinstance(encoder, Compressed) else encoder))

    def with_encoder(self, encoder: nn.Module) -> "Segmenter":
        """The same decoder, not copied, on another encoder of the same width."""
        model = copy.copy(unwrapped(self))
        model._modules = self._modules | {"encoder": encoder}
        return model


def sliding_window(
    model: nn.Module, images: Tensor, window: tuple[int, int], stride: int | None = None, *, batch_size: int = 8
) -> Tensor:
    """Logits for images at least as large as the window: for each pixel the average over all windows that cover it.

    Windows start at every multiple of the stride; the last of each row and column is flush with the edge.

    Args:
        model: images (B, 3, h, w) to logits (B, classes, h, w) for (h, w) = ``window``.
        images: (B, 3, H, W).
        window: (h, w) in pixels.
        stride: pixels from one window to the next; ``None``: the window's side less 32, as Segmenter is evaluated.
        batch_size: number of windows to run at a time.

    Returns:
        (B, classes, H, W).

    Raises:
        ValueError: the images are smaller than the window, or the stride leaves gaps.
    """
    height, width = images.shape[-2:]
    if height < window[0] or width < window[1]:
        raise ValueError(
            f"images must be at least as large as the window {window[0]} x {window[1]}, got {height} x {width}; "
            "enlarge them first"
        )
    strides = [max(side - 32, 1) for side in window] if stride is None else [stride, stride]
    for step, side in zip(strides, window, strict=True):
        if not 1 <= step <= side:
            raise ValueError(f"stride must be between 1 and the window's side {side}, got {step}")
    starts = (
        [*range(0, whole - side, step), whole - side]
        for whole, side, step in zip((height, width), window, strides, strict=True)
    )
    places = [
        (..., slice(top, top + window[0]), slice(left, left + window[1])) for top, left in itertools.product(*starts)
    ]
    crops = torch.stack([images[place] for place in places], dim=1).flatten(0, 1)
    logits = torch.cat([model(part) for part in crops.split(batch_size)]).unflatten(0, (len(images), len(places)))
    total = logits.new_zeros(len(images), logits.shape[2], height, width)
    count = logits.new_zeros(height, width)
    for index, place in enumerate(places):
        total[place] += logits[:, index]
        count[place] += 1
    return total / count


def predict(
    model: Segmenter,
    images: Tensor,
    size: tuple[int, int] | None = None,
    *,
    stride: int | None = None,
    scales: tuple[float, ...] = (1.0,),
    flip: bool = False,
    batch_size: int = 8,
) -> Tensor:
    """Class probabilities of each pixel, by sliding windows of the encoder's size.

    An image smaller than a window is enlarged to cover one. Probabilities are averaged over all scales and, with
    ``flip``, over mirrored images.

    Args:
        model: in evaluation mode.
        images: (B, 3, H, W), normalised.
        size: (height, width) of the result; ``None``: the images' size.
        stride: as in :func:`sliding_window`.
        scales: factors of the images' sides.
        flip: also mirror each image.
        batch_size: number of windows to run at a time.

    Returns:
        (B, classes, *size); the sum over the classes is 1.
    """
    size = tuple(images.shape[-2:]) if size is None else tuple(size)
    window, total = model.image_size, 0.0
    for scale in scales:
        scaled = _covering(images, scale, window)
        for mirrored in (False, True) if flip else (False,):
            given = scaled.flip(-1) if mirrored else scaled
            logits = sliding_window(model, given, window, stride, batch_size=batch_size)
            logits = F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)
            total = total + (logits.flip(-1) if mirrored else logits).softmax(dim=1)
    return total / (len(scales) * (1 + flip))


def _covering(images: Tensor, scale: float, window: tuple[int, int]) -> Tensor:
    """The images at the given scale, or at the smallest larger one at which they cover the window."""
    height, width = images.shape[-2:]
    scale = max(scale, window[0] / height, window[1] / width)
    size = (max(math.floor(height * scale + 0.5), window[0]), max(math.floor(width * scale + 0.5), window[1]))
    return images if size == (height, width) else F.interpolate(images, size, mode="bilinear", align_corners=False)
