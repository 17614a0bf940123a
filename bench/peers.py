"""Other ways to fewer tokens, written from their papers on timm's modules, as opponents in the benchmarks.

Each takes over a dense model's weights. Its blocks become one module, so that what passes between them besides the
tokens stays in local variables.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from pm_models import Segmenter
from pm_models.measure import count_gmacs
from pm_models.models import encoder_of, input_size

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
    """Which tokens merge, by their places: those that stay alone, and ``merged[i]`` into ``receiving[targets[i]]``."""

    kept: Tensor  # (B, K, 1)
    receiving: Tensor  # (B, T, 1)
    merged: Tensor  # (B, r, 1)
    targets: Tensor  # (B, r, 1), below T


Matcher = Callable[[Tensor, Tensor], Matching | None]


def match(metric: Tensor, r: int) -> Matching:
    """Bipartite soft matching (ToMe, arXiv 2210.09461, section 3): r edges of the greatest cosine similarity.

    Every token at an even place proposes the token at an odd place that is most like it; the class token, the first,
    proposes none. metric (B, N, d).
    """
    metric = F.normalize(metric, dim=-1)
    places = torch.arange(metric.shape[1], device=metric.device).expand(metric.shape[:2])
    return most_alike(metric[:, ::2] @ metric[:, 1::2].mT, places[:, ::2], places[:, 1::2], r)


def match_groups(metric: Tensor, sources: Tensor, receiving: Tensor, r: int) -> Matching:
    """Bipartite soft matching of the tokens at places ``sources`` (B, S) to those at ``receiving`` (B, T)."""
    metric = F.normalize(metric, dim=-1)
    return most_alike(take(metric, sources) @ take(metric, receiving).mT, sources, receiving, r)


def most_alike(similarity: Tensor, sources: Tensor, receiving: Tensor, r: int) -> Matching:
    """The r best edges of those from each of ``sources`` to its best of ``receiving``: similarity (B, S, T)."""
    similarity = similarity.masked_fill((sources == 0).unsqueeze(-1), -torch.inf)
    best, partner = similarity.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    merged, kept = order[:, :r], order[:, r:].sort(dim=-1).values
    chosen = sources.gather(1, kept), receiving, sources.gather(1, merged), partner.gather(1, merged)
    return Matching(*(places.unsqueeze(-1) for places in chosen))


def by_energy(metric: Tensor, margin: float) -> Tensor:
    """The places of the patches (B, N - 1) in the order of falling energy (PiToMe, arXiv 2405.16148).

    A patch's energy is the mean over all patches of f(cosine similarity), with f(s) = s from ``margin`` up, and
    exp(s - margin) - 1 below: high where many are like it. metric (B, N, d), the first token a class token.
    """
    normed = F.normalize(metric[:, 1:], dim=-1)
    similarity = normed @ normed.mT
    energy = torch.where(similarity >= margin, similarity, (similarity - margin).exp() - 1).mean(dim=-1)
    return energy.argsort(dim=-1, descending=True) + 1


def match_energetic(metric: Tensor, r: int, margin: float) -> Matching:
    """PiToMe: the 2 r patches of the highest energy merge in pairs, all others are protected.

    In the order of energy every second one takes in whichever of the others is most like it.
    """
    order = by_energy(metric, margin)
    matching = match_groups(metric, order[:, : 2 * r : 2], order[:, 1 : 2 * r : 2], r)
    others = F.pad(order[:, 2 * r :].sort(dim=-1).values, (1, 0))  # the class token before them
    return matching._replace(kept=others.unsqueeze(-1))


def match_by_rank(metric: Tensor, r: int, margin: float) -> Matching:
    """PiToMe's other form, in the authors' code: all patches take part, every second one of the order by energy."""
    order = by_energy(metric, margin)
    return match_groups(metric, F.pad(order[:, ::2], (1, 0)), order[:, 1::2], r)


def match_by_size(metric: Tensor, sizes: Tensor, r: int) -> Matching:
    """Bipartite soft matching of the smaller half of the patches, and the class token, to the larger half.

    So that no two large tokens merge. Of equal sizes (B, N) every other one is in each half.
    """
    patches = sizes.shape[1] - 1
    alternating = torch.arange(patches, device=sizes.device) % 2 == 0
    order = (2 * sizes[:, 1:] + alternating).argsort(dim=-1, stable=True) + 1
    small = order[:, : patches // 2].sort(dim=-1).values
    large = order[:, patches // 2 :].sort(dim=-1).values
    return match_groups(metric, F.pad(small, (1, 0)), large, r)


def match_windows(x: Tensor, windows: Tensor, count: int) -> Matching:
    """The first step of ALGM (arXiv 2406.09936): the windows whose patches are most alike, each into its first patch.

    Alike is the mean cosine similarity of all pairs in a window. x (B, N, D), windows (W, 4) places.
    """
    normed = F.normalize(x[:, windows], dim=-1)  # (B, W, 4, D)
    order = (normed @ normed.mT).sum(dim=(2, 3)).argsort(dim=1, descending=True)
    alike, alone = windows[order[:, :count]], windows[order[:, count:]]  # (B, count, 4), (B, W - count, 4)
    prefix = torch.arange(x.shape[1] - windows.numel(), device=x.device).expand(len(x), -1)
    kept = torch.cat([prefix, alone.flatten(1).sort(dim=-1).values], dim=1)
    targets = torch.arange(count, device=x.device).repeat_interleave(3).expand(len(x), -1)
    chosen = kept, alike[:, :, 0], alike[:, :, 1:].flatten(1), targets
    return Matching(*(places.unsqueeze(-1) for places in chosen))


def take(x: Tensor, places: Tensor) -> Tensor:
    """The tokens of x (B, N, D) at places (B, K) or (B, K, 1)."""
    return x.gather(1, places.view(*places.shape[:2], 1).expand(-1, -1, x.shape[-1]))


def merge_by(matching: Matching, x: Tensor) -> Tensor:
    """Sums of the tokens of x (B, N, D) that merge: those that stay alone, then those that take others in."""
    targets = matching.targets.expand(-1, -1, x.shape[-1])
    sums = take(x, matching.receiving).scatter_add(1, targets, take(x, matching.merged))
    return torch.cat([take(x, matching.kept), sums], dim=1)


def moved(matching: Matching, places: Tensor) -> Tensor:
    """Where the tokens at ``places`` (B, N), among those before the merge, are after it."""
    kept, receiving, merged, targets = (indices.squeeze(-1) for indices in matching)
    after = torch.arange(kept.shape[1] + receiving.shape[1], device=places.device).expand(len(places), -1)
    after = torch.cat([after, kept.shape[1] + targets], dim=1)
    return torch.empty_like(after).scatter(1, torch.cat([kept, receiving, merged], dim=1), after).gather(1, places)


class Tokens:
    """Tokens x (B, N, D) and their sizes (B, N, 1).

    Where they are ``tracked``, also which of them each of the first ones is in: places (B, first N).
    """

    def __init__(self, x: Tensor, tracked: bool = True) -> None:
        self.x, self.sizes = x, x.new_ones(*x.shape[:2], 1)
        self.places = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]) if tracked else None

    def merge(self, matching: Matching) -> None:
        """Merged tokens are the means of all their members."""
        total, self.sizes = merge_by(matching, self.x * self.sizes), merge_by(matching, self.sizes)
        self.x = total / self.sizes
        if self.places is not None:
            self.places = moved(matching, self.places)

    def full_map(self) -> Tensor:
        """Every first token's merged one; all that there are where they are not tracked."""
        return self.x if self.places is None else take(self.x, self.places)


