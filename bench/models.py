"""The models that a benchmark compares: the same weights dense, compressed in both executions, ideal, and the peers."""

import copy
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn

from pm_models import AdaptivePlan, CompressionPlan, Segmenter, compress
from pm_models.measure import count_gmacs
from pm_models.models import input_size

from .peers import Model, dynamic_vit, evit, local_merge, matched, merges_per_block, tome

KEEP_RATE, PRUNE_RATE = 0.6, 0.1
SEGMENTER_KEEP_RATE = 0.7
RATES = [percent / 100 for percent in range(20, 101)]


class FirstTokens(nn.Module):
    """Lets the first tokens pass: a plain ViT with fewer tokens, which is as fast as compression can get."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : self.tokens].contiguous()


class Compared(NamedTuple):
    """Models by name, their GMACs of one image, and the settings of those that were matched to ours."""

    models: dict[str, Model]
    gmacs: dict[str, float]
    settings: dict[str, float]

    def to(self, device: str) -> "Compared":
        return self._replace(models={name: model.to(device) for name, model in self.models.items()})


def compared_segmenters() -> Compared:
    """``ours``, ``dense_eager``, ``literal`` and ``local_merge`` for Segmenter-L at 640 pixels and keep rate 0.7."""
    torch.manual_seed(0)
    encoder = timm.create_model("vit_large_patch16_384", img_size=640, num_classes=0)
    dense = Segmenter(encoder, 150).eval()
    grid = tuple(encoder.patch_embed.grid_size)
    scores = torch.rand(len(encoder.blocks), grid[0] * grid[1])
    plan = CompressionPlan.from_scores(scores, grid, SEGMENTER_KEEP_RATE, PRUNE_RATE)
    ours, literal = dense.compressed(plan), dense.compressed(plan)
    literal.encoder.execution = "literal"
    models = {"ours": ours, "dense_eager": dense, "literal": literal}
    gmacs = {name: count_gmacs(model, (3, 640, 640)) for name, model in models.items()}
    windows = list(range(0, grid[0] * grid[1] // 4 + 1, 20))
    models["local_merge"], count = matched(local_merge, dense, windows, gmacs["ours"])
    gmacs["local_merge"] = count_gmacs(models["local_merge"], (3, 640, 640))
    return Compared(models, gmacs, {"local_merge": count})


def compared_adaptive(name: str) -> Compared:
    """``ours`` with an AdaptivePlan for 0.62 of the GMACs, ``dense_eager``, ``ideal`` and ``tome``.

    ``ideal`` is the dense model, each block of which is given the first of as many tokens as ours, with no more done.
    """
    torch.manual_seed(0)
    dense = timm.create_model(name, img_size=224).eval()
    plan = AdaptivePlan.for_model(dense)
    ours, ideal, size = compress(dense, plan), copy.deepcopy(dense), input_size(dense)
    for block, tokens in plan.merges.items():
        ideal.blocks[block] = nn.Sequential(FirstTokens(tokens), ideal.blocks[block])
    models = {"ours": ours, "dense_eager": dense, "ideal": ideal}
    gmacs = {name: count_gmacs(model, size) for name, model in models.items()}
    models["tome"], count = matched(tome, dense, merges_per_block(dense), gmacs["ours"])
    gmacs["tome"] = count_gmacs(models["tome"], size)
    return Compared(models, gmacs, {"tome": count})


def compared_models(name: str) -> Compared:
    """``ours``, ``dense_eager``, ``literal``, ``ideal``, ``tome``, ``evit`` and ``dynamicvit``, on random scores.

    ``ideal`` is the dense model on its first C tokens, with C the mean of the compressed model's tokens per block.
    """
    torch.manual_seed(0)
    dense = timm.create_model(name).eval()
    grid = tuple(dense.patch_embed.grid_size)
    scores = torch.rand(len(dense.blocks), grid[0] * grid[1])
    plan = CompressionPlan.from_scores(scores, grid, KEEP_RATE, PRUNE_RATE, num_prefix_tokens=dense.num_prefix_tokens)
    ours, literal, ideal = compress(dense, plan), compress(dense, plan), copy.deepcopy(dense)
    literal.execution = "literal"
    ideal.patch_drop = FirstTokens(round(sum(plan.tokens) / plan.depth))
    models = {"ours": ours, "dense_eager": dense, "literal": literal, "ideal": ideal}
    size = (3, *dense.patch_embed.img_size)
    gmacs = {name: count_gmacs(model, size) for name, model in models.items()}
    settings = {}
    for name, make, tried in (
        ("tome", tome, merges_per_block(dense)),
        ("evit", evit, RATES),
        ("dynamicvit", dynamic_vit, RATES),
    ):
        models[name], settings[name] = matched(make, dense, tried, gmacs["ours"])
        gmacs[name] = count_gmacs(models[name], size)
    return Compared(models, gmacs, settings)
