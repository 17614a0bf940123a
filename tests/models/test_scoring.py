"""Scores against attention matrices and their gradients, held in memory; and that the model comes back as it was."""

import copy
from collections import UserDict

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import images_for, plan_for, skip_without_kernels, small_vit
from timm.layers import Attention

from pm_kernels import backend
from pm_models import CompressionPlan, compress, score_tokens


def scores_with_hooks(model, batches, loss_fn):
    """The paper's scoring: eager attention whose matrices are kept, with their gradients."""
    model = copy.deepcopy(model)
    kept = []

    def keep(_, __, weights):
        weights.retain_grad()
        kept.append(weights)

    for module in model.blocks.modules():
        if isinstance(module, Attention):
            module.fused_attn = False
            module.attn_drop.register_forward_hook(keep)
    total = 0
    for images, targets in batches:
        kept.clear()
        loss_fn(model(images), targets).backward()
        per_block = [kept[index :: len(model.blocks)] for index in range(len(model.blocks))]
        if len(kept) > len(model.blocks):  # several attentions in a block, one after the other
            count = len(kept) // len(model.blocks)
            per_block = [kept[index * count : (index + 1) * count] for index in range(len(model.blocks))]
        total = total + torch.stack(
            [
                sum((weights * weights.grad).sum(dim=(0, 1, 2)) for weights in matrices).abs()
                / (weights_count(matrices[0]))
                for matrices in per_block
            ]
        )
    return total[:, model.num_prefix_tokens :].detach()


def weights_count(weights):
    batch, heads, tokens, _ = weights.shape
    return batch * heads * tokens


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"reg_tokens": 3, "qk_norm": True, "init_values": 0.1},
        {"class_token": False, "global_pool": "avg"},
        {"scale_attn_norm": True},
        {"block_fn": timm.models.vision_transformer.ResPostBlock},
        {"block_fn": timm.models.vision_transformer.ParallelThingsBlock},
    ],
    ids=["plain", "registers", "average", "scale_norm", "res_post", "parallel"],
)
def test_scores_are_gradient_weighted_attention(arguments):
    model = small_vit(**arguments).double()
    batches = [(images_for(model, batch), torch.randint(0, 7, (batch,))) for batch in (3, 2)]
    scores = score_tokens(model, batches, batches=2)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(
        scores.double(), scores_with_hooks(model, batches, F.cross_entropy), rtol=1e-5, atol=1e-12
    )


@pytest.mark.parametrize(
    ("arguments", "stages"),
    [
        ({}, None),
        ({"train_matrices": "dense"}, [(1, 2), (4, 4)]),
        ({"size_bias": True}, None),
        ({"merge_site": "attention"}, [(0, 1), (2, 4)]),
    ],
    ids=["each block", "stages of dense matrices", "size bias", "merged in attention"],
)
def test_a_compressed_models_scores_come_back_to_its_patches(arguments, stages):
    """Against the paper's equations in plain PyTorch, with every attention matrix and its gradient in memory."""
    dense = small_vit().double()
    model = compress(dense, plan_for(dense, stages=stages), **arguments)
    for matrices in model.stages.values():
        for matrix in (matrices.merge, matrices.reconstruct):
            matrix.data += 0.1 * torch.randn_like(matrix)
    batches = [(images_for(model, batch), torch.randint(0, 7, (batch,))) for batch in (3, 2)]
    expected = scores_written_out(model, dense, batches, inside="merge_site" in arguments)
    torch.testing.assert_close(score_tokens(model, batches, batches=2).double(), expected, rtol=1e-5, atol=1e-12)
    pruned = torch.tensor(model.plan.stage_of(1 if stages is None else stages[0][0]).segments) == -1
    assert pruned.any()
    if arguments.get("train_matrices") != "dense":
        assert (expected[1 if stages is None else stages[0][0]][pruned] == 0).all()
    CompressionPlan.from_scores(expected, model.plan.grid, 0.3, 0.4)


