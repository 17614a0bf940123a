"""What the tests share: small models and plans with ugly sizes."""

import math
from pathlib import Path

import pytest
import timm
import torch
import yaml
from timm.models.vision_transformer import VisionTransformer

from pm_kernels.reference import merges_by_round
from pm_models import CompressionPlan

# Triton's interpreter computes with numpy, which warns of what a GPU gives without a word: 0 * inf, inf - inf.
ON_KERNELS = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # Triton 3.6
]


def skip_without_kernels() -> None:
    """Skip the module, or the test, where neither a GPU nor Triton's interpreter can run kernels."""
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        from interpreted import fault

        if found := fault():
            pytest.skip(f"Triton's interpreter does not work: {found}", allow_module_level=True)


def small_vit(name: str = "vit_tiny_patch16_224", **arguments) -> VisionTransformer:
    """A ViT of width 32 with a 7 x 5 grid of patches, random biases and norms, in evaluation mode."""
    arguments = {
        "img_size": (28, 20),
        "patch_size": 4,
        "embed_dim": 32,
        "depth": 5,
        "num_heads": 2,
        "num_classes": 7,
    } | arguments
    model = timm.create_model(name, **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def plan_for(model: VisionTransformer, keep_rate: float = 0.4, prune_rate: float = 0.3, **arguments) -> CompressionPlan:
    """A plan from random scores for the model's grid."""
    grid = tuple(model.patch_embed.grid_size)
    scores = torch.rand(len(model.blocks), grid[0] * grid[1])
    return CompressionPlan.from_scores(
        scores, grid, keep_rate, prune_rate, num_prefix_tokens=model.num_prefix_tokens, **arguments
    )


def images_for(model: VisionTransformer, batch: int = 3) -> torch.Tensor:
    weight = model.patch_embed.proj.weight
    return torch.randn(batch, model.in_chans, *model.patch_embed.img_size, dtype=weight.dtype)


def attention_written_out(q, k, v, merge=None, gate=None, key_bias=None, scale=None, merge_queries=True):
    """The contract, with the attention matrix in memory."""
    if merge is not None:
        q = torch.einsum("cn,bhnd->bhcd", merge, q) if merge_queries else q
        k = torch.einsum("cn,bhnd->bhcd", merge, k)
        v = torch.einsum("cn,bhnd->bhcd", merge, v)
    logits = torch.einsum("bhid,bhjd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if key_bias is not None:
        logits = logits + key_bias.expand(*k.shape[:-1])[:, :, None, :]
    weights = logits.exp() / logits.exp().sum(dim=-1, keepdim=True)
    if gate is not None:
        weights = weights * gate.expand(*k.shape[:-1])[:, :, None, :]
    return torch.einsum("bhij,bhjd->bhid", weights, v)


def transition_written_out(x, matrix, rows, carried=None, update=None, weight=None, bias=None, eps=1e-6):
    """The contract of a transition, for a dense matrix."""
    state = x if update is None else x + update
    state = state if carried is None else torch.cat([state, carried], dim=1)
    mixed = torch.einsum("mn,bnd->bmd", matrix, state)
    y, rest = mixed[:, :rows], mixed[:, rows:]
    if weight is None:
        return y, rest
    centred = y - y.mean(-1, keepdim=True)
    return y, rest, centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def matched_one_by_one(features, sizes, tokens, prefix, rounds, root_sizes=False):
    """Segments (B, N) and sizes (B, C), by the words of the definition."""
    images = zip(features.double(), sizes.tolist(), strict=True)
    found = [_matched_image(*image, tokens, prefix, rounds, 0.5 if root_sizes else 1.0) for image in images]
    segments, merged_sizes = zip(*found, strict=True)
    return torch.tensor(segments, dtype=torch.int32), torch.tensor(merged_sizes)


def _matched_image(features, sizes, tokens, prefix, rounds, power):
    clusters = [([place], sizes[place], features[place]) for place in range(prefix, len(features))]
    for count in merges_by_round(len(clusters), tokens - prefix, rounds):
        sources, targets = clusters[::2], clusters[1::2]
        proposals = []
        for source, (_, n, f) in enumerate(sources):
            costs = [
                (n * m) ** power / (n**power + m**power) * (f - g).square().sum().item() for _, m, g in targets
            ] or [math.inf]
            costs = [math.inf if math.isnan(cost) else cost for cost in costs]
            proposals.append((min(costs), source, costs.index(min(costs))))
        merging = {source: target for _, source, target in sorted(proposals)[:count]}
        clusters = [cluster for source, cluster in enumerate(sources) if source not in merging]
        for place, target in enumerate(targets):
            members = [target, *(sources[source] for source, into in merging.items() if into == place)]
            total = sum(n for _, n, _ in members)
            mean = sum(n * f for _, n, f in members) / total
            clusters.append(([place for places, _, _ in members for place in places], total, mean))
    segments = list(range(len(features)))
    for index, (places, _, _) in enumerate(clusters):
        for place in places:
            segments[place] = prefix + index
    return segments, sizes[:prefix] + [total for _, total, _ in clusters]


def packed_qkv(batch, heads, tokens, width, dtype=torch.float64):
    """Views of one packed projection, as a ViT makes them."""
    qkv = torch.randn(batch, tokens, 3, heads, width, dtype=dtype, requires_grad=True)
    return qkv.permute(2, 0, 3, 1, 4).unbind(0), qkv


def published_segmenter(folder: Path, decoder="mask_transformer", distilled=False, compressed=(), size=(16, 24)):
    """A toy of width 128, two heads, patches of 4, written in the published layout; its weights."""
    width, patch, depth, classes = 128, 4, 3, 6
    tokens = 1 + distilled + size[0] * size[1] // patch**2

    def random(*shape):
        return 0.2 * torch.randn(shape)

    weights = {
        "encoder.cls_token": random(1, 1, width),
        "encoder.pos_embed": random(1, tokens, width),
        "encoder.patch_embed.proj.weight": random(width, 3, patch, patch),
        "encoder.patch_embed.proj.bias": random(width),
        "encoder.norm.weight": 1 + random(width),
        "encoder.norm.bias": random(width),
        "encoder.head.weight": random(1000, width),
        "encoder.head.bias": random(1000),
    }
    if distilled:
        weights["encoder.dist_token"] = random(1, 1, width)
        weights["encoder.head_dist.weight"], weights["encoder.head_dist.bias"] = random(1000, width), random(1000)
    blocks = [f"encoder.blocks.{index}" for index in range(depth)]
    if decoder == "linear":
        weights |= {"decoder.head.weight": random(classes, width), "decoder.head.bias": random(classes)}
    else:
        blocks += [f"decoder.blocks.{index}" for index in range(2)]
        weights |= {
            "decoder.cls_emb": random(1, classes, width),
            "decoder.proj_dec.weight": random(width, width),
            "decoder.proj_dec.bias": random(width),
            "decoder.proj_patch": random(width, width),
            "decoder.proj_classes": random(width, width),
            "decoder.decoder_norm.weight": 1 + random(width),
            "decoder.decoder_norm.bias": random(width),
            "decoder.mask_norm.weight": 1 + random(classes),
            "decoder.mask_norm.bias": random(classes),
        }
    for block in blocks:
        for name, out, inner in (
            ("attn.qkv", 3 * width, width), ("attn.proj", width, width), ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):  # fmt: skip
            weights[f"{block}.{name}.weight"] = 0.5 * random(out, inner)
            weights[f"{block}.{name}.bias"] = random(out)
        for name in ("norm1", "norm2"):
            weights[f"{block}.{name}.weight"], weights[f"{block}.{name}.bias"] = 1 + random(width), random(width)
    plan = CompressionPlan.from_scores(
        torch.rand(depth, tokens - 1 - distilled), (size[0] // patch, size[1] // patch), 0.5, 0.2,
        num_prefix_tokens=1 + distilled,
    )  # fmt: skip
    for block in compressed:
        name = f"encoder.blocks.{block}.attn"
        merge, recover = plan.merge_matrix(block), plan.reconstruct_matrix(block)
        weights[f"{name}.merge_matrix"] = merge + 0.05 * torch.randn_like(merge)
        weights[f"{name}.recover_matrix"] = recover + 0.05 * torch.randn_like(recover)
        weights[f"{name}.token_mask"] = plan.token_mask(block)
    folder.mkdir()
    torch.save({"model": weights, "epoch": 3}, folder / "checkpoint.pth")
    variant = {
        "inference_kwargs": {"window_size": size[0], "window_stride": size[0] - 32},
        "net_kwargs": {
            "backbone": "vit_tiny_patch16_384",
            "d_model": width,
            "decoder": {"name": decoder, "n_layers": 2, "drop_path_rate": 0.0, "dropout": 0.1, "n_cls": classes},
            "distilled": distilled,
            "drop_path_rate": 0.1,
            "dropout": 0.0,
            "image_size": list(size),
            "n_cls": classes,
            "n_heads": 2,
            "n_layers": depth,
            "normalization": "vit",
            "patch_size": patch,
        },
    }
    (folder / "variant.yml").write_text(yaml.safe_dump(variant))
    return weights