class MergingBlocks(nn.Module):
    """Fewer tokens in every block by a matching of its keys, each attended to in proportion to its members.

    ``matchings`` have one function for each block, of the mean of the heads' keys (B, N, d) and the sizes (B, N), to a
    matching or ``None``. With ``full_map`` every token gets its merged one after the last block.
    """

    def __init__(self, blocks: nn.Module, matchings: list[Matcher], full_map: bool) -> None:
        super().__init__()
        self.blocks, self.matchings, self.full_map = nn.ModuleList(blocks), matchings, full_map

    def forward(self, x: Tensor, **_: object) -> Tensor:
        tokens = Tokens(x, tracked=self.full_map)
        for block, matching in zip(self.blocks, self.matchings, strict=True):
            sizes = tokens.sizes.squeeze(-1)
            attended = attend(block, tokens.x, sizes.log())
            tokens.x = tokens.x + attended.out
            if (found := matching(attended.keys.mean(dim=1), sizes)) is not None:
                tokens.merge(found)
            tokens.x = feed_forward(block, tokens.x)
        return tokens.full_map()


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
    """ALGM (arXiv 2406.09936): after the first block, 2 x 2 patches become their mean where most alike.

    Those are the ``count`` windows of each image whose patches have the greatest cosine similarity to each other. In
    its second step, after half of the blocks, ``later`` of what is left merge by bipartite soft matching. After the
    last block every patch gets the token that it is in. The paper's thresholds are fixed counts here.
    """

    def __init__(self, blocks: nn.Module, grid: tuple[int, int], prefix: int, count: int, later: int = 0) -> None:
        super().__init__()
        self.blocks, self.count, self.later = nn.ModuleList(blocks), count, later
        rows, columns = (side // 2 for side in grid)
        places = torch.arange(4 * rows * columns).view(rows, 2, columns, 2).permute(0, 2, 1, 3).reshape(-1, 4)
        self.register_buffer("windows", prefix + places, persistent=False)  # the patches of each window

    def forward(self, x: Tensor, **_: object) -> Tensor:
        tokens = Tokens(self.blocks[0](x))
        tokens.merge(match_windows(tokens.x, self.windows, self.count))
        middle = len(self.blocks) // 2
        for block in self.blocks[1:middle]:
            tokens.x = block(tokens.x)
        if later := min(self.later, (tokens.x.shape[1] - 1) // 2):
            tokens.merge(match(tokens.x, later))
        for block in self.blocks[max(1, middle) :]:
            tokens.x = block(tokens.x)
        return tokens.full_map()


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


def tome(model: VisionTransformer, r: int, full_map: bool = False) -> VisionTransformer:
    """Token Merging: r tokens fewer in every block. With ``full_map`` the model gives all tokens, as the others do."""

    def matching(keys: Tensor, _: Tensor) -> Matching | None:
        count = min(r, (keys.shape[1] - 1) // 2)
        return match(keys, count) if count > 0 else None

    return _with_blocks(model, lambda blocks: MergingBlocks(blocks, [matching] * len(blocks), full_map))


def pitome(
    model: VisionTransformer, keep_rate: float, full_map: bool = False, protect: bool = True
) -> VisionTransformer:
    """PiToMe: every block keeps this share of its patches; the margin falls from 0.9 in the first to 0.

    ``protect`` as the paper's algorithm has it: patches of low energy never merge.
    """
    matching_of = match_energetic if protect else match_by_rank

    def matching(keys: Tensor, _: Tensor, margin: float) -> Matching | None:
        patches = keys.shape[1] - 1
        count = min(int(patches - patches * keep_rate), patches // 2)
        return matching_of(keys, count, margin) if count > 0 else None

    depth = len(model.blocks)
    matchings = [partial(matching, margin=0.9 - 0.9 * block / depth) for block in range(depth)]
    return _with_blocks(model, lambda blocks: MergingBlocks(blocks, matchings, full_map))


def atm(model: VisionTransformer, r: int, full_map: bool = False) -> VisionTransformer:
    """ATM (arXiv 2505.15160) at fixed counts: ToMe that minds sizes in the last blocks, here the last sixth of them.

    The paper adapts the counts to each batch by a threshold for each layer, which is left out: the comparison is at
    equal GMACs.
    """

    def matching(keys: Tensor, sizes: Tensor, by_size: bool) -> Matching | None:
        count = min(r, (keys.shape[1] - 1) // 2)
        if count <= 0:
            return None
        return match_by_size(keys, sizes, count) if by_size else match(keys, count)

    depth = len(model.blocks)
    matchings = [partial(matching, by_size=6 * block >= 5 * depth) for block in range(depth)]
    return _with_blocks(model, lambda blocks: MergingBlocks(blocks, matchings, full_map))


def evit(model: VisionTransformer, keep_rate: float) -> VisionTransformer:
    return _with_blocks(model, lambda blocks: EViTBlocks(blocks, keep_rate))


def dynamic_vit(model: VisionTransformer, keep_rate: float) -> VisionTransformer:
    return _with_blocks(model, lambda blocks: DynamicViTBlocks(blocks, keep_rate, model.embed_dim))


def merges_per_block(encoder: VisionTransformer) -> list[int]:
    """The settings that ToMe and ATM can have: how many tokens merge in each block."""
    return list(range(1, 2 * encoder.patch_embed.num_patches // len(encoder.blocks)))


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


def local_merge(model: Model, count: int, later: int = 0) -> Model:
    """Of a model with an even number of rows and columns of patches; ``later`` with a class token alone."""
    other = copy.deepcopy(model)
    encoder = encoder_of(other)
    grid, prefix = encoder.patch_embed.grid_size, encoder.num_prefix_tokens
    encoder.blocks = nn.Sequential(LocalMergeBlocks(encoder.blocks, grid, prefix, count, later))
    return other


def _with_blocks(model: VisionTransformer, wrap: Callable[[nn.Module], nn.Module]) -> VisionTransformer:
    other = copy.deepcopy(model)
    other.blocks = nn.Sequential(wrap(other.blocks))
    return other
