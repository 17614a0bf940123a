"""Compressed models: folded against literal against the equations written out, and timm's whole interface."""

import copy
import pickle

import pytest
import timm
import torch
from helpers import images_for, plan_for, small_vit
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock, VisionTransformer
from timm.optim import create_optimizer_v2
from torch.utils._python_dispatch import TorchDispatchMode

from pm_models import CompressionPlan, PMVisionTransformer, StagePlan, compress, load_pretrained, save_pretrained

KINDS = {
    "token": {},
    "registers": {"reg_tokens": 4},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "no prefix, average": {"class_token": False, "global_pool": "avg"},
    "average": {"global_pool": "avg"},
    "average without norm": {"global_pool": "avg", "final_norm": False},
    "average after norm": {"global_pool": "avg", "fc_norm": False},
    "average with prefix": {"global_pool": "avg", "pool_include_prefix": True},
    "max": {"global_pool": "max"},
    "map": {"class_token": False, "global_pool": "map"},
    "qk norm, layer scale": {"qk_norm": True, "init_values": 0.1, "pre_norm": True, "no_embed_class": True},
    "res post": {"block_fn": ResPostBlock},
    "parallel": {"block_fn": ParallelThingsBlock},
    "parallel scaling": {"block_fn": ParallelScalingBlock},
}
STAGES = {
    "every block": None,
    "one stage": [(0, 4)],
    "some blocks": [(1, 1), (3, 4)],
    "first": [(0, 2)],
    "neighbours": [(1, 2), (3, 3)],
}


def written_out(
    model: VisionTransformer, compressed: PMVisionTransformer, images: torch.Tensor, last: int | None = None
) -> torch.Tensor:
    """y = M x, the stage's blocks, x = R y + what skips them, with the dense modules; all tokens, normalised.

    After block ``last``, not normalised, where that is given; its stage ends there.
    """
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    matrices = iter(zip(compressed.merge_matrices(), compressed.reconstruct_matrices(), strict=True))
    plan = compressed.plan
    for index, block in enumerate(model.blocks[: None if last is None else last + 1]):
        stage = plan.stage_of(index)
        if stage is None:
            x = block(x)
            continue
        merge, reconstruct = next(matrices)
        if index == stage.first:
            y = torch.einsum("cn,bnd->bcd", merge, x)
        y = block(y)
        if index in (stage.last, last):
            x = after(compressed, stage, y, x, merge, reconstruct)
    return model.norm(x) if last is None else x


def after(compressed, stage, y, x, merge, reconstruct):
    """R y, and what skips the blocks: pruned tokens; with ``shortcut="all"`` x - R M x of those that share a row."""
    full = torch.einsum("nc,bcd->bnd", reconstruct, y)
    prefix = compressed.plan.num_prefix_tokens
    for patch, segment in enumerate(stage.segments):
        token = prefix + patch
        if segment < 0:
            full[:, token] += x[:, token]
        elif compressed.shortcut == "all" and stage.segments.count(segment) > 1:
            full[:, token] += x[:, token] - torch.einsum("c,cn,bnd->bd", reconstruct[token], merge, x)
    return full


def random_matrices_(model: PMVisionTransformer) -> None:
    """Other values in all that trains, so that nothing relies on the plan's, nor on its zeros where they train."""
    with torch.no_grad():
        for parameter in model.stages.parameters():
            noise = torch.randn_like(parameter)
            parameter.add_(0.3 * noise if parameter.dim() == 1 else noise * parameter.shape[1] ** -0.5)


def outputs_and_gradients(model, images, function):
    parameters = dict(model.named_parameters())
    out = function(model)
    model.zero_grad()
    torch.manual_seed(1)
    (out * torch.randn_like(out)).sum().backward()
    return out.detach(), {name: value.grad.clone() for name, value in parameters.items() if value.grad is not None}


def assert_same(actual, expected, tolerance):
    """Outputs and all gradients, relative to the largest entry of each, vanishing gradients to that of the others."""
    torch.testing.assert_close(actual[0], expected[0], rtol=tolerance, atol=tolerance)
    assert actual[1].keys() == expected[1].keys()
    largest = max(value.abs().max() for value in expected[1].values())
    for name, value in expected[1].items():
        error = (actual[1][name] - value).abs().max() / torch.maximum(value.abs().max(), 1e-2 * largest)
        assert error <= tolerance, f"{name}: {error}"


