"""Demonstrate both methods on images that come with scikit-learn: adaptive merging, and Prune and Merge."""

import json
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate

from .adaptive_plan import AdaptivePlan
from .checkpoints import save_pretrained
from .files import write_atomically
from .measure import count_gmacs, throughput
from .models import input_size, tokens_of
from .plan import CompressionPlan
from .scoring import score_tokens
from .tables import compare
from .training import Recipe, classification_task, distillation_task, evaluate, fit, make_accelerator
from .vision_transformer import compress
from .visualize import save_cluster_picture, save_plan_picture

KEEP_RATE, PRUNE_RATE = 0.6, 0.1
SHARE = 0.7  # of the GMACs, with adaptive merging
_TRAIN = {"epochs": 24, "lr": 2e-3, "warmup_epochs": 2}
_TUNE = {"epochs": 10, "lr": 5e-4, "warmup_epochs": 1}
_MODEL = {
    "img_size": 32, "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 96, "depth": 4, "num_heads": 3,
    "mlp_ratio": 2.0, "weight_init": "jax",
}  # fmt: skip


def run_demo(output: Path, *, seed: int = 0) -> dict:
    """Train a small ViT on scikit-learn's digits and make it faster by both methods; two minutes on two CPU cores.

    Adaptive merging needs no training. Prune and Merge is fine-tuned. Writes ``dense/``, ``adaptive/`` and
    ``compressed/`` (for :func:`pm_models.load_pretrained`), ``plan.json``, ``plan.png``, ``merging.png`` and
    ``results.json`` into ``output``, and prints a table.

    Returns:
        The content of ``results.json``.
    """
    accelerator = make_accelerator()
    torch.manual_seed(seed)
    train_set, test_set = _digits(seed)
    train_loader = DataLoader(train_set, 32, shuffle=True, drop_last=True, collate_fn=_augmented_batch)
    test_loader, calibration = DataLoader(test_set, 256), DataLoader(train_set, 256)
    train = partial(fit, train_loader=train_loader, eval_loader=test_loader, accelerator=accelerator)

    print(f"1/5  training a dense ViT on {len(train_set)} images of digits (scikit-learn)")
    dense = timm.create_model("vit_tiny_patch16_224", **_MODEL)
    train(classification_task(dense, smoothing=0.1), recipe=Recipe(**_TRAIN, seed=seed), name="dense")
    print("2/5  scoring tokens by gradient-weighted attention")
    scores = score_tokens(dense, calibration, batches=len(calibration))
    plan = CompressionPlan.from_scores(
        scores, dense.patch_embed.grid_size, KEEP_RATE, PRUNE_RATE, num_prefix_tokens=dense.num_prefix_tokens
    )
    compressed = compress(dense, plan)
    raw = evaluate(compressed, test_loader, accelerator=accelerator)
    print(f"3/5  planning: keep rate {KEEP_RATE}, prune rate {PRUNE_RATE}\n{plan}")
    merging = AdaptivePlan.for_model(dense, SHARE)
    adaptive = compress(dense, merging)
    print(f"     and adaptive merging, with no training\n{merging}")
    print("4/5  fine-tuning the compressed model, with the dense one as teacher")
    train(distillation_task(compressed, dense), recipe=Recipe(**_TUNE, seed=seed), name="fine-tune")
    print("5/5  evaluating, and timing all alternately")
    models = {"dense": dense.eval(), "adaptive": adaptive.eval(), "compressed": compressed.eval()}
    speed = throughput(models, test_set[:128][0].to(accelerator.device))
    rows = {
        name: {
            "top1": evaluate(model, test_loader, accelerator=accelerator)["top1"],
            "tokens": tokens_of(model),
            "gmacs": count_gmacs(model, input_size(model)),
            "images_per_second": speed[name],
        }
        for name, model in models.items()
    }
    results = {"before_fine_tuning_top1": raw["top1"], **rows}

    output.mkdir(parents=True, exist_ok=True)
    for name, model in models.items():
        save_pretrained(model, output / name)
    plan.save(output / "plan.json")
    sample = test_set[0][0]
    image = (sample[0].numpy() + 1) / 2
    save_plan_picture(plan, output / "plan.png", image)
    save_cluster_picture(adaptive, output / "merging.png", sample.to(accelerator.device), image)
    write_atomically(output / "results.json", json.dumps(results, indent=2).encode())
    print(compare(rows))
    print(f"before fine-tuning the compressed model had {raw['top1']:.2f}%; the adaptive one was not trained")
    print(f"pictures, plan and weights: {output}/merging.png, plan.png, plan.json, {', '.join(models)}, results.json")
    return results


def _digits(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Handwritten digits (1, 32, 32) with values from -1 to 1, and their labels, to train and to test on."""
    digits = load_digits()
    grey = torch.from_numpy(digits.images / 8 - 1).float().unsqueeze(1)  # from (n, 8, 8), 0 to 16
    images = F.interpolate(grey, size=(32, 32), mode="bilinear")  # a patch of 4 x 4 for each pixel
    parts = train_test_split(range(len(images)), test_size=0.2, random_state=seed, stratify=digits.target)
    return tuple(TensorDataset(images[part], torch.from_numpy(digits.target[part])) for part in parts)


def _augmented_batch(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A batch with each image rotated, scaled and shifted a little at random."""
    images, labels = default_collate(samples)
    angle, scale = (torch.rand(2, len(images)) - 0.5) * torch.tensor([[0.35], [0.2]])
    shift = (torch.rand(len(images), 2, 1) - 0.5) * 0.4
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(-1, 2, 2)
    transform = torch.cat([turn * (1 + scale).view(-1, 1, 1), shift], dim=2)
    grid = F.affine_grid(transform, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False), labels
