"""Saving and loading, the authors' layout, and files that are broken, foreign or hostile."""

import json
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import yaml
from helpers import images_for, plan_for, small_vit
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

from pm_models import (
    CompressionPlan,
    PMVisionTransformer,
    checkpoints,
    compress,
    load_authors_checkpoint,
    load_pretrained,
    save_pretrained,
)
from pm_models.checkpoints import load_state_file
from pm_models.files import unfinished
from pm_models.measure import count_gmacs

FILES = {"README.md", "config.json", "model.safetensors"}


def compressed_vit(train_matrices="support", size_bias=False, **arguments):
    model = small_vit(**arguments)
    return compress(model, plan_for(model), train_matrices=train_matrices, size_bias=size_bias).eval()


def test_the_merge_site_is_saved(tmp_path):
    model = small_vit()
    model = compress(model, plan_for(model), merge_site="attention").eval()
    save_pretrained(model, tmp_path / "model")
    loaded = load_pretrained(tmp_path / "model")
    assert loaded.merge_site == "attention"
    assert torch.equal(loaded(images := images_for(model)), model(images))


@pytest.mark.parametrize("train_matrices", ["support", "dense", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [{}, {"name": "deit_tiny_distilled_patch16_224"}, {"reg_tokens": 2, "qk_norm": True}])
def test_a_saved_model_is_the_model(tmp_path, kind, dtype, train_matrices):
    model = compressed_vit(train_matrices, size_bias=True, **kind).to(dtype)
    with torch.no_grad():
        for parameter in model.stages.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_pretrained(model, tmp_path / "model")
    loaded = load_pretrained(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == FILES
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    assert type(loaded) is type(model)
    assert loaded.plan == model.plan
    assert (loaded.train_matrices, loaded.size_bias, loaded.training) == (train_matrices, True, False)
    images = images_for(model)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


def test_a_dense_model_too(tmp_path):
    model = small_vit()
    save_pretrained(model, tmp_path / "model")
    loaded = load_pretrained(tmp_path / "model")
    assert type(loaded) is VisionTransformer
    assert torch.equal(loaded(images := images_for(model)), model(images))
    # timm reads the same folder.
    again = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    assert torch.equal(again(images), model(images))


def test_uncompressed(tmp_path):
    model = small_vit()
    save_pretrained(compress(model, plan_for(model)), tmp_path)
    loaded = load_pretrained(tmp_path, uncompressed=True)
    assert type(loaded) is VisionTransformer
    assert torch.equal(loaded(images := images_for(model)), model(images))


def test_changed_heads_are_saved(tmp_path):
    model = compressed_vit()
    model.reset_classifier(3)
    save_pretrained(model, tmp_path)
    assert load_pretrained(tmp_path)(images_for(model)).shape == (3, 3)


def test_saving_again_replaces(tmp_path):
    save_pretrained(compressed_vit(), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    model = compressed_vit(depth=4)
    save_pretrained(model, tmp_path)
    assert len(load_pretrained(tmp_path).blocks) == 4
    assert {path.name for path in tmp_path.iterdir()} == FILES | {"notes.txt"}


def test_timm_makes_what_was_saved(tmp_path):
    for model in (compressed_vit(), compress(small_vit("vit_small_patch16_dinov3"), plan_for(small_vit(reg_tokens=4)))):
        save_pretrained(model, tmp_path / "model")
        made = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
        assert type(made) is type(model)
        assert made.plan == model.plan
        images = images_for(model)
        assert torch.equal(made(images), model(images))
        save_pretrained(made.uncompressed(), tmp_path / "plain")
        plain = timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True).eval()
        assert type(plain) is model.plain_class
        assert torch.equal(plain(images), model.uncompressed()(images))


def test_the_card_tells_what_the_model_is(tmp_path):
    model = compressed_vit()
    rows = {"dense": {"top1": 81.25, "gmacs": 2.0, "images_per_second": 10.0, "tokens": [36] * 5}}
    save_pretrained(model, tmp_path, results=rows)
    card = (tmp_path / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["pipeline_tag"] == "image-classification"
    assert "prune-and-merge" in head["tags"]
    stages = model.plan.stages
    kept = sum(stage.merged_patches for stage in stages) / len(stages) / 35
    assert f"{kept:.1%} kept" in card
    size = (3, 28, 20)
    assert f"| GMACs per image | {count_gmacs(model, size):.4g} |" in card
    assert f"| GMACs before compression | {count_gmacs(model.uncompressed(), size):.4g} |" in card
    assert f"| Tokens per block | {' '.join(map(str, model.plan.tokens))} |" in card
    assert "81.25%" in card
    save_pretrained(model.uncompressed(), tmp_path)
    assert "prune-and-merge" not in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("My notes.")
    save_pretrained(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "My notes."


def test_what_cannot_be_rebuilt_is_not_saved(tmp_path):
    model = small_vit()
    model.blocks[1].attn.scale = 1.0
    with pytest.raises(ValueError, match=r"blocks.1.attn.scale: 1.0 became 0.25\); pass the arg.* as model_args"):
        save_pretrained(model, tmp_path / "model")
    direct = VisionTransformer(img_size=28, patch_size=4, embed_dim=32, depth=1, num_heads=2)
    with pytest.raises(ValueError, match="no architecture name"):
        save_pretrained(direct, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_model_args_name_what_timm_did_not_record(tmp_path):
    model = small_vit()
    model._model_args = {}
    arguments = {"img_size": (28, 20), "patch_size": 4, "embed_dim": 32, "depth": 5, "num_heads": 2, "num_classes": 7}
    save_pretrained(model, tmp_path, model_args=arguments)
    assert torch.equal(load_pretrained(tmp_path)(images := images_for(model)), model(images))


def test_a_failing_save_leaves_the_old_model(tmp_path, monkeypatch):
    model = compressed_vit()
    save_pretrained(model, tmp_path / "model")

    def disk_full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pm_models.checkpoints.save_for_hf", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(compressed_vit(depth=4), tmp_path / "model")
    assert len(load_pretrained(tmp_path / "model").blocks) == 5
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_full_disk_leaves_the_old_model(tmp_path):
    """No file may grow past the limit, as where the disk is full."""
    resource = pytest.importorskip("resource")
    model = small_vit(depth=2)
    save_pretrained(model, tmp_path / "m")
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    model.head.weight.data.zero_()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["model.safetensors"]) - 1, limits[1]))
    try:
        with pytest.raises(OSError, match="the model could not be written to .*m: "):
            save_pretrained(model, tmp_path / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_missing_files(tmp_path, missing):
    save_pretrained(compressed_vit(), tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match="expected config.json and model.safetensors"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_truncated_weights(tmp_path, size):
    save_pretrained(compressed_vit(), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="model.safetensors is truncated or not a safetensors file"):
        load_pretrained(tmp_path)


LEFT_BEHIND = """
import os, sys
from pathlib import Path
from pm_models.files import unfinished

folder = Path(sys.argv[1])
with unfinished(folder / "model") as model, unfinished(folder / "plan.json") as plan:
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"half")
    plan.write_bytes(b"half of a plan")
    os._exit(1)
"""


def test_what_a_killed_process_left_is_removed(tmp_path):
    """Beside a model and a plan, half-written; and the files are as readable as any that are written."""
    assert subprocess.run([sys.executable, "-c", LEFT_BEHIND, tmp_path]).returncode == 1
    assert len(list(tmp_path.iterdir())) == 2
    model = compressed_vit()
    with unfinished(tmp_path / "model") as by_this_process:
        by_this_process.touch()
        save_pretrained(model, tmp_path / "model")
        model.plan.save(tmp_path / "plan.json")
        assert {path.name for path in tmp_path.iterdir()} == {"model", "plan.json", by_this_process.name}
    assert {path.name for path in tmp_path.iterdir()} == {"model", "plan.json"}
    assert CompressionPlan.load(tmp_path / "plan.json") == model.plan
    load_pretrained(tmp_path / "model")
    (tmp_path / "plain").touch()
    written = [tmp_path / "plan.json", *(tmp_path / "model").iterdir()]
    assert {path.stat().st_mode for path in written} == {(tmp_path / "plain").stat().st_mode}


def test_many_write_one_path(tmp_path):
    """As the processes of a run do where each saves its model: what is there is always one of theirs, whole."""
    models = [compressed_vit() for _ in range(4)]

    def save(model):
        for _ in range(6):
            save_pretrained(model, tmp_path / "model")
            model.plan.save(tmp_path / "plan.json")
            assert CompressionPlan.load(tmp_path / "plan.json") in [model.plan for model in models]

    with ThreadPoolExecutor(len(models)) as pool:
        list(pool.map(save, models))
    assert {path.name for path in tmp_path.iterdir()} == {"model", "plan.json"}
    assert len(list((tmp_path / "model").iterdir())) == 3
    load_pretrained(tmp_path / "model")


def test_a_writer_is_not_overtaken(tmp_path, monkeypatch):
    """Or one model's configuration would come to stand beside another's weights."""
    first, second = small_vit(depth=2), small_vit(depth=3)
    save_pretrained(first, tmp_path)
    between, done, replace = threading.Event(), threading.Event(), os.replace

    def slow_replace(source, target):
        replace(source, target)
        if target.name == "model.safetensors" and not between.is_set():
            between.set()
            done.wait(0.5)

    monkeypatch.setattr(os, "replace", slow_replace)
    with ThreadPoolExecutor(1) as pool:
        saving = pool.submit(save_pretrained, first, tmp_path)
        between.wait()
        save_pretrained(second, tmp_path)
        done.set()
        saving.result()
    assert len(load_pretrained(tmp_path).blocks) == 3


def test_saving_in_a_folder_that_exists_needs_no_other(tmp_path, monkeypatch):
    """Such as a mounted one, of whose parent a container may write nothing."""
    found = []
    monkeypatch.setattr(checkpoints, "model_card", lambda *_: found.extend(tmp_path.iterdir()) or "")
    (tmp_path / "model").mkdir()
    save_pretrained(compressed_vit(), tmp_path / "model")
    assert found == [tmp_path / "model"]
    assert len(list((tmp_path / "model").iterdir())) == 3


def test_weights_of_another_model(tmp_path):
    save_pretrained(compressed_vit(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"norm.weight": torch.ones(5)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="are of another model: norm.weight has shape .5,., expected .32,."):
        load_pretrained(tmp_path)
    del weights["stages.0.merge"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="(?s)Missing key.*stages.0.merge"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(architecture="no_such_model"),
        lambda config: config.pop("architecture"),
        lambda config: config["model_args"]["plan"].update(version=7),
        lambda config: config["model_args"]["plan"].update(depth=9),
        lambda config: config["model_args"].pop("plan"),
        lambda config: config["model_args"].pop("size_bias"),
        lambda config: config["model_args"].pop("shortcut"),
        lambda config: config["model_args"].update(train_matrices="all"),
        lambda config: config["model_args"].update(embed_dim="wide"),
        lambda config: config["model_args"].update(no_such_argument=1),
    ],
)
def test_foreign_configurations(tmp_path, change):
    save_pretrained(compressed_vit(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json does not describe a model that this version can build"):
        load_pretrained(tmp_path)


def authors_state(model: PMVisionTransformer) -> dict:
    """The model's weights in the layout of the authors' code."""
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("stages.")}
    for block, (merge, reconstruct) in enumerate(
        zip(model.merge_matrices(), model.reconstruct_matrices(), strict=True)
    ):
        state[f"blocks.{block}.attn.merge_matrix"] = merge.detach()
        state[f"blocks.{block}.attn.recover_matrix"] = reconstruct.detach()
        state[f"blocks.{block}.attn.token_mask"] = model.plan.token_mask(block)
        state[f"blocks.{block}.attn.bias"] = torch.zeros(len(merge))
    return {"model": state, "channels": [*model.plan.tokens, 999]}


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"name": "deit_tiny_distilled_patch16_224"},
        {"init_values": 0.1, "num_classes": 0},
        {"global_pool": "avg", "qkv_bias": False},
    ],
)
def test_authors_layout(tmp_path, kind):
    model = small_vit(**kind)
    plan = plan_for(model)
    compressed = compress(model, plan, train_matrices="dense")
    with torch.no_grad():
        for matrix in compressed.merge_matrices() + compressed.reconstruct_matrices():
            matrix.add_(0.01 * torch.randn_like(matrix))
    torch.save(authors_state(compressed), tmp_path / "model.pth")
    loaded = load_authors_checkpoint(tmp_path / "model.pth", num_heads=2, img_size=(28, 20))
    assert loaded.plan.tokens == plan.tokens
    assert [stage.segments for stage in loaded.plan.stages] == [stage.segments for stage in plan.stages]
    images = images_for(model)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), compressed(images))
    save_pretrained(loaded, tmp_path / "folder")
    assert torch.equal(load_pretrained(tmp_path / "folder")(images), loaded(images))


