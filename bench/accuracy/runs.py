"""What is trained and compared, and with which settings."""

from dataclasses import dataclass, field

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

KEEP_RATES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
PRUNE_RATE = 0.1
VARIANTS_AT = 0.6  # the keep rate at which the variants are compared
VARIANTS_OF_PRETRAINED_AT = 0.7


@dataclass(frozen=True)
class Setting:
    """The dense model, how it is trained, and how it and all that is made of it are fine-tuned.

    Images are in pixels, ``lr`` and ``tune_lr`` peaks of AdamW before a cosine to 0, and ``layer_decay`` is of both.
    ``tune_images`` is how many of the training images are fine-tuned on, ``None`` all. ``pretrained`` means the encoder
    of :mod:`.pretrained`, whose patch, width, depth and heads these are. Each model is timed ``rounds`` times.
    """

    image: int
    patch: int
    width: int
    depth: int
    heads: int
    batch: int
    epochs: int
    lr: float
    tune_epochs: int
    tune_lr: float
    smaller_images: tuple[int, ...] = ()
    weight_decay: float = 0.05
    warmup_epochs: int = 2
    score_batches: int = 16
    crop_scale: tuple[float, float] = (0.5, 1.0)
    decoder: str = "mask_transformer"
    decoder_depth: int = 2
    pretrained: bool = False
    layer_decay: float | None = None
    tune_images: int | None = None
    rounds: int = 60


def new_encoder(setting: Setting, num_classes: int) -> VisionTransformer:
    """The setting's Vision Transformer, the same random weights every time."""
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=setting.image, patch_size=setting.patch, embed_dim=setting.width,
        depth=setting.depth, num_heads=setting.heads, num_classes=num_classes,
    )  # fmt: skip


CIFAR10 = {
    # 64 patches as 8 x 8: what two cores train in a few hours.
    "cpu": Setting(
        image=32, patch=4, width=96, depth=6, heads=2, batch=128, epochs=14, lr=1e-3, tune_epochs=2, tune_lr=2e-4,
        smaller_images=(28, 24, 20),
    ),
    # The paper's 196 patches as 14 x 14, in a model that two cores train in an hour.
    "cpu-14x14": Setting(
        image=28, patch=2, width=64, depth=6, heads=1, batch=128, epochs=12, lr=1e-3, tune_epochs=3, tune_lr=2e-4,
        smaller_images=(26, 24, 20),
    ),
    # 100 patches as 10 x 10, of images made larger: what one core fine-tunes in two hours.
    "cpu-pretrained": Setting(
        image=140, patch=14, width=384, depth=12, heads=6, batch=64, epochs=2, lr=1e-4, tune_epochs=1, tune_lr=2e-5,
        warmup_epochs=0, pretrained=True, layer_decay=0.75, tune_images=10_000,
        rounds=8,
    ),
    # The same patches, and the width and depth of DeiT-S.
    "cuda": Setting(
        image=28, patch=2, width=384, depth=12, heads=6, batch=512, epochs=40, lr=1e-3, tune_epochs=3, tune_lr=2e-4,
        smaller_images=(26, 24, 22, 20),
    ),
}  # fmt: skip


CAMVID = {
    # 256 patches as 16 x 16.
    "cpu": Setting(
        image=128, patch=8, width=96, depth=6, heads=2, batch=8, epochs=60, lr=1e-3, tune_epochs=10, tune_lr=3e-4,
        warmup_epochs=3, crop_scale=(0.5, 2.0),
    ),
    # 256 patches as 16 x 16, of what one core trains in half an hour.
    "cpu-pretrained": Setting(
        image=224, patch=14, width=384, depth=12, heads=6, batch=8, epochs=12, lr=3e-4, tune_epochs=4, tune_lr=2e-5,
        warmup_epochs=1, crop_scale=(0.7, 1.5), decoder="linear", pretrained=True, layer_decay=0.75, rounds=20,
    ),
    # 1600 patches as 40 x 40, as Segmenter has it at 640 pixels.
    "cuda": Setting(
        image=320, patch=8, width=384, depth=12, heads=6, batch=16, epochs=200, lr=5e-4, tune_epochs=30, tune_lr=1e-4,
        warmup_epochs=10, crop_scale=(0.5, 2.0),
    ),
}  # fmt: skip


# Nothing is pruned; tokens merge by averages, each block at the same rate; what a merge leaves out skips the block.
CARRYING = {
    "plan": {"prune_rate": 0.0, "row_weights": "average", "allocation": "layer"},
    "compress": {"size_bias": True, "shortcut": "all"},
}


# The methods whose plan is a CompressionPlan.
OURS = ("prune_and_merge", "merge_and_carry", "random_scores", "attention_scores", "even_scores")


@dataclass(frozen=True)
class Run:
    """One model made of the dense one, measured, fine-tuned, and measured again.

    ``method`` is ``dense``, ``prune_and_merge``, ``merge_and_carry`` (the same with :data:`CARRYING`),
    ``random_scores``, ``attention_scores`` and ``even_scores`` (with plans from :mod:`.scoring`), ``smaller_images``,
    ``adaptive``, ``tome``, ``evit`` or ``local_merge``. The last four get the GMACs of ``prune_and_merge`` at
    ``keep_rate``. ``plan`` and ``compress`` are arguments of ``CompressionPlan.from_scores`` and of ``compress``;
    ``variant`` names them.
    """

    method: str
    keep_rate: float | None = None
    variant: str | None = None
    plan: dict = field(default_factory=dict)
    compress: dict = field(default_factory=dict)
    image: int | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        parts = [
            self.method,
            self.keep_rate and f"keep{self.keep_rate}",
            self.image and f"{self.image}px",
            self.variant,
        ]
        return "-".join(str(part) for part in [*parts, f"seed{self.seed}"] if part)