def scores_written_out(model, dense, batches, inside):
    plan, depth = model.plan, len(dense.blocks)
    merges, reconstructs = [torch.eye(plan.num_tokens).double()] * depth, [torch.eye(plan.num_tokens).double()] * depth
    compressed = [block for block in range(depth) if plan.stage_of(block) is not None]
    for block, merge, reconstruct in zip(compressed, model.merge_matrices(), model.reconstruct_matrices(), strict=True):
        merges[block], reconstructs[block] = merge.detach(), reconstruct.detach()
    total = torch.zeros(depth, plan.num_tokens, dtype=torch.float64)
    for images, targets in batches:
        x, kept = dense._pos_embed(dense.patch_embed(images)), []
        for index, block in enumerate(dense.blocks):
            stage = plan.stage_of(index)
            first, last = stage is None or stage.first == index, stage is None or stage.last == index
            if first:
                full, y = x, x if inside and stage is not None else merges[index] @ x
            attention, merging = block.attn, inside and first and stage is not None
            qkv = attention.qkv(block.norm1(y)).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
            if merging:
                qkv, y = merges[index] @ qkv, merges[index] @ y
            logits = qkv[0] @ qkv[1].mT * attention.scale
            if model.size_bias and stage is not None:
                logits = logits + plan.token_sizes(index).log()
            weights = logits.softmax(-1).requires_grad_()
            weights.retain_grad()
            kept.append(weights)
            y = y + attention.proj((weights @ qkv[2]).transpose(1, 2).flatten(2))
            y = y + block.mlp(block.norm2(y))
            if last:
                x = reconstructs[index] @ y + (1 - plan.token_mask(index))[:, None] * full
        F.cross_entropy(dense.forward_head(dense.norm(x)), targets).backward()
        for index, weights in enumerate(kept):
            found = (weights * weights.grad).sum(dim=(0, 1, 2)).abs() / weights_count(weights)
            total[index] += reconstructs[index].abs() @ found
    return total[:, plan.num_prefix_tokens :].detach()


def test_another_loss():
    model = small_vit().double()
    batches = [(images_for(model), torch.randn(3, 7, dtype=torch.float64))]
    scores = score_tokens(model, batches, batches=1, loss_fn=F.mse_loss)
    torch.testing.assert_close(scores.double(), scores_with_hooks(model, batches, F.mse_loss), rtol=1e-5, atol=1e-12)