class _Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("channels"), "is foreign; a Prune and Merge checkpoint is"),
        (lambda content: content.update(model=[1]), "'model' must hold tensors by name"),
        (lambda content: content["model"].pop("head.bias"), "(?s)of another model: .*Missing key.*head.bias"),
        (
            lambda content: content["model"].pop("patch_embed.proj.weight"),
            "lacks the weight 'patch_embed.proj",
        ),
        (lambda content: content["model"].pop("norm.weight"), "(?s)of another model: .*Missing key.*norm.weight"),
        (
            lambda content: content["model"].pop("blocks.1.attn.token_mask"),
            "block 1: expected merge_matrix, rec",
        ),
        (lambda content: content.update(channels=[1, 2]), "block 0: expected the shapes"),
        (lambda content: content.update(channels=content["channels"][:2]), "block 2: 'channels' has 2 entries"),
        (
            lambda content: content["model"].update({"blocks.0.attn.merge_matrix": torch.ones(3, 4)}),
            "block 0: expected the shapes",
        ),
        (
            lambda content: [content["model"].pop(f"blocks.{block}.attn.merge_matrix") for block in range(5)],
            "has no merge matrices",
        ),
    ],
)
def test_foreign_authors_files(tmp_path, change, message):
    content = authors_state(compressed_vit(train_matrices="dense"))
    change(content)
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=message):
        load_authors_checkpoint(tmp_path / "model.pth", num_heads=2, img_size=(28, 20))