@pytest.mark.parametrize("shortcut", ["pruned", "all"])
@pytest.mark.parametrize("train_matrices", ["support", "dense"])
@pytest.mark.parametrize("kind", KINDS)
def test_folded_is_literal_for_every_kind(kind, train_matrices, shortcut):
    model = small_vit(**KINDS[kind]).double()
    compressed = compress(model, plan_for(model), train_matrices=train_matrices, shortcut=shortcut)
    random_matrices_(compressed)
    check_folded_is_literal(model, compressed)


@pytest.mark.parametrize("shortcut", ["pruned", "all"])
@pytest.mark.parametrize("train_matrices", ["support", "dense"])
@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("kind", ["token", "registers", "average"])
def test_folded_is_literal_for_stages(kind, stages, train_matrices, shortcut):
    model = small_vit(**KINDS[kind]).double()
    plan = plan_for(model, keep_rate=0.3, prune_rate=0.5, stages=STAGES[stages])
    compressed = compress(model, plan, train_matrices=train_matrices, shortcut=shortcut)
    random_matrices_(compressed)
    check_folded_is_literal(model, compressed)


def merged_inside(block, x, merge, key_bias=None):
    """A block with the merge inside its attention, head by head, with the attention matrix in memory."""
    attention = block.attn
    batch, tokens, _ = x.shape
    qkv = attention.qkv(block.norm1(x)).view(batch, tokens, 3, attention.num_heads, attention.head_dim)
    q, k, v = (torch.einsum("cn,bnhd->bhcd", merge, part) for part in qkv.unbind(2))
    logits = q @ k.mT * attention.scale
    logits = logits if key_bias is None else logits + key_bias
    out = (logits.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
    y = torch.einsum("cn,bnd->bcd", merge, x) + block.ls1(attention.proj(out))
    return y + block.ls2(block.mlp(block.norm2(y)))


@pytest.mark.parametrize("shortcut", ["pruned", "all"])
@pytest.mark.parametrize("train_matrices", ["support", "dense", None])
@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("kind", ["token", "registers", "average"])
def test_merging_inside_the_attention(kind, stages, train_matrices, shortcut):
    model = small_vit(**KINDS[kind], init_values=0.5).double()
    plan = plan_for(model, keep_rate=0.3, prune_rate=0.5, stages=STAGES[stages])
    size_bias = train_matrices is None
    compressed = compress(
        model, plan, train_matrices=train_matrices, size_bias=size_bias, merge_site="attention", shortcut=shortcut
    )
    random_matrices_(compressed)
    images = images_for(model)
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    matrices = iter(zip(compressed.merge_matrices(), compressed.reconstruct_matrices(), strict=True))
    for index, block in enumerate(model.blocks):
        stage = plan.stage_of(index)
        if stage is None:
            x = block(x)
            continue
        merge, reconstruct = next(matrices)
        if index == stage.first:
            y = merged_inside(block, x, merge, plan.token_sizes(index).log() if size_bias else None)
        else:
            y = compressed.blocks[index](y)
        if index == stage.last:
            x = after(compressed, stage, y, x, merge, reconstruct)
    expected = model.norm(x)
    for execution in ("folded", "literal"):
        compressed.execution = execution
        torch.testing.assert_close(compressed.forward_features(images), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(compressed(images), model.forward_head(expected), rtol=1e-10, atol=1e-10)
    if train_matrices is not None:
        compressed(images).sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in compressed.stages.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_uncompressed_is_the_model_before(kind):
    dense = small_vit(**KINDS[kind]).double()
    model = compress(dense, plan_for(dense), size_bias=kind == "token")
    plain = model.uncompressed()
    assert type(plain) is type(dense)
    images = images_for(dense)
    assert torch.equal(plain(images), dense(images))
    assert plain.state_dict().keys() == dense.state_dict().keys()
    assert vars(plain).keys() == vars(dense).keys()
    assert [type(module) for module in plain.modules()] == [type(module) for module in dense.modules()]
    plain.load_state_dict(dense.state_dict())
    other = plan_for(dense, 0.6, 0.1)
    assert torch.equal(compress(plain, other)(images), compress(dense, other)(images))
    before = model(images)
    plain.head.weight.data.zero_()
    assert torch.equal(model(images), before)


def test_a_plan_without_stages_is_the_dense_model():
    model = small_vit().double()
    compressed = compress(model, CompressionPlan((7, 5), 5, 1, ()))
    images = images_for(model)
    torch.testing.assert_close(compressed(images), model(images))
    torch.testing.assert_close(compressed.forward_features(images), model.forward_features(images))
    assert compressed.plan.tokens == (36,) * 5
    assert compressed.merge_matrices() == []


@pytest.mark.parametrize("rates", [(1.0, 0.0), (0.03, 0.0), (0.03, 0.9), (0.5, 0.0), (0.5, 0.5)])
def test_folded_is_literal_for_extreme_rates(rates):
    model = small_vit().double()
    compressed = compress(model, plan_for(model, *rates))
    random_matrices_(compressed)
    check_folded_is_literal(model, compressed)


def check_folded_is_literal(model, compressed):
    images = images_for(model)
    for function in (lambda m: m(images), lambda m: m.forward_features(images)):
        compressed.execution = "literal"
        literal = outputs_and_gradients(compressed, images, function)
        compressed.execution = "folded"
        assert_same(outputs_and_gradients(compressed, images, function), literal, 1e-10)
        with torch.no_grad():  # the transitions that are kept at inference
            torch.testing.assert_close(function(compressed), literal[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        compressed.forward_features(images), written_out(model, compressed, images), rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(
        compressed(images), model.forward_head(written_out(model, compressed, images)), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("train_matrices", ["support", "dense"])
def test_folded_is_literal_in_float32(train_matrices):
    model = small_vit(depth=12)
    compressed = compress(model, plan_for(model, 0.6, 0.1), train_matrices=train_matrices)
    images = images_for(model)
    literal_model = copy.deepcopy(compressed)
    literal_model.execution = "literal"
    assert_same(
        outputs_and_gradients(compressed, images, lambda m: m(images)),
        outputs_and_gradients(literal_model, images, lambda m: m(images)),
        1e-4,
    )


@pytest.mark.parametrize("execution", ["folded", "literal"])
def test_keeping_every_patch_is_the_dense_model(execution):
    model = small_vit(reg_tokens=2).double()
    compressed = compress(model, plan_for(model, keep_rate=1.0, prune_rate=0.0))
    compressed.execution = execution
    torch.testing.assert_close(compressed(images := images_for(model)), model(images), rtol=1e-10, atol=1e-10)


def test_size_bias_is_attention_to_every_member():
    """A key with the bias log(n) draws the attention of n equal keys."""
    model = small_vit(depth=1).double()
    with torch.no_grad():  # without positions all patches of a constant image are the same token
        model.pos_embed[:, 1:] = model.pos_embed[:, 1:2]
    images = torch.ones(2, 3, 28, 20, dtype=torch.float64)
    plan = plan_for(model, keep_rate=0.3, prune_rate=0.0, row_weights="average")
    compressed = compress(model, plan, size_bias=True)
    # The plan's averages are float32 numbers.
    torch.testing.assert_close(compressed(images), model(images), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(compress(model, plan)(images), model(images), rtol=1e-4)


class Rows(TorchDispatchMode):
    """The rows of an image that a linear layer of a weight computes, read off the matrix products."""

    def __init__(self, weight, batch):
        super().__init__()
        self.weight, self.batch, self.seen = weight, batch, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if function in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            if args[-1].data_ptr() == self.weight.data_ptr():
                self.seen.append(out.shape[0] // self.batch)
        return out


def test_the_last_block_computes_what_is_read():
    """With token pooling that is the prefix rows: every row of the MLP that counts, and no more."""
    model = small_vit(reg_tokens=1)
    compressed = compress(model, plan_for(model))
    images, whole = images_for(model), compressed.plan.tokens[-1]

    def rows(function=compressed):
        with torch.no_grad(), Rows(compressed.blocks[-1].mlp.fc1.weight, len(images)) as found:
            function(images)
        return found.seen

    assert (rows(), rows(compressed.forward_features)) == ([2], [whole])
    compressed.reset_classifier(7, "avg")
    assert rows() == [whole]
    compressed.reset_classifier(7, "token")
    assert rows() == [2]
    for module in (compressed.blocks[-1], compressed.blocks[-1].mlp, compressed.norm):  # what is hung there sees all
        seen = []
        handle = module.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(inputs[0].shape[1]))
        assert rows() == [whole]
        assert seen == [compressed.plan.num_tokens if module is compressed.norm else whole]
        handle.remove()
    assert rows() == [2]


def test_stopping_early_runs_no_further_block():
    model = small_vit()
    compressed = compress(model, plan_for(model))
    ran = []
    for index, block in enumerate(compressed.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    for execution in ("folded", "literal"):
        compressed.execution = execution
        ran.clear()
        compressed.forward_intermediates(images_for(model), [0, 2], False, True, True, intermediates_only=True)
        assert ran == [0, 1, 2]


@pytest.mark.parametrize("stages", ["every block", "one stage", "some blocks"])
@pytest.mark.parametrize("execution", ["folded", "literal"])
def test_forward_intermediates(execution, stages):
    """Every block's full map: what the equations give when the stage is reconstructed after that block."""
    model = small_vit(reg_tokens=1).double()
    compressed = compress(model, plan_for(model, stages=STAGES[stages]))
    random_matrices_(compressed)
    compressed.execution = execution
    images = images_for(model)
    final, maps = compressed.forward_intermediates(images, norm=False, output_fmt="NLC", return_prefix_tokens=True)
    torch.testing.assert_close(final, compressed.forward_features(images))
    for block, (patches, prefix) in enumerate(maps):
        expected = written_out(model, compressed, images, block)
        torch.testing.assert_close(torch.cat([prefix, patches], dim=1), expected, rtol=1e-10, atol=1e-10)
    taken = compressed.forward_intermediates(images, [1, 3], intermediates_only=True, stop_early=True, norm=True)
    assert [tuple(value.shape) for value in taken] == [(3, 32, 7, 5)] * 2
    expected = model.norm(maps[3][0]).transpose(1, 2).reshape(3, 32, 7, 5)
    torch.testing.assert_close(taken[1], expected)


def test_features_only_and_pruned_layers():
    model = small_vit()
    compressed = compress(model, plan_for(model, stages=[(0, 0), (2, 4)])).eval()
    images = images_for(model)
    expected = compressed.forward_intermediates(images, [3], intermediates_only=True, norm=True)[0]
    with torch.no_grad():
        assert compressed.prune_intermediate_layers([1, 3]) == [1, 3]
        assert len(compressed.blocks) == 4
        torch.testing.assert_close(
            compressed.forward_intermediates(images, [3], intermediates_only=True, norm=True)[0], expected
        )
        assert compressed(images).shape == (3, 36, 32)


@pytest.mark.parametrize("training", [True, False])
def test_gradient_checkpointing_changes_nothing(training):
    model = small_vit(drop_path_rate=0.0).train(training)
    compressed = compress(model, plan_for(model)).train(training)
    images = images_for(model)
    expected = outputs_and_gradients(compressed, images, lambda m: m(images))
    compressed.set_grad_checkpointing()
    assert_same(outputs_and_gradients(compressed, images, lambda m: m(images)), expected, 1e-6)


def test_drop_path_trains():
    model = small_vit(drop_path_rate=0.5, drop_rate=0.1, pos_drop_rate=0.1).train()
    compressed = compress(model, plan_for(model)).train()
    images = images_for(model)
    torch.manual_seed(3)
    folded = compressed(images)
    compressed.execution = "literal"
    torch.manual_seed(3)
    torch.testing.assert_close(folded, compressed(images), rtol=1e-4, atol=1e-5)


def test_the_given_model_is_left_as_it_was():
    model = small_vit().train()
    before = copy.deepcopy(model.state_dict())
    modules = list(model.modules())
    compressed = compress(model, plan_for(model))
    with torch.no_grad():
        for parameter in compressed.parameters():
            parameter.zero_()
    assert type(model) is VisionTransformer
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert compressed.training


def test_state_dict_keeps_timm_names_and_goes_round():
    model = small_vit()
    plan = plan_for(model)
    compressed = compress(model, plan)
    names = set(compressed.state_dict())
    assert set(model.state_dict()) < names
    assert all(name.startswith("stages.") for name in names - set(model.state_dict()))
    random_matrices_(compressed)
    again = compress(small_vit(), plan)
    images = images_for(model)
    with torch.no_grad():
        again(images)  # keeps transitions, which must not outlive the matrices
        again.load_state_dict(compressed.state_dict())
        torch.testing.assert_close(again(images), compressed(images))
    # Support and fixed matrices have the same layout.
    compress(model, plan, train_matrices=None).load_state_dict(compressed.state_dict())


@pytest.mark.parametrize("change", ["in place", "optimizer", "data", "swapped"])
def test_kept_transitions_follow_the_matrices(change):
    model = small_vit()
    compressed = compress(model, plan_for(model)).eval()
    images = images_for(model)
    with torch.no_grad():
        before = compressed(images)
    matrices = compressed.stages["0"]
    with torch.no_grad():
        if change == "in place":
            matrices.merge.mul_(2.0)
        elif change == "data":
            matrices.merge.data = matrices.merge.data * 2.0
        elif change == "swapped":
            matrices.merge = torch.nn.Parameter(matrices.merge * 2.0)
    if change == "optimizer":
        compressed(images).square().sum().backward()
        torch.optim.SGD([matrices.merge], lr=1.0).step()
    with torch.no_grad():
        after = compressed(images)
        compressed.execution = "literal"
        torch.testing.assert_close(after, compressed(images), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(before, after, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_changes(dtype):
    model = small_vit()
    compressed = compress(model, plan_for(model))
    with torch.no_grad():
        compressed(images_for(model))
        compressed.to(dtype)
        images = images_for(compressed)
        out = compressed(images)
        compressed.execution = "literal"
        tolerance = 1e-10 if dtype == torch.float64 else 0.1
        torch.testing.assert_close(out, compressed(images), rtol=tolerance, atol=tolerance)
    assert out.dtype == dtype


def test_autocast():
    model = small_vit()
    compressed = compress(model, plan_for(model))
    images = images_for(model)
    with torch.no_grad():
        expected = compressed(images)
        with torch.autocast("cpu", torch.bfloat16):
            out = compressed(images)
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        compressed(images).float().square().sum().backward()
    assert all(value.grad is not None and torch.isfinite(value.grad).all() for value in compressed.parameters())


def test_inference_mode_then_training():
    model = small_vit()
    for train_matrices in ("support", None):
        compressed = compress(model, plan_for(model), train_matrices=train_matrices)
        with torch.inference_mode():
            expected = compressed(images_for(model))
        assert expected.shape == (3, 7)
        compressed(images_for(model)).sum().backward()


def test_exports_with_any_batch():
    model = small_vit(depth=2)
    compressed = compress(model, plan_for(model))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(compressed, (images_for(model),), dynamic_shapes=({0: batch},))
    images = images_for(model, 5)
    torch.testing.assert_close(program.module()(images), compressed(images))


@pytest.mark.parametrize("execution", ["folded", "literal"])
@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_graph_breaks(training, execution):
    model = small_vit(depth=2)
    compressed = compress(model, plan_for(model)).train(training)
    compressed.execution = execution
    images = images_for(model)
    torch._dynamo.reset()
    compiled = torch.compile(compressed, fullgraph=True, backend="eager")
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(images), compressed(images))


def test_what_trains():
    model = small_vit()
    plan = plan_for(model)
    free = {
        name: sum(p.numel() for p in compress(model, plan, train_matrices=name).stages.parameters())
        for name in ("support", "dense", None)
    }
    unpruned = sum(int(plan.token_mask(block).sum()) for block in range(plan.depth))
    assert free["support"] == 2 * unpruned
    assert free["dense"] == 2 * sum(plan.tokens) * plan.num_tokens
    assert free[None] == 0
    dense = compress(model, plan, train_matrices="dense")
    parameters = {id(parameter) for parameter in dense.parameters()}
    assert all(id(matrix) in parameters for matrix in dense.merge_matrices() + dense.reconstruct_matrices())
    for block, (merge, reconstruct) in enumerate(
        zip(compress(model, plan).merge_matrices(), compress(model, plan).reconstruct_matrices(), strict=True)
    ):
        torch.testing.assert_close(merge, plan.merge_matrix(block))
        torch.testing.assert_close(reconstruct, plan.reconstruct_matrix(block))


def test_matrices_are_grouped_and_not_decayed():
    model = small_vit()
    compressed = compress(model, plan_for(model, stages=[(1, 2), (4, 4)]))
    matrices = {f"stages.{block}.{name}" for block in (1, 4) for name in ("merge", "reconstruct")}
    assert compressed.no_weight_decay() == set(model.no_weight_decay()) | matrices
    groups = timm.models.group_parameters(compressed, compressed.group_matcher(), reverse=True)
    assert groups["stages.1.merge"] == groups["blocks.1.attn.qkv.weight"]
    assert groups["stages.4.merge"] == groups["blocks.4.attn.qkv.weight"]
    optimizer = create_optimizer_v2(compressed, "adamw", lr=1e-3, weight_decay=0.1)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    assert not decayed & {id(parameter) for parameter in compressed.stages.parameters()}


def test_reset_classifier_changes_what_is_read():
    model = small_vit()
    compressed = compress(model, plan_for(model))
    images = images_for(model)
    assert compressed.get_classifier() is compressed.head
    for pooling, shape in (("token", (3, 4)), ("avg", (3, 4)), ("max", (3, 4)), ("", (3, 36, 4))):
        compressed.reset_classifier(4, pooling)
        outputs = []
        for execution in ("folded", "literal"):
            compressed.execution = execution
            with torch.no_grad():
                outputs.append(compressed(images))
        assert outputs[0].shape == shape
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_copies_and_pickles():
    model = small_vit()
    compressed = compress(model, plan_for(model)).eval()
    images = images_for(model)
    with torch.no_grad():
        expected = compressed(images)
        assert torch.equal(copy.deepcopy(compressed)(images), expected)
        assert torch.equal(pickle.loads(pickle.dumps(compressed))(images), expected)


@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_patch16_224",
        "deit_small_patch16_224",
        "deit_base_patch16_224",
        "deit_small_distilled_patch16_224",
        "deit3_small_patch16_224",
        "vit_small_patch16_224",
        "vit_base_patch16_384",
        "vit_small_patch14_reg4_dinov2",
        "vit_base_patch16_siglip_224",
    ],
)
def test_models_people_use(name):
    model = timm.create_model(name, depth=3, **({"img_size": 224} if "dinov2" in name else {})).eval()
    compressed = compress(model, plan_for(model, 0.6, 0.1))
    assert isinstance(compressed, type(model))
    images = images_for(model, batch=1)
    with torch.inference_mode():
        folded = compressed(images)
        compressed.execution = "literal"
        torch.testing.assert_close(folded, compressed(images), rtol=1e-3, atol=1e-4)
        assert folded.shape == model(images).shape
        assert compressed.forward_features(images).shape == (1, compressed.plan.num_tokens, model.embed_dim)


def test_masks_are_refused():
    model = small_vit()
    compressed = compress(model, plan_for(model))
    images = images_for(model)
    compressed(images, attn_mask=None, is_causal=False)
    for function in (
        compressed,
        compressed.forward_features,
        compressed.forward_intermediates,
        compressed.blocks[0].attn,
    ):
        with pytest.raises(ValueError, match="attn_mask must be None"):
            function(images, attn_mask=torch.zeros(36, 36))
        with pytest.raises(ValueError, match="is_causal must be False"):
            function(images, is_causal=True)


def test_other_image_sizes_are_refused():
    model = small_vit(dynamic_img_size=True)
    compressed = compress(model, plan_for(model))
    with pytest.raises(ValueError, match=r"images give 82 tokens, but the plan was made for a grid of \(7, 5\)"):
        compressed(torch.randn(1, 3, 36, 36))
    with pytest.raises(
        ValueError, match=r"img_size \(36, 36\) .* grid of \(9, 9\), but the plan was made for \(7, 5\)"
    ):
        compressed.set_input_size(img_size=(36, 36))
    compressed.set_input_size(img_size=(28, 20))


class _Subclass(VisionTransformer):
    pass


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: timm.create_model("resnet10t"), TypeError, "got ResNet"),
        (lambda: timm.create_model("beit_base_patch16_224", depth=1, embed_dim=48), TypeError, "got Beit"),
        (
            lambda: _Subclass(img_size=(28, 20), patch_size=4, embed_dim=32, depth=5, num_heads=2),
            TypeError,
            "got _Subcl",
        ),
        (lambda: small_vit(patch_drop_rate=0.5), ValueError, "drops patches at random .*patch_drop_rate=0"),
        (lambda: small_vit(attn_drop_rate=0.5), ValueError, "attention dropout 0.5 .*in block 0"),
        (
            lambda: small_vit(img_size=20),
            ValueError,
            r"plan was made for grid \(7, 5\), but the model has grid \(5, 5\)",
        ),
        (lambda: small_vit(depth=4), ValueError, "plan was made for depth 5, but the model has depth 4"),
        (lambda: small_vit(reg_tokens=2), ValueError, "for num_prefix_tokens 1, but the model has num_prefix_tokens 3"),
    ],
)
def test_models_that_cannot_be_compressed(make, error, message):
    plan = plan_for(small_vit())
    with pytest.raises(error, match=message):
        compress(make(), plan)


@pytest.mark.parametrize("merge_site", ["block", "attention"])
def test_the_shortcut_of_all_keeps_what_the_merge_leaves_out(merge_site):
    """Blocks that add nothing leave every token as it is; by the paper's shortcut merged ones become alike."""
    model = small_vit(depth=2).double()
    with torch.no_grad():
        for block in model.blocks:
            for last in (block.attn.proj, block.mlp.fc2):
                last.weight.zero_()
                last.bias.zero_()
    images, plan = images_for(model), plan_for(model)
    expected = model.forward_features(images)
    for shortcut in ("all", "pruned"):
        compressed = compress(model, plan, shortcut=shortcut, merge_site=merge_site)
        same = torch.isclose(compressed.forward_features(images), expected, rtol=1e-10, atol=1e-10).all()
        assert same == (shortcut == "all")


@pytest.mark.parametrize("shortcut", ["pruned", "all"])
def test_entries_that_are_zero_train(shortcut):
    """A merged patch may weigh nothing at first, and come to weigh something."""
    dense = small_vit(depth=2, img_size=(12, 8)).double()
    segments, weights = (0, 0, 0, 0, 0, 0), (0.4, 0.0, 0.0, 0.0, 0.0, 0.6)
    stages = tuple(StagePlan(block, block, segments, weights) for block in range(2))
    model = compress(dense, CompressionPlan((3, 2), 2, 1, stages), shortcut=shortcut)
    images, gradients = images_for(dense), []
    for execution in ("folded", "literal"):
        model.execution = execution
        gradients.append(torch.autograd.grad(model(images).square().sum(), list(model.stages.parameters())))
    assert (gradients[0][0] != 0).all()
    for folded, literal in zip(*gradients, strict=True):
        torch.testing.assert_close(folded, literal, rtol=1e-9, atol=1e-9)


def test_the_shortcut_is_saved_and_carries_no_more_than_is_read(tmp_path):
    model = small_vit(depth=4)
    plan = plan_for(model)
    compressed = compress(model, plan, shortcut="all").eval()
    save_pretrained(compressed, tmp_path / "m", model_args={"embed_dim": 32, "depth": 4, "num_heads": 2})
    loaded = load_pretrained(tmp_path / "m")
    assert loaded.shortcut == "all"
    images = images_for(model)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), compressed(images))
    # The class token is read at the end: after the last block's merge no other row is carried.
    assert len(compressed.transitions()[-1].starts) == plan.tokens[-1]
    for matrix, tokens in zip(compressed.transitions(), plan.tokens, strict=True):
        assert tokens <= len(matrix.starts) < tokens + plan.num_tokens


def test_bad_options():
    model = small_vit()
    plan = plan_for(model)
    with pytest.raises(ValueError, match="train_matrices must be 'support', 'dense' or None, got 'all'"):
        compress(model, plan, train_matrices="all")
    with pytest.raises(TypeError, match="plan must be a CompressionPlan or an AdaptivePlan, got dict"):
        compress(model, plan.to_dict())
    with pytest.raises(TypeError, match="compressed already"):
        compress(compress(model, plan), plan)
    with pytest.raises(ValueError, match="execution must be one of 'folded', 'literal', got 'fast'"):
        compress(model, plan).execution = "fast"
    scaling = small_vit(block_fn=ParallelScalingBlock)
    with pytest.raises(ValueError, match="size_bias needs timm's Attention in every block; block 0, a ParallelScal"):
        compress(scaling, plan, size_bias=True)
    with pytest.raises(ValueError, match="merge_site must be 'block' or 'attention', got 'mlp'"):
        compress(model, plan, merge_site="mlp")
    with pytest.raises(ValueError, match="shortcut must be 'pruned' or 'all', got 'none'"):
        compress(model, plan, shortcut="none")
    with pytest.raises(
        ValueError, match="merge_site='attention' needs timm's Block .*; block 0 is a ParallelScalingBlo"
    ):
        compress(scaling, plan, merge_site="attention")
