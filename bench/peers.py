"""Other ways to fewer tokens, written from their papers on timm's modules, as opponents in the benchmarks.

Each takes over a dense model's weights. Its blocks become one module, so that what passes between them besides the
tokens stays in local variables.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from pm_models import Segmenter
from pm_models.measure import count_gmacs
from pm_models.models import input_size

Model = VisionTransformer | Segmenter


class Attended(NamedTuple):
    """An attention's output (B, N, D), and the queries and keys (B, H, N, d) that it came from."""

    out: Tensor
    queries: Tensor
    keys: Tensor


def attend(block: Block, x: Tensor, key_bias: Tensor | None = None) -> Attended:
    """The block's attention of its normed input, with ``key_bias`` (B, N) on the logits, by PyTorch's fused kernel."""
    attention = block.attn
    batch, tokens, _ = x.shape
    qkv = attention.qkv(block.norm1(x)).view(batch, tokens, 3, attention.num_heads, attention.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    bias = None if key_bias is None else key_bias[:, None, None, :].to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(batch, tokens, -1)
    return Attended(block.drop_path1(block.ls1(attention.proj(out))), q, k)


def feed_forward(block: Block, x: Tensor) -> Tensor:
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


class Matching(NamedTuple):
    """Which tokens merge: of those at even places, ``kept`` and ``merged``; ``targets`` among those at odd places."""

    kept: Tensor  # (B, even - r, 1)
    merged: Tensor  # (B, r, 1)
    targets: Tensor  # (B, r, 1)


def match(metric: Tensor, r: int) -> Matching:
    """Bipartite soft matching (ToMe, arXiv 2210.09461, section 3): r edges of the greatest cosine similarity.

    Every token at an even place proposes the token at an odd place that is most like it; the class token, the first,
    proposes none. metric (B, N, d).
    """
    metric = F.normalize(metric, dim=-1)
    similarity = metric[:, ::2] @ metric[:, 1::2].mT
    class_token = torch.arange(similarity.shape[1], device=metric.device) == 0
    similarity = similarity.masked_fill(class_token[:, None], -torch.inf)
    best, partner = similarity.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    merged, kept = order[:, :r], order[:, r:].sort(dim=-1).values
    return Matching(kept.unsqueeze(-1), merged.unsqueeze(-1), partner.gather(1, merged).unsqueeze(-1))


def merge_by(matching: Matching, x: Tensor) -> Tensor:
    """Sums of the tokens of x (B, N, D) that merge: those kept at even places, then those at odd places."""
    even, odd = x[:, ::2], x[:, 1::2]
    kept, merged, targets = (indices.expand(-1, -1, x.shape[-1]) for indices in matching)
    return torch.cat([even.gather(1, kept), odd.scatter_add(1, targets, even.gather(1, merged))], dim=1)


class ToMeBlocks(nn.Module):
    """Token Merging: r tokens fewer in every block, each the mean of its members, attended to in proportion to them."""

    def __init__(self, blocks: nn.Module, r: int) -> None:
        super().__init__()
        self.blocks, self.r = nn.ModuleList(blocks), r

    def forward(self, x: Tensor, **_: object) -> Tensor:
        sizes = x.new_ones(*x.shape[:2], 1)
        for block in self.blocks:
            attended = attend(block, x, sizes.squeeze(-1).log())
            x = x + attended.out
            r = min(self.r, (x.shape[1] - 1) // 2)
            if r > 0:
                matching = match(attended.keys.mean(dim=1), r)
                total, sizes = merge_by(matching, x * sizes), merge_by(matching, sizes)
                x = total / sizes
            x = feed_forward(block, x)
        return x


class EViTBlocks(nn.Module):
    """EViT (arXiv 2202.07800): in some blocks the tokens that the class token attends to stay, the others become one.

    Their sum, weighted by the class token's attention (equation 3), is the last token.
    """

    def __init__(self, blocks: nn.Module, keep_rate: float) -> None:
        super().__init__()
        self.blocks, self.keep_rate = nn.ModuleList(blocks), keep_rate

    def forward(self, x: Tensor, **_: object) -> Tensor:
        reduced = reducing_blocks(len(self.blocks))
        for index, block in enumerate(self.blocks):
            attended = attend(block, x)
            x = x + attended.out
            if index in reduced:
                x = keep_attentive(x, class_attention(block, attended), self.keep_rate)
            x = feed_forward(block, x)
        return x


def class_attention(block: Block, attended: Attended) -> Tensor:
    """How much the class token attends to each other token, the mean of the heads: (B, N - 1)."""
    logits = attended.queries[:, :, :1] @ attended.keys.mT * block.attn.scale
    return logits.softmax(dim=-1)[:, :, 0, 1:].mean(dim=1)


def keep_attentive(x: Tensor, attention: Tensor, keep_rate: float) -> Tensor:
    """The class token, the share of the others (B, N - 1) with the most attention, and one for the rest."""
    count = -(-round(1000 * keep_rate * attention.shape[1]) // 1000)
    order = attention.argsort(dim=1, descending=True)
    patches = x[:, 1:]
    kept = patches.gather(1, order[:, :count, None].expand(-1, -1, x.shape[-1]))
    if count == patches.shape[1]:
        return torch.cat([x[:, :1], kept], dim=1)
    rest = patches.gather(1, order[:, count:, None].expand(-1, -1, x.shape[-1]))
    weights = attention.gather(1, order[:, count:]).unsqueeze(-1)
    return torch.cat([x[:, :1], kept, (weights * rest).sum(dim=1, keepdim=True).to(x.dtype)], dim=1)


class LocalMergeBlocks(nn.Module):
    """The first step of ALGM (arXiv 2406.09936): after the first block, 2 x 2 patches become their mean where alike.

    Those are the ``count`` windows of each image whose patches have the greatest cosine similarity to each other. After
    the last block every patch gets its window's token.
    """

    def __init__(self, blocks: nn.Module, grid: tuple[int, int], count: int) -> None:
        super().__init__()
        self.blocks, self.count = nn.ModuleList(blocks), count
        rows, columns = (side // 2 for side in grid)
        places = torch.arange(4 * rows * columns).view(rows, 2, columns, 2).permute(0, 2, 1, 3).reshape(-1, 4)
        self.register_buffer("places", places, persistent=False)  # the patches of each window

    def forward(self, x: Tensor, **_: object) -> Tensor:
        x = self.blocks[0](x)
        prefix = x.shape[1] - self.places.numel()
        first, patches = x[:, :prefix], x[:, prefix:]
        windows = patches[:, self.places]  # (B, windows, 4, D)
        normed = F.normalize(windows, dim=-1)
        order = (normed @ normed.mT).sum(dim=(2, 3)).argsort(dim=1, descending=True)
        merged, single = order[:, : self.count], order[:, self.count :]

        def of(chosen: Tensor) -> Tensor:
            return windows.gather(1, chosen[:, :, None, None].expand(-1, -1, *windows.shape[2:]))

        x = torch.cat([first, of(merged).mean(dim=2), of(single).flatten(1, 2)], dim=1)
        for block in self.blocks[1:]:
            x = block(x)
        first, means, others = x.split([prefix, self.count, 4 * single.shape[1]], dim=1)
        restored = torch.cat([means.unsqueeze(2).expand(-1, -1, 4, -1), others.unflatten(1, (-1, 4))], dim=1)
        places = self.places[order].flatten(1)[:, :, None].expand(-1, -1, x.shape[-1])
        return torch.cat([first, torch.empty_like(patches).scatter(1, places, restored.flatten(1, 2))], dim=1)


class DynamicViTBlocks(nn.Module):
    """DynamicViT (arXiv 2106.02034) in inference: before some blocks a small network says which tokens stay.

    Its networks are untrained here: their cost is that of trained ones.
    """

    def __init__(self, blocks: nn.Module, keep_rate: float, width: int) -> None:
        super().__init__()
        self.blocks, self.keep_rate = nn.ModuleList(blocks), keep_rate
        self.predictors = nn.ModuleList(Predictor(width) for _ in reducing_blocks(len(self.blocks)))

    def forward(self, x: Tensor, **_: object) -> Tensor:
        patches, reduced = x.shape[1] - 1, reducing_blocks(len(self.blocks))
        for index, block in enumerate(self.blocks):
            if index in reduced:
                stage = reduced.index(index)
                count = max(1, int(patches * self.keep_rate ** (stage + 1)))
                x = keep_highest(x, self.predictors[stage](x[:, 1:]), count)
            x = block(x)
        return x


class Predictor(nn.Module):
    """The score of each token from what it holds and from what all hold: (B, N, D) -> (B, N)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.local = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.score = nn.Sequential(
            nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, width // 4), nn.GELU(),
            nn.Linear(width // 4, 2),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        own, shared = self.local(x).chunk(2, dim=-1)
        features = torch.cat([own, shared.mean(dim=1, keepdim=True).expand_as(own)], dim=-1)
        return self.score(features).log_softmax(dim=-1)[..., 0]


def keep_highest(x: Tensor, scores: Tensor, count: int) -> Tensor:
    """The class token and the ``count`` others of the highest scores (B, N - 1)."""
    indices = scores.topk(count, dim=1).indices.unsqueeze(-1)
    return torch.cat([x[:, :1], x[:, 1:].gather(1, indices.expand(-1, -1, x.shape[-1]))], dim=1)


def reducing_blocks(depth: int) -> list[int]:
    """The blocks that reduce tokens: after each quarter of them, as EViT and DynamicViT have it for twelve."""
    return [depth * quarter // 4 for quarter in (1, 2, 3)]


def tome(model: VisionTransformer, r: int) -> VisionTransformer:
    return _with_blocks(model, lambda blocks: ToMeBlocks(blocks, r))


def evit(model: VisionTransformer, keep_rate: float) -> VisionTransformer:
    return _with_blocks(model, lambda blocks: EViTBlocks(blocks, keep_rate))


def dynamic_vit(model: VisionTransformer, keep_rate: float) -> VisionTransformer:
    return _with_blocks(model, lambda blocks: DynamicViTBlocks(blocks, keep_rate, model.embed_dim))


def matched(
    make: Callable[[Model, float], Model],
    model: Model,
    settings: list[float],
    gmacs: float,
) -> tuple[Model, float]:
    """``make(model, setting)`` with the setting whose GMACs come closest, and the setting.

    GMACs rise along ``settings``, or fall.
    """
    size = input_size(model)
    counted: dict[int, float] = {}

    def distance(index: int) -> float:
        if index not in counted:
            counted[index] = count_gmacs(make(model, settings[index]), size) - gmacs
        return counted[index]

    low, high = 0, len(settings) - 1
    rising = distance(high) > distance(low)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if (distance(middle) > 0) == rising else (middle, high)
    best = min((low, high), key=lambda index: abs(distance(index)))
    return make(model, settings[best]), settings[best]


def local_merge(model: Segmenter, count: int) -> Segmenter:
    """Of a Segmenter with an even number of rows and columns of patches."""
    other = copy.deepcopy(model)
    grid = other.encoder.patch_embed.grid_size
    other.encoder.blocks = nn.Sequential(LocalMergeBlocks(other.encoder.blocks, grid, count))
    return other


def _with_blocks(model: VisionTransformer, wrap: Callable[[nn.Module], nn.Module]) -> VisionTransformer:
    other = copy.deepcopy(model)
    other.blocks = nn.Sequential(wrap(other.blocks))
    return other
