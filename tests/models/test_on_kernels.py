"""Compressed models on the Triton kernels, on a GPU or in Triton's interpreter, and what a training step keeps."""

import copy
from itertools import pairwise

import pytest
import torch
from helpers import ON_KERNELS, images_for, plan_for, skip_without_kernels, small_vit
from torch.utils._python_dispatch import TorchDispatchMode

from bench.memory import activation_bytes
from pm_kernels import SparseRows, backend
from pm_models import AdaptivePlan, compress

skip_without_kernels()
pytestmark = ON_KERNELS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POOLS = {
    "token": {},
    "average": {"global_pool": "avg"},
    "average after norm": {"global_pool": "avg", "fc_norm": False, "reg_tokens": 3},
    "average without norm": {"global_pool": "avg", "final_norm": False},
}

WITHOUT_LAUNCH = {  # views, and memory that nothing is written to
    "alias", "as_strided", "detach", "empty", "empty_like", "expand", "new_empty", "permute", "promote_types", "select",
    "slice", "split", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view", "_reshape_alias",
}  # fmt: skip


def compressed_vit(train_matrices="support", stages=None, **arguments):
    """Four blocks of width 32, with matrices that are no longer the plan's."""
    model = small_vit(depth=4, **arguments)
    compressed = compress(model, plan_for(model, stages=stages), train_matrices=train_matrices).to(DEVICE)
    with torch.no_grad():
        for parameter in compressed.stages.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return compressed


def outputs_and_gradients(model, images, name):
    model.zero_grad()
    with backend(name):
        out = model(images)
        out.square().sum().backward()
    return {"out": out.detach()} | {key: value.grad for key, value in model.named_parameters()}


@pytest.mark.parametrize("stages", [None, [(1, 2)]], ids=["every block", "one stage"])
@pytest.mark.parametrize("train_matrices", ["support", "dense"])
@pytest.mark.parametrize("pool", POOLS)
def test_training_on_the_kernels(pool, train_matrices, stages):
    model = compressed_vit(train_matrices, stages, **POOLS[pool]).train()
    images = images_for(model).to(DEVICE)
    expected = outputs_and_gradients(model, images, "reference")
    largest = max(float(value.abs().max()) for value in expected.values() if value is not None)
    for name, value in outputs_and_gradients(model, images, "triton").items():
        if expected[name] is None:
            assert value is None, name
            continue
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-6 * largest)


@pytest.mark.parametrize("train_matrices", ["support", "dense", None])
def test_inference_on_the_kernels(train_matrices):
    model = compressed_vit(train_matrices).eval()
    images = images_for(model).to(DEVICE)
    with torch.inference_mode(), backend("reference"):
        expected = model(images)
    with torch.inference_mode(), backend("triton"):
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


def test_checkpointing_on_the_kernels():
    model = compressed_vit().train()
    images = images_for(model).to(DEVICE)
    expected = outputs_and_gradients(model, images, "triton")
    model.set_grad_checkpointing()
    for name, value in outputs_and_gradients(model, images, "triton").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