def segmentation_runs(setting: Setting, seeds: int) -> list[Run]:
    """The curve first, then what it is compared with, and the same once more for every other seed.

    Of a pretrained model, the same GMACs by every method.
    """
    if setting.pretrained:
        return [run for seed in range(seeds) for run in _methods(seed, "tome", "local_merge")]
    rates = (0.8, 0.7, 0.5)
    return [
        run
        for seed in range(seeds)
        for run in (
            Run("dense", seed=seed),
            *(Run("prune_and_merge", rate, seed=seed) for rate in rates),
            *_carrying(rates, seed),
            *(Run("local_merge", rate, seed=seed) for rate in rates),
        )
    ]


def classification_runs(setting: Setting, seeds: int) -> list[Run]:
    """The curve first, then what it is compared with, the variants, and the same once more for every other seed.

    Of a pretrained model, the same GMACs by every method.
    """
    if setting.pretrained:
        return [run for seed in range(seeds) for run in _methods(seed, "tome", "evit")]
    return [
        *_curve(0),
        *_carrying(KEEP_RATES, 0),
        *_peers(setting, 0),
        *_variants(setting),
        *(run for seed in range(1, seeds) for run in (*_curve(seed), *_carrying(KEEP_RATES, seed))),
        *(run for seed in range(1, seeds) for run in _peers(setting, seed)),
    ]


def part_runs(seeds: int) -> list[Run]:
    """What scores are worth, and each argument that merge and carry has otherwise, at one keep rate."""
    rate = VARIANTS_OF_PRETRAINED_AT
    return [
        Run("dense"),
        Run("prune_and_merge", rate),
        *(Run("random_scores", rate, seed=seed) for seed in range(max(seeds, 3))),
        Run("attention_scores", rate),
        Run("even_scores", rate, plan={"allocation": "layer"}),
        *(
            Run("prune_and_merge", rate, variant, plan, arguments)
            for variant, plan, arguments in (
                ("averaged rows", {"row_weights": "average"}, {}),
                ("size bias", {}, {"size_bias": True}),
                ("averaged rows and size bias", {"row_weights": "average"}, {"size_bias": True}),
                ("rates in every block", {"allocation": "layer"}, {}),
                ("nearest in the grid", {"segments": "nearest"}, {}),
                ("nothing pruned", {"prune_rate": 0.0}, {}),
                ("all carried", {}, {"shortcut": "all"}),
            )
        ),
        *_carrying((rate,), 0),
    ]


def _methods(seed: int, *peers: str) -> list[Run]:
    of_rate = (
        run
        for rate in (0.7, 0.8, 0.6)
        for run in (
            *(Run(method, rate, seed=seed) for method in ("adaptive", "prune_and_merge", *peers)),
            *_carrying((rate,), seed),
        )
    )
    return [Run("dense", seed=seed), *of_rate]


def _carrying(rates: tuple[float, ...], seed: int) -> list[Run]:
    return [Run("merge_and_carry", rate, **CARRYING, seed=seed) for rate in sorted(rates)]


def _curve(seed: int) -> list[Run]:
    return [Run("dense", seed=seed), *(Run("prune_and_merge", rate, seed=seed) for rate in sorted(KEEP_RATES))]


def _peers(setting: Setting, seed: int) -> list[Run]:
    return [
        *(Run("smaller_images", image=image, seed=seed) for image in setting.smaller_images),
        *(Run(method, rate, seed=seed) for rate in (0.6, 0.4) for method in ("random_scores", "tome", "evit")),
    ]


def _variants(setting: Setting) -> list[Run]:
    """Ways to do it otherwise. In stages of averages nothing is pruned, and merged tokens are attended to by size."""
    third = setting.depth // 3
    stages = [(third, 2 * third - 1), (2 * third, setting.depth - 1)]
    averaged = {"prune_rate": 0.0, "row_weights": "average", "stages": stages}
    stages_of_averages = [
        Run("prune_and_merge", rate, "two stages of averages", averaged, {"size_bias": True})
        for rate in (0.6, 0.5, 0.4)
    ]
    return stages_of_averages + [
        Run("prune_and_merge", VARIANTS_AT, variant, plan, arguments)
        for variant, plan, arguments in (
            ("averaged rows", {"row_weights": "average"}, {}),
            ("size bias", {}, {"size_bias": True}),
            ("averaged rows and size bias", {"row_weights": "average"}, {"size_bias": True}),
            ("dense matrices", {}, {"train_matrices": "dense"}),
            ("fixed matrices", {}, {"train_matrices": None}),
            ("merge in attention", {}, {"merge_site": "attention"}),
            ("rates in every block", {"allocation": "layer"}, {}),
            ("nearest in the grid", {"segments": "nearest"}, {}),
            ("two stages", {"stages": stages}, {}),
            ("nothing pruned", {"prune_rate": 0.0}, {}),
        )
    ]
