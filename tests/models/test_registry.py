"""timm's names for compressed models, as timm's own train.py creates them."""

import copy
import pickle

import pytest
import timm
import torch
from helpers import images_for, plan_for, small_vit
from timm.data import resolve_data_config

from pm_models import PMVisionTransformer, compress, load_pretrained, save_pretrained

SMALL = {"img_size": 28, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 7}


def test_a_registered_name_is_the_model_compressed(tmp_path):
    dense = small_vit(**SMALL)
    plan = plan_for(dense)
    plan.save(tmp_path / "plan.json")
    expected = compress(dense, plan, size_bias=True)
    torch.save(expected.state_dict(), tmp_path / "weights.pth")
    for given in (plan, plan.to_dict(), tmp_path / "plan.json", str(tmp_path / "plan.json")):
        model = timm.create_model(
            "pm_vit_tiny_patch16_224",
            plan=given,
            size_bias=True,
            checkpoint_path=str(tmp_path / "weights.pth"),
            **SMALL,
        ).eval()
        assert isinstance(model, PMVisionTransformer)
        images = images_for(dense)
        assert torch.equal(model(images), expected(images))


def test_arguments_that_timms_train_script_passes():
    plan = plan_for(timm.create_model("deit_small_patch16_224", num_classes=0))
    model = timm.create_model(
        "pm_deit_small_patch16_224", pretrained=False, in_chans=3, num_classes=5, drop_rate=0.0, drop_path_rate=0.1,
        drop_block_rate=None, global_pool=None, bn_momentum=None, bn_eps=None, scriptable=False, checkpoint_path="",
        plan=plan,
    )  # fmt: skip
    assert model.num_classes == 5
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    assert resolve_data_config({}, model=model)["mean"] == (0.485, 0.456, 0.406)
    assert model.pretrained_cfg["architecture"] == "deit_small_patch16_224"
    assert model.default_cfg["input_size"] == (3, 224, 224)


def test_every_plain_vision_transformer_has_a_name():
    names = set(timm.list_models("pm_*"))
    assert {f"pm_deit_{size}_patch16_224" for size in ("tiny", "small", "base")} < names
    assert {f"pm_deit_{size}_distilled_patch16_224" for size in ("tiny", "small", "base")} < names
    assert {f"pm_{name}" for name in timm.list_models(module="vision_transformer")} < names
    plan = plan_for(small_vit("deit_tiny_distilled_patch16_224", **SMALL))
    assert timm.create_model("pm_deit_tiny_distilled_patch16_224", plan=plan, **SMALL).num_prefix_tokens == 2


def test_saves_copies_and_pickles(tmp_path):
    plan = plan_for(small_vit(**SMALL))
    model = timm.create_model("pm_vit_tiny_patch16_224", plan=plan, **SMALL).eval()
    save_pretrained(model, tmp_path / "m")
    images = images_for(model)
    for other in (load_pretrained(tmp_path / "m"), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images), model(images))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "pm_vit_tiny_patch16_224 needs plan="),
        ({"plan": "nowhere.json"}, FileNotFoundError, "nowhere.json"),
        ({"plan": {"format": "x"}}, ValueError, "not a compression plan"),
        ({"plan": 3}, TypeError, "plan must be a CompressionPlan or an AdaptivePlan, got int"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        timm.create_model("pm_vit_tiny_patch16_224", **arguments)
