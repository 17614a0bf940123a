"""Wrapped models, in every public function that takes one: as the model inside, and left as it was."""

import copy

import pytest
import torch
from accelerate import Accelerator
from helpers import images_for, plan_for, small_vit
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel

from pm_models import (
    AdaptivePlan,
    Segmenter,
    compress,
    export_model,
    load_pretrained,
    save_pretrained,
    score_tokens,
    to_timm,
    warmup,
)
from pm_models.budget import KeepRates, fit_gmacs
from pm_models.measure import count_gmacs


def compiled(model):
    return torch.compile(model, backend="eager")


def prepared(model):
    """As accelerate prepares it for mixed precision, with a forward of its own."""
    return Accelerator(cpu=True, mixed_precision="bf16").prepare(model)


def given_back(model):
    """As accelerate gives it back after training: on the object hangs a forward still, its class's."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    return accelerator.unwrap_model(accelerator.prepare(model), keep_fp32_wrapper=False)


WRAPPERS = {
    "compiled": compiled,
    "DataParallel": DataParallel,
    "DDP": DistributedDataParallel,
    "accelerate": prepared,
    "compiled in DDP": lambda model: DistributedDataParallel(compiled(model)),
    "DDP compiled": lambda model: compiled(DistributedDataParallel(model)),
    "compiled, in accelerate": lambda model: prepared(compiled(model)),
    "accelerate, in DDP, compiled": lambda model: compiled(DistributedDataParallel(prepared(model))),
    "given back by accelerate": given_back,
}


@pytest.fixture(autouse=True)
def _group():
    """DistributedDataParallel asks for a group, here of one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(params=WRAPPERS)
def wrap(request):
    """Wraps a model; at the end it has to be what it was, inside and out."""
    wrapped = []

    def wrap(model):
        wrapper = WRAPPERS[request.param](model).train(model.training)
        wrapped.append((wrapper, dict(vars(wrapper)), model, state(model)))
        return wrapper

    yield wrap
    assert wrapped
    for wrapper, before, model, inside in wrapped:
        assert vars(wrapper) == before
        assert state(model) == inside


def state(model):
    """Its modules, their modes and what hangs on them; its parameters, which of them train, and their sums."""
    modules = [(id(module), module.training, id(vars(module).get("forward"))) for module in model.modules()]
    return modules, [(id(weight), weight.requires_grad, weight.sum().item()) for weight in model.parameters()]


def same_logits(model, expected, images):
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected(images))


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_compress(wrap, mode):
    dense = small_vit(depth=2).train(mode)
    plan = plan_for(dense)
    expected = compress(dense, plan)
    found = compress(wrap(dense), plan)
    assert type(found) is type(expected)
    assert found.training is mode
    same_logits(found.eval(), expected.eval(), images_for(dense))
    with torch.no_grad():  # it is the new model that runs: not the one that was wrapped
        found.stages["0"].merge.mul_(2)
    assert not torch.equal(found(images_for(dense)), expected(images_for(dense)))


def test_the_plain_model_of_a_compressed_one(wrap):
    dense = small_vit(depth=2)
    model = compress(dense, plan_for(dense))
    wrapped = wrap(model)
    inside = getattr(wrapped, "module", wrapped)
    images = images_for(dense)
    same_logits(getattr(inside, "module", inside).uncompressed(), dense, images)


@pytest.mark.parametrize("kind", ["dense", "compressed", "segmenter"])
def test_saved_and_loaded(wrap, kind, tmp_path):
    model = small_vit(depth=2)
    if kind != "dense":
        model = compress(model, plan_for(model))
    if kind == "segmenter":
        model = Segmenter(model, 3, decoder="linear")
    expected = copy.deepcopy(model)
    save_pretrained(wrap(model), tmp_path / "saved")
    found = load_pretrained(tmp_path / "saved")
    assert type(found) is type(expected)
    assert found.state_dict().keys() == expected.state_dict().keys()
    same_logits(found, expected, images_for(getattr(model, "encoder", model)))


