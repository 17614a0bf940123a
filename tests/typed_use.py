"""The public API as a user's code calls it, for mypy: it reads the types that are told, nothing here is run."""

from pathlib import Path

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import assert_type

import pm_kernels
import pm_models
from pm_models.export import Exported
from pm_models.segmenter import predict
from pm_models.training import distillation_task


def kernels(q: Tensor, k: Tensor, v: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Tensors in, tensors out."""
    with pm_kernels.backend("reference") as chosen:
        assert_type(chosen, pm_kernels.backend)
    assert_type(pm_kernels.fused_merge_attention(q, k, v), Tensor)
    assert_type(pm_kernels.fused_merge_attention(q, k, v, weight, gate=bias, key_bias=bias, scale=0.1), Tensor)
    assert_type(pm_kernels.fused_merge_attention_qkv(q, weight, merge_queries=False), Tensor)
    sparse = pm_kernels.SparseRows.from_dense(weight)
    assert_type(sparse, pm_kernels.SparseRows)
    assert_type(sparse.values, Tensor)
    assert_type(sparse.by_column, pm_kernels.ByColumn | None)
    assert_type(pm_kernels.token_mix(x, sparse), Tensor)
    assert_type(pm_kernels.token_mix(x, weight), Tensor)
    mixed, normed = pm_kernels.token_mix_layer_norm(x, sparse, weight, bias, 1e-6)
    assert_type((mixed, normed), tuple[Tensor, Tensor])
    y, rest, first = pm_kernels.transition(x, None, sparse, 3, update=x, norm=(weight, bias, 1e-6))
    assert_type((y, rest, first), tuple[Tensor, Tensor | None, Tensor | None])
    segments, sizes = pm_kernels.match_tokens(x, bias, 118, num_prefix_tokens=1)
    assert_type((segments, sizes), tuple[Tensor, Tensor])
    assert_type(pm_kernels.merge_segments(x, segments, sizes, 118), Tensor)
    found = pm_kernels.match(x, bias, 118, update=x, norm=(weight, bias, 1e-6))
    assert_type(found, pm_kernels.Matching)
    assert_type(found.matrix, Tensor | pm_kernels.SparseRows)
    assert_type(pm_kernels.reference.token_mix(x, weight), Tensor)


def plans(scores: Tensor, path: Path) -> None:
    """Each kind of plan comes back as what it is."""
    static = pm_models.CompressionPlan.from_scores(scores, (14, 14), 0.6, 0.1, stages=[(3, 5), (6, 11)])
    assert_type(static, pm_models.CompressionPlan)
    assert_type(static.tokens, tuple[int, ...])
    assert_type(static.stage_of(3), pm_models.StagePlan | None)
    assert_type(static.merge_matrix(3), Tensor)
    assert_type(static.resize((16, 16)), pm_models.CompressionPlan)
    static.save(path)
    assert_type(pm_models.CompressionPlan.load(path), pm_models.CompressionPlan)
    assert_type(pm_models.CompressionPlan.from_dict(static.to_dict()), pm_models.CompressionPlan)
    adaptive = pm_models.AdaptivePlan((14, 14), 12, 1, {3: 120, 6: 80})
    assert_type(pm_models.AdaptivePlan.load("plan.json"), pm_models.AdaptivePlan)
    assert_type(adaptive.tokens, tuple[int, ...])
    assert_type(adaptive.resize((16, 16)), pm_models.AdaptivePlan)


def models(loader: DataLoader[tuple[Tensor, Tensor]], images: Tensor, folder: Path) -> None:
    """What timm makes goes in; what comes out is timm's class, and has what a compressed model has more."""
    model = timm.create_model("deit_small_patch16_224")
    assert_type(pm_models.score_tokens(model, loader, batches=4), Tensor)
    batches = [(images, images)]
    scores = pm_models.score_tokens(model, batches, batches=1, loss_fn=nn.functional.mse_loss)
    plan = pm_models.CompressionPlan.from_scores(scores, (14, 14), keep_rate=0.6, prune_rate=0.1)
    student = pm_models.compress(model, plan, train_matrices="dense", size_bias=True)
    assert_type(student, pm_models.PMVisionTransformer | pm_models.PMEva)
    assert_type(student.plan, pm_models.CompressionPlan | pm_models.AdaptivePlan)
    assert_type(student.merge_matrices(), list[Tensor])
    assert_type(student.execution, str)
    student.execution = "literal"
    assert_type(student.forward(images), Tensor)
    assert_type(student.forward_features(images), Tensor)
    assert_type(student.clusters(images), dict[int, Tensor])
    student.reset_classifier(10)
    if isinstance(student, pm_models.PMVisionTransformer):
        classifier: VisionTransformer = student
        assert_type(student.freeze(), pm_models.PMVisionTransformer)
        pm_models.score_tokens(classifier, loader, batches=1)
    faster = pm_models.compress(model, pm_models.AdaptivePlan.for_model(model, gmacs=0.62))
    distillation_task(faster, model)
    torch.compile(faster)

    pm_models.save_pretrained(student, folder, results={"dense": {"top1": 79.8}})
    loaded = pm_models.load_pretrained(folder, uncompressed=True)
    exported = pm_models.export_model(loaded, folder / "model.onnx", "onnx", opset=17)
    assert_type(exported, Exported)
    assert_type(exported.run(images), Tensor)
    serve = pm_models.warmup(student, [1, 8], dtype=torch.bfloat16)
    assert_type(serve(images), Tensor)
    assert_type(pm_models.load_authors_checkpoint("checkpoint.pth"), pm_models.PMVisionTransformer)
    pm_models.compress(pm_models.to_timm(nn.Identity()), plan)


def segmentation(images: Tensor, encoder: nn.Module, plan: pm_models.AdaptivePlan) -> None:
    """A Segmenter on what timm makes, and on what compress makes."""
    model = pm_models.Segmenter(pm_models.compress(encoder, plan), num_classes=11, decoder="linear")
    assert_type(model.image_size, tuple[int, int])
    assert_type(model.forward(images), Tensor)
    assert_type(pm_models.Segmenter(encoder, 11).compressed(plan, size_bias=False), pm_models.Segmenter)
    assert_type(model.uncompressed(), pm_models.Segmenter)
    assert_type(predict(model, images, (150, 200), scales=(0.75, 1.0), flip=True), Tensor)
    pm_models.save_pretrained(model, "folder")
    pm_models.warmup(pm_models.load_segmenter_checkpoint("folder"))
