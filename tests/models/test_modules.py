"""What users hang on modules, or put in their place, works on a compressed model as it does on timm's."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from helpers import images_for, plan_for, small_vit
from torch import nn
from torch.nn.utils import parametrize, prune

from pm_models import compress

MODELS = {
    "token": {},
    "average": {"global_pool": "avg"},
    "average without norm": {"global_pool": "avg", "final_norm": False},
    "layer scale": {"init_values": 0.5, "qk_norm": True, "reg_tokens": 2},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "rotary": {"name": "eva02_tiny_patch14_224"},
    "rotary, scaled": {"name": "vit_small_patch16_dinov3"},
}
PARTS = [
    "patch_embed", "blocks", "norm", "head", "blocks.0", "blocks.0.norm1", "blocks.0.attn", "blocks.2",
    "blocks.2.norm1", "blocks.2.attn", "blocks.2.attn.proj",
    "blocks.2.norm2", "blocks.2.mlp", "blocks.2.mlp.fc2", "blocks.2.drop_path2",
]  # fmt: skip


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Quantised(torch.Tensor):
    """A weight that is no plain one, as torchao makes them: it knows products, and cannot be split."""

    @staticmethod
    def __new__(cls, plain):
        return torch.Tensor._make_wrapper_subclass(cls, plain.shape, dtype=plain.dtype, device=plain.device)

    def __init__(self, plain):
        self.plain = plain

    def __tensor_flatten__(self):
        return ["plain"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, size, stride):
        return cls(inner["plain"])

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            inputs, weight, *bias = args
            return function(inputs, 3 * weight.plain, *bias)
        if function in (torch.Tensor.split, torch.split, torch.chunk):
            raise NotImplementedError("this weight cannot be split")
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].plain.detach())
        raise NotImplementedError(f"{function} of a quantised weight")


def forward_doubled(module, _):
    plain = type(module).forward
    module.forward = lambda *args, **kwargs: bent(plain(module, *args, **kwargs))


def bent(x):
    """No multiple of x, which a norm would not see."""
    return x + x.square()


TOUCHES = {
    "forward of its own": forward_doubled,
    "hook": lambda module, _: module.register_forward_hook(lambda _, __, output: bent(output)),
    "pre-hook": lambda module, _: module.register_forward_pre_hook(lambda _, inputs: (bent(inputs[0]), *inputs[1:])),
    "pruned": lambda module, name: prune.random_unstructured(module, name, 0.5),
    "parametrised": lambda module, name: parametrize.register_parametrization(module, name, Doubled()),
    "weight norm": lambda module, name: prune_norm(module, name),
    "quantised": lambda module, name: setattr(
        module, name, nn.Parameter(Quantised(getattr(module, name).detach()), requires_grad=False)
    ),
}


def prune_norm(module, name):
    with pytest.warns(FutureWarning, match="weight_norm"):
        torch.nn.utils.weight_norm(module, name)
    with torch.no_grad():
        getattr(module, f"{name}_g").mul_(2)


def pair(kind, depth=3, **arguments):
    """A model, and one compressed by a plan that keeps every patch: they compute the same, whatever hangs on them."""
    dense = small_vit(depth=depth, **MODELS[kind], **arguments).double()
    compressed = compress(dense, plan_for(dense, 1.0, 0.0))
    return dense, compressed, images_for(dense)


def parts_of(model):
    return [name for name in PARTS if name in dict(model.named_modules())]


@pytest.mark.parametrize("kind", MODELS)
def test_hooks_see_what_they_see_in_the_plain_model(kind):
    dense, compressed, images = pair(kind)
    expected = dense(images)
    for name in parts_of(dense):
        if name == "blocks" and kind.startswith("rotary"):
            continue  # an Eva walks its blocks
        seen = []
        for model in (dense, compressed):
            module = model.get_submodule(name)
            for register in (module.register_forward_pre_hook, module.register_forward_hook):
                register(lambda _, inputs, output=None, seen=seen: seen.append((inputs[0].clone(), output)))
            torch.testing.assert_close(model(images), expected)
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        half = len(seen) // 2
        assert half >= 2, name
        for plain, ours in zip(seen[:half], seen[half:], strict=True):
            torch.testing.assert_close(ours, plain, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", MODELS)
def test_backward_hooks_see_what_they_see_in_the_plain_model(kind):
    dense, compressed, images = pair(kind)
    for name in ("blocks.0", "blocks.2", "blocks.2.norm1", "blocks.2.attn.proj", "norm"):
        seen = []
        for model in (dense, compressed):
            module = model.get_submodule(name)
            module.register_full_backward_hook(lambda _, given, output, seen=seen: seen.append((given, output)))
            model(images).square().sum().backward()
            module._backward_hooks.clear()
        torch.testing.assert_close(seen[1], seen[0], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", MODELS)
def test_global_hooks_meet_the_same_modules(kind):
    dense, compressed, images = pair(kind)
    met = []
    for model in (dense, compressed):
        names = {module: name for name, module in model.named_modules()}
        register = nn.modules.module.register_module_forward_hook
        handle = register(lambda module, _, output, names=names: met.append((names.get(module), output)))
        model(images)
        handle.remove()
        met.append(None)
    plain, ours = met[: met.index(None)], met[met.index(None) + 1 : -1]
    ours = [(name, output) for name, output in ours if name is not None and not name.startswith("stages")]
    assert [name for name, _ in ours] == [name for name, _ in plain]
    for (name, expected), (_, output) in zip(plain, ours, strict=True):
        torch.testing.assert_close(output, expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("touch", TOUCHES)
@pytest.mark.parametrize("part", ["norm1", "attn", "attn.qkv", "attn.proj", "mlp.fc1", "norm2", ""])
@pytest.mark.parametrize("block", [0, 2])
def test_what_is_put_on_a_part_counts(block, part, touch):
    dense, compressed, images = pair("token")
    before = dense(images)
    for model in (dense, compressed):
        module = model.get_submodule(f"blocks.{block}.{part}".removesuffix("."))
        if touch in ("pruned", "parametrised", "weight norm", "quantised") and "weight" not in module._parameters:
            pytest.skip("no weight")
        if touch in ("weight norm", "quantised") and not isinstance(module, nn.Linear):
            pytest.skip("of matrices only")
        torch.manual_seed(3)
        TOUCHES[touch](module, "weight")
    expected = dense(images)
    assert not torch.allclose(before, expected, rtol=1e-3)
    torch.testing.assert_close(compressed(images), expected)
    with torch.no_grad():
        torch.testing.assert_close(compressed(images), expected)
    for _ in range(2):  # no graph is left from the step before
        compressed(images).square().sum().backward()


@pytest.mark.parametrize("touch", ["pruned", "parametrised"])
@pytest.mark.parametrize("name", ["merge", "reconstruct"])
def test_matrices_are_changed_as_any_weight(name, touch):
    model = small_vit(depth=3).double()
    compressed = compress(model, plan_for(model))
    images = images_for(model)
    before = compressed(images)
    TOUCHES[touch](compressed.stages["1"], name)
    for _ in range(2):
        after = compressed(images)
        after.square().sum().backward()
    compressed.execution = "literal"
    torch.testing.assert_close(compressed(images), after, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(before, after, rtol=1e-3)


@pytest.mark.parametrize("kind", ["token", "rotary, scaled"])  # timm's EVA-02 takes weights of modules it does not call
@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("where", ["cpu", "disk", "dispatched"])
def test_offloaded_weights(kind, where, buffers, tmp_path):
    dense = small_vit(depth=3, **MODELS[kind])
    compressed = compress(dense, plan_for(dense)).eval()
    images = images_for(dense)
    with torch.no_grad():
        expected = compressed(images)
        if where == "cpu":
            cpu_offload(compressed, "cpu", offload_buffers=buffers)
        elif where == "disk":
            disk_offload(compressed, str(tmp_path), "cpu", offload_buffers=buffers)
        else:
            dispatch_model(compressed, {"": "cpu"}, force_hooks=True, offload_buffers=buffers)
        assert where == "dispatched" or next(compressed.parameters()).is_meta
        torch.testing.assert_close(compressed(images), expected, rtol=1e-5, atol=1e-5)


def test_a_model_goes_to_meta_and_its_copy_back():
    dense = small_vit()
    compressed = compress(dense, plan_for(dense)).eval()
    images = images_for(dense)
    empty = copy.deepcopy(compressed).eval().to("meta")
    assert empty(images.to("meta")).shape == (3, 7)
    torch.testing.assert_close(compressed(images), compress(dense, compressed.plan)(images))


CHANGES = {
    "in place": lambda p: p.mul_(1.5),
    "data in place": lambda p: p.data.mul_(1.5),
    "data copied": lambda p: p.data.copy_(1.5 * p.data),
    "data set": lambda p: setattr(p, "data", 1.5 * p.data),
    "fused optimiser": lambda p: fused_step(p),
    "foreach": lambda p: torch._foreach_mul_([p], 1.5),
    "filled through numpy": lambda p: p.detach().numpy().__imul__(1.5),
}


def fused_step(parameter):
    parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([parameter], lr=0.1, fused=True).step()
    parameter.grad = None


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("train_matrices", ["support", "dense"])
@pytest.mark.parametrize("change", CHANGES)
def test_every_forward_has_the_matrices_as_they_are(change, train_matrices, compiled):
    dense = small_vit(depth=2)
    model = compress(dense, plan_for(dense), train_matrices=train_matrices).eval()
    images = images_for(dense)
    call = torch.compile(model, backend="eager") if compiled else model
    torch._dynamo.reset()
    with torch.no_grad():
        before = call(images)
        for parameter in model.stages.parameters():
            CHANGES[change](parameter)
        after = call(images)
        model.execution = "literal"
        torch.testing.assert_close(after, model(images), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, after, rtol=1e-3)


def test_a_frozen_model_is_constant_and_says_so():
    dense = small_vit()
    model = compress(dense, plan_for(dense)).eval()
    images = images_for(dense)
    with torch.no_grad():
        expected = model(images)
        features = model.forward_features(images)
        frozen = copy.deepcopy(model).freeze()
        torch.testing.assert_close(frozen(images), expected)
        torch.testing.assert_close(frozen.forward_features(images), features)
        frozen.execution = "literal"
        torch.testing.assert_close(frozen(images), expected, rtol=1e-4, atol=1e-5)
    assert not list(frozen.stages.parameters())
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"stages.0.merge\""):
        frozen.load_state_dict(model.state_dict())
    assert torch.equal(frozen.freeze()(images), frozen(images))


@pytest.mark.parametrize("kind", [kind for kind in MODELS if not kind.startswith("rotary")])  # timm's Eva takes none
def test_no_images_give_no_logits(kind):
    dense = small_vit(depth=3, **MODELS[kind])
    compressed = compress(dense, plan_for(dense)).eval()
    images = images_for(dense)[:0]
    for execution in ("folded", "literal"):
        compressed.execution = execution
        assert compressed(images).shape == dense.eval()(images).shape == (0, 7)
        assert compressed.forward_features(images).shape == dense.forward_features(images).shape


def test_another_grid_of_as_many_patches_is_refused():
    dense = small_vit(dynamic_img_size=True)
    compressed = compress(dense, plan_for(dense))
    images = torch.randn(1, 3, 20, 28)
    for function in (compressed, compressed.forward_features, compressed.forward_intermediates):
        with pytest.raises(ValueError, match=r"made for a grid of \(7, 5\), not \(5, 7\)"):
            function(images)


def test_symbolic_tracing_is_refused_in_a_line():
    dense = small_vit()
    with pytest.raises(TypeError, match=r"cannot be traced by torch.fx.symbolic_trace; trace it by torch.export"):
        torch.fx.symbolic_trace(compress(dense, plan_for(dense)))


@pytest.mark.parametrize("touch", ["hook", "forward of its own"])
def test_a_block_that_merges_inside_its_attention_cannot_be_passed_by(touch):
    dense = small_vit(depth=2)
    compressed = compress(dense, plan_for(dense), merge_site="attention")
    TOUCHES[touch](compressed.blocks[1], None)
    with pytest.raises(ValueError, match="merge_site='attention' runs a stage's first block in parts"):
        compressed(images_for(dense))