def test_the_model_comes_back_as_it_was():
    model = small_vit().train()
    model.blocks[2].eval()
    model.norm.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    modules = list(model.modules())
    modes = [module.training for module in modules]
    before = copy.deepcopy(model.state_dict())
    # Under no_grad and in the middle of an error, too.
    with torch.no_grad():
        score_tokens(model, [(images_for(model), torch.zeros(3).long())], batches=1)
    with pytest.raises(ZeroDivisionError):
        score_tokens(model, [(images_for(model), 0 * torch.zeros(3).long())], batches=1, loss_fn=lambda *_: 1 / 0)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert [module.training for module in modules] == modes
    assert [name for name, value in model.named_parameters() if not value.requires_grad] == ["norm.weight"]
    assert [name for name, value in model.named_parameters() if value.grad is not None] == ["head.weight"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(not module._non_persistent_buffers_set for module in modules if isinstance(module, Attention))


def test_gradient_checkpointing_changes_nothing():
    model = small_vit()
    batches = [(images_for(model), torch.randint(0, 7, (3,)))]
    expected = score_tokens(model, batches, batches=1)
    model.set_grad_checkpointing()
    torch.testing.assert_close(score_tokens(model, batches, batches=1), expected)


def test_a_short_loader_is_used_whole_with_a_warning():
    model = small_vit()
    batches = [(images_for(model), torch.randint(0, 7, (3,)))]
    with pytest.warns(UserWarning, match="gave 1 of the 5 batches"):
        scores = score_tokens(model, batches, batches=5)
    torch.testing.assert_close(scores, score_tokens(model, batches, batches=1))


def test_an_endless_loader_is_read_no_further():
    model = small_vit()

    def endless():
        for count in range(3):
            assert count < 2
            yield images_for(model), torch.randint(0, 7, (3,))

    score_tokens(model, endless(), batches=2)


IMAGES, TARGETS = torch.zeros(3, 3, 28, 20), torch.zeros(3).long()
PAIR = r"^loader must yield batches \(images, targets\)"


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (
            {"image": IMAGES, "label": TARGETS},
            TypeError,
            "a pair of tensors, got a dict with the keys 'image', 'label'",
        ),
        (UserDict(pixel_values=IMAGES), TypeError, "a pair of tensors, got a UserDict with the keys 'pixel_values'"),
        (IMAGES[:2], TypeError, "a pair of tensors, got a Tensor"),
        ((IMAGES,), TypeError, "a pair of tensors, got a tuple of Tensor"),
        ([], TypeError, "a pair of tensors, got a list of nothing"),
        ((IMAGES, TARGETS, TARGETS), TypeError, "a pair of tensors, got a tuple of Tensor, Tensor, Tensor"),
        ([IMAGES, ["cat"]], TypeError, "a pair of tensors, got a list of Tensor, list"),
        ((IMAGES.numpy(), TARGETS), TypeError, "a pair of tensors, got a tuple of ndarray, Tensor"),
        ("ab", TypeError, "a pair of tensors, got a str"),
        (None, TypeError, "a pair of tensors, got a NoneType"),
        ((IMAGES[0], TARGETS[0]), ValueError, r"with images \(B, C, H, W\), got images \(3, 28, 20\)"),
        ((TARGETS, IMAGES), ValueError, r"with images \(B, C, H, W\), got images \(3,\)"),
    ],
    ids=[
        "dict",
        "mapping",
        "tensor",
        "one",
        "none",
        "three",
        "labels-as-text",
        "numpy",
        "text",
        "None",
        "image",
        "turned",
    ],
)
def test_batches_of_another_kind(batch, error, message):
    model = small_vit()
    modules = list(model.modules())
    with pytest.raises(error, match=f"{PAIR}.*{message}$"):
        score_tokens(model, [batch], batches=1)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))


def test_errors():
    model = small_vit()
    with pytest.raises(ValueError, match="loader is empty: expected at least one batch"):
        score_tokens(model, [], batches=1)
    with pytest.raises(ValueError, match="batches must be at least 1, got 0"):
        score_tokens(model, [], batches=0)
    with pytest.raises(TypeError, match="must be a timm VisionTransformer, .* or Eva, .* got ResNet"):
        score_tokens(timm.create_model("resnet10t"), [], batches=1)
    fused_mlp = small_vit(block_fn=timm.models.vision_transformer.ParallelScalingBlock)
    with pytest.raises(ValueError, match="block 0 is a ParallelScalingBlock without timm's Attention"):
        score_tokens(fused_mlp, [], batches=1)
    dropping = small_vit(attn_drop_rate=0.1)
    with pytest.raises(ValueError, match="attention dropout must be 0 .*, got 0.1"):
        score_tokens(dropping, [(images_for(dropping), torch.zeros(3).long())], batches=1)


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # Triton 3.6
def test_the_kernels_score_as_the_reference():
    """The whole dense model, forward and backward, attends and scores through the Triton kernels."""
    skip_without_kernels()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = small_vit(reg_tokens=2).to(device)
    batches = [(images_for(model), torch.randint(0, 7, (3,), device=device)) for _ in range(2)]
    batches = [(images.to(device), labels) for images, labels in batches]
    scores = {}
    for name in ("triton", "reference"):
        with backend(name):
            scores[name] = score_tokens(model, batches, batches=2)
    torch.testing.assert_close(scores["triton"], scores["reference"], rtol=1e-4, atol=1e-7)
    assert scores["triton"].abs().min() > 0