@pytest.mark.parametrize("kind", ["dense", "compressed", "segmenter"])
def test_scores(wrap, kind):
    encoder = small_vit(depth=2).train()
    model = encoder if kind != "compressed" else compress(encoder, plan_for(encoder))
    labels, loss = torch.randint(0, 7, (3,)), nn.functional.cross_entropy
    if kind == "segmenter":
        model, labels = Segmenter(encoder, 3, decoder="linear"), torch.randint(0, 3, (3, 28, 20))
    batches = [(images_for(encoder), labels)]
    expected = score_tokens(copy.deepcopy(model), batches, batches=1, loss_fn=loss)
    assert torch.equal(score_tokens(wrap(model), batches, batches=1, loss_fn=loss), expected)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # PyTorch 2.11
def test_exported(wrap, tmp_path):
    dense = small_vit(depth=1)
    expected = compress(dense, plan_for(dense))
    model = copy.deepcopy(expected)
    found = export_model(wrap(model), tmp_path / "model.pt2", "pt2")
    same_logits(found.run, expected, images_for(dense, 4))


def test_counted_and_fitted(wrap):
    dense = small_vit(depth=2)
    gmacs, size = count_gmacs(dense, (3, 28, 20)), (3, 28, 20)
    wrapped = wrap(dense)
    assert count_gmacs(wrapped, size) == gmacs
    torch.manual_seed(0)
    for plans in (
        KeepRates(lambda rate: plan_for(dense, rate, 0.0), dense.patch_embed.num_patches, 0.0),
        AdaptivePlan.candidates(dense),
    ):
        fit = fit_gmacs(wrapped, plans, lambda plan: compress(wrapped, plan), 0.6 * gmacs)
        assert 0.3 * gmacs < fit.value <= 0.6 * gmacs


def test_a_segmenter_on_it(wrap):
    encoder = small_vit(depth=2)
    plan, images = plan_for(encoder), images_for(encoder)
    plain = Segmenter(copy.deepcopy(encoder), 3, decoder="linear")
    model = Segmenter(wrap(encoder), 3, decoder="linear")
    model.decoder.load_state_dict(plain.decoder.state_dict())
    same_logits(model, plain, images)
    same_logits(model.compressed(plan), plain.compressed(plan), images)
    wrapped = prepared(model)
    same_logits(wrapped.compressed(plan), plain.compressed(plan), images)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # PyTorch 2.11
def test_served(wrap):
    model = small_vit(depth=1)
    images = images_for(model)
    with torch.inference_mode():
        expected = model(images)
    serve = warmup(wrap(model), (3,))
    torch.testing.assert_close(serve(images), expected)
    torch._dynamo.reset()


def test_of_another_library(wrap):
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(32, 8, 1, 2, 32, 64, num_classes=5).eval()
    expected = to_timm(copy.deepcopy(model))
    same_logits(to_timm(wrap(model)), expected, torch.randn(2, 3, 32, 32))


CALLS = {
    "compress": lambda model, _: compress(model, None),
    "save_pretrained": lambda model, folder: save_pretrained(model, folder / "saved"),
    "score_tokens": lambda model, _: score_tokens(model, [], batches=1),
    "export_model": lambda model, folder: export_model(model, folder / "file", "pt2"),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_cannot_be_unwrapped_is_told(call, tmp_path):
    in_part, sharded = small_vit(depth=2), fully_shard(small_vit(depth=2))
    in_part.blocks[1] = compiled(in_part.blocks[1])
    for model, message in (
        (in_part, r"^model has a part, blocks\.1, that is a OptimizedModule; pass the model unwrapped, or"),
        (sharded, r"^model has its weights sharded over processes \(FSDP\); pass a model that has loaded all"),
        ("deit_small_patch16_224", r"^model must be a torch\.nn\.Module, got str$"),
    ):
        with pytest.raises(TypeError, match=message):
            CALLS[call](model, tmp_path)
    assert not list(tmp_path.iterdir())