@pytest.mark.parametrize("load", [load_authors_checkpoint, load_state_file])
def test_broken_and_hostile_pickles(tmp_path, monkeypatch, load):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pth"
    with pytest.raises(FileNotFoundError, match="no checkpoint file at"):
        load(path)
    torch.save(authors_state(compressed_vit(train_matrices="dense")), path)
    whole = path.read_bytes()
    for broken in (b"", whole[:100], whole[:-50], b"not a checkpoint", pickle.dumps(_Harmful())):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"model.pth (is truncated|holds no weights)"):
            load(path)
    assert not (tmp_path / "harmed").exists()


def test_state_files(tmp_path):
    weights = {name: value.clone() for name, value in small_vit().state_dict().items()}
    save_file(weights, tmp_path / "a.safetensors")
    torch.save(weights, tmp_path / "b.pth")
    torch.save({"model": {f"module.{name}": value for name, value in weights.items()}, "epoch": 3}, tmp_path / "c.pth")
    for path in tmp_path.iterdir():
        loaded = load_state_file(path)
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    torch.save({"epoch": 3}, tmp_path / "d.pth")
    with pytest.raises(ValueError, match="d.pth holds no weights"):
        load_state_file(tmp_path / "d.pth")


def test_plan_of_a_saved_model_is_plain_json(tmp_path):
    model = compressed_vit()
    save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert CompressionPlan.from_dict(config["model_args"]["plan"]) == model.plan