class Recorded(TorchDispatchMode):
    """The operators that ran and the shapes of what they gave."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        results = out if isinstance(out, (tuple, list)) else [out]
        shapes = [tuple(result.shape) for result in results if isinstance(result, torch.Tensor)]
        self.calls.append((function.overloadpacket.__name__, shapes))
        return out


@pytest.mark.parametrize("training", [False, True])
def test_between_blocks_there_is_one_operator_and_no_full_map(training):
    """A transition is all that happens between two blocks: no copy, no sum, no norm; and no tensor has all tokens."""
    model = compressed_vit().train(training)
    images = images_for(model).to(DEVICE)
    with torch.set_grad_enabled(training), backend("triton"), Recorded() as recorded:
        model(images)
    names = [name for name, _ in recorded.calls]
    first = names.index("mix")
    assert names.count("mix") == 4 + 1  # before each block, and for the head
    after = recorded.calls[first + 1 :]
    tokens = model.plan.num_tokens
    activations = [shape for _, shapes in after for shape in shapes if len(shape) == 3]
    assert activations
    assert not any(shape[1] >= tokens for shape in activations)
    copies = {"cat", "stack", "clone", "copy_", "_to_copy", "contiguous"}
    if not training:  # where the transitions are folded anew
        assert not copies & {name for name, _ in after}
    # Three blocks have one sum and one norm left; the last one computes the prefix alone.
    rows = [name for name, shapes in after if shapes and len(shapes[0]) == 3 and shapes[0][1] > 1]
    assert rows.count("add") == rows.count("native_layer_norm") == 3


@pytest.mark.parametrize("readout", ["forward", "forward_features"])
def test_a_merge_adds_at_most_two_launches(readout):
    """A match and a transition, which has the sum and the norm in it; what composes segments, for a full map alone."""
    dense = small_vit(depth=6).to(DEVICE).eval()
    patches, prefix = dense.patch_embed.num_patches, dense.num_prefix_tokens
    images = images_for(dense).to(DEVICE)
    counted = []
    for blocks in ((), (1,), (1, 3), (1, 3, 4)):
        merges = {block: prefix + patches - 2 * (index + 1) for index, block in enumerate(blocks)}
        model = compress(dense, AdaptivePlan(dense.patch_embed.grid_size, 6, prefix, merges)).eval()
        with torch.no_grad(), backend("triton"), Recorded() as recorded:
            getattr(model, readout)(images)
        names = [name for name, _ in recorded.calls]
        assert names.count("match") == len(blocks)
        counted.append(sum(name not in WITHOUT_LAUNCH for name in names))
    first, *others = (after - before for before, after in pairwise(counted))
    # The first one also sets out the sizes, and for a full map the rows that every token is to read.
    assert first <= (1 if readout == "forward" else 4)
    assert all(added <= (0 if readout == "forward" else 2) for added in others)


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_what_a_training_step_keeps(name):
    """At keep rate 0.6 at most 0.66 of what the dense model keeps."""
    model = small_vit(img_size=(56, 56), depth=6).train().to(DEVICE)
    compressed = compress(model, plan_for(model, keep_rate=0.6, prune_rate=0.1)).train()
    images = images_for(model, batch=2).to(DEVICE)
    with backend(name):
        assert activation_bytes(compressed, images) <= 0.66 * activation_bytes(model, images)


@pytest.mark.parametrize("where", ["block", "norm1", "norm2"])
def test_hooks_see_what_they_see_on_the_dense_model(where):
    model = compressed_vit().eval()
    images = images_for(model).to(DEVICE)
    seen = []
    with torch.no_grad():
        expected = model(images)
        block = model.blocks[1]
        module = block if where == "block" else getattr(block, where)
        handle = module.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
        torch.testing.assert_close(model(images), expected)
        handle.remove()
        ((given, result),) = seen
        assert given.shape == result.shape == (3, model.plan.tokens[1], 32)
        torch.testing.assert_close(module(given), result)


def test_frozen_dense_matrices_are_taken_by_what_they_hold():
    """Constant transitions of dense matrices are sparse as long as they are the plan's, and dense if they trained."""
    model = small_vit(depth=3, img_size=(80, 80))
    compressed = compress(model, plan_for(model, 0.6, 0.1), train_matrices="dense").eval()
    images = images_for(model)
    for kind in (SparseRows, torch.Tensor):
        frozen = copy.deepcopy(compressed).freeze()
        assert {type(matrix) for matrix in frozen.stages.fold("all", torch.float32).transitions} == {kind}
        with torch.no_grad():
            compressed.execution = "literal"
            expected = compressed.forward_features(images)
            torch.testing.assert_close(frozen.forward_features(images), expected, rtol=1e-3, atol=1e-3)
            for parameter in compressed.stages.parameters():
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
        compressed.execution = "folded"
