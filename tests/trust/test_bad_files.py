"""Files that are broken, foreign or hostile: each loads as it says, or is refused by ValueError; no code is run."""

import json
import os
import pickle
import shutil
import struct

import numpy as np
import pytest
import torch
from helpers import images_for, plan_for, published_segmenter, small_vit
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pm_models import CompressionPlan, compress, load_authors_checkpoint, load_pretrained, load_segmenter_checkpoint
from pm_models.checkpoints import load_state_file, save_pretrained
from pm_models.data import open_dataset
from pm_models.segmentation import SegmentationImages

pytestmark = pytest.mark.fuzz


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One of every file that is read."""
    root = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    dense = small_vit(depth=2)
    model = compress(dense, plan_for(dense), train_matrices="dense")
    save_pretrained(model, root / "model")
    model.plan.save(root / "plan.json")
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("stages.")}
    for block, matrices in enumerate(model.stages.values()):
        state[f"blocks.{block}.attn.merge_matrix"] = matrices.merge.detach()
        state[f"blocks.{block}.attn.recover_matrix"] = matrices.reconstruct.detach()
        state[f"blocks.{block}.attn.token_mask"] = model.plan.token_mask(block)
    torch.save({"model": state, "channels": list(model.plan.tokens)}, root / "authors.pth")
    published_segmenter(root / "segmenter")
    return root


class Touch:
    """A pickle that runs code when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def mutated(content: bytes, kind: str, random: np.random.Generator) -> bytes:
    at = int(random.integers(0, max(len(content), 1)))
    if kind == "truncated":
        return content[:at]
    if kind == "empty":
        return b""
    if kind == "noise":
        return random.bytes(int(random.integers(1, 4096)))
    if kind == "inserted":
        return content[:at] + random.bytes(8) + content[at:]
    if kind == "a long header":  # of safetensors: a length that is not there
        return struct.pack("<Q", 2**62) + content[8:]
    flipped = bytearray(content)
    # Where a file says what it holds comes first, so flips there tell more.
    end = len(content) if kind == "flipped" else min(len(content), 512)
    for place in random.integers(0, max(end, 1), 3):
        flipped[place] ^= 1 << int(random.integers(0, 8))
    return bytes(flipped)


def refusal(load):
    """What the refusal of a file says; ``None`` where it loads."""
    try:
        load()
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return None


KINDS = ("truncated", "empty", "noise", "inserted", "a long header", "flipped", "flipped in front")


def load_model(root):
    model = load_pretrained(root / "model")
    return model(images_for(model))


LOADERS = {
    "model/model.safetensors": load_model,
    "model/config.json": load_model,
    "plan.json": lambda root: repr(CompressionPlan.load(root / "plan.json")),
    "authors.pth": lambda root: load_authors_checkpoint(root / "authors.pth", num_heads=2, img_size=(28, 20)),
    "segmenter/checkpoint.pth": lambda root: load_segmenter_checkpoint(root / "segmenter"),
    "segmenter/variant.yml": lambda root: load_segmenter_checkpoint(root / "segmenter"),
}


@pytest.fixture(scope="module")
def spoiled(files, tmp_path_factory):
    copy = tmp_path_factory.mktemp("spoiled") / "files"
    shutil.copytree(files, copy)
    return copy


@given(st.sampled_from(sorted(LOADERS)), st.sampled_from(KINDS), st.integers(0, 2**31))
def test_a_spoiled_file_loads_or_is_refused(files, spoiled, name, kind, seed):
    content = (files / name).read_bytes()
    (spoiled / name).write_bytes(mutated(content, kind, np.random.default_rng(seed)))
    assert refusal(lambda: LOADERS[name](spoiled)) != ""
    (spoiled / name).write_bytes(content)


VALUES = [
    None, True, -1, 0, 1, 7, 2**31, 10**30, 0.5, float("nan"), float("inf"), "", "x", "../../etc", [], [1], [[]], {},
    {"a": 1}, [[[[[[]]]]]],
]  # fmt: skip


def places(value, path=()):
    """The path of every value in nested dicts and lists."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def changed(value, path, change):
    """A copy with another value at a path, or without it."""
    if not path:
        return change(value)
    value = value.copy()
    if len(path) == 1 and change is None:
        del value[path[0]]
    else:
        value[path[0]] = changed(value[path[0]], path[1:], change)
    return value


@given(st.sampled_from(["model/config.json", "plan.json"]), st.data())
def test_a_changed_field_loads_or_is_refused(files, spoiled, name, data):
    content = (files / name).read_text()
    values = json.loads(content)
    everywhere = [path for path in places(values) if path]
    short = [path for path in everywhere if len(path) < 5] or everywhere  # not only weights of patches
    path = data.draw(st.sampled_from(short) | st.sampled_from(everywhere))
    replacement = data.draw(st.sampled_from(VALUES))
    change = data.draw(st.sampled_from([None, lambda _: replacement, lambda value: [value, value]]))
    (spoiled / name).write_text(json.dumps(changed(values, path, change)))
    assert refusal(lambda: LOADERS[name](spoiled)) != ""
    (spoiled / name).write_text(content)


@pytest.mark.parametrize("name", ["model/config.json", "plan.json"])
@pytest.mark.parametrize("bomb", ["[" * 100_000, '{"a":' * 100_000, "[" + "9" * 1_000_000 + "]"])
def test_json_bombs(files, spoiled, name, bomb):
    (spoiled / name).write_text(bomb)
    with pytest.raises(ValueError, match=name.split("/")[-1]):
        LOADERS[name](spoiled)
    shutil.copy(files / name, spoiled / name)


@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {"model": {"x": evil}, "channels": []}])
@pytest.mark.parametrize("load", [load_authors_checkpoint, load_state_file, load_segmenter_checkpoint])
def test_code_in_a_file_is_not_run(tmp_path, load, wrap):
    for protocol in (2, 4, "torch"):
        path, proof = tmp_path / f"{protocol}.pth", tmp_path / f"ran{protocol}"
        if protocol == "torch":
            torch.save(wrap(Touch(proof)), path)
        else:
            path.write_bytes(pickle.dumps(wrap(Touch(proof)), protocol))
        (tmp_path / "variant.yml").write_text(f"!!python/object/apply:os.mkdir ['{proof}']")
        with pytest.raises(ValueError, match=r"\.pth|variant"):
            load(path)
        assert not proof.exists()


def test_a_configuration_takes_no_memory_that_the_weights_do_not(files, spoiled):
    for name, value in (("embed_dim", 2**20), ("depth", 10**9), ("num_classes", 2**40), ("mlp_ratio", 1e12)):
        config = json.loads((files / "model/config.json").read_text())
        config["model_args"][name] = value
        (spoiled / "model/config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="another model|does not describe a model|describes a model of depth"):
            load_model(spoiled)
    shutil.copy(files / "model/config.json", spoiled / "model/config.json")


MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16")


@pytest.mark.parametrize("mode", MODES)
def test_images_of_every_mode_are_read(tmp_path, mode):
    suffix = {"CMYK": "jpg", "YCbCr": "jpg"}.get(mode, "png")
    folder = tmp_path / "train" / "cat"
    folder.mkdir(parents=True)
    Image.new(mode, (9, 7)).save(folder / f"0.{suffix}")
    for channels, shape in ((3, (7, 9, 3)), (1, (7, 9))):
        dataset = open_dataset(tmp_path, "train", in_chans=channels)
        assert np.asarray(dataset[0][0]).shape == shape


@given(st.sampled_from(KINDS), st.sampled_from(["png", "jpg"]), st.integers(0, 2**31))
def test_a_broken_image_is_read_or_named(tmp_path_factory, kind, suffix, seed):
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(seed)
    pixels = Image.fromarray(random.integers(0, 255, (12, 16, 3), dtype=np.uint8))
    places_ = [root / "train" / "cat" / f"0.{suffix}", root / "images" / "train" / f"0.{suffix}"]
    labels = root / "labels" / "train" / "0.png"
    for path in (*places_, labels):
        path.parent.mkdir(parents=True)
    Image.new("L", pixels.size).save(labels)
    for path in places_:
        pixels.save(path)
        path.write_bytes(mutated(path.read_bytes(), kind, random))
    datasets = [open_dataset(root, "train"), SegmentationImages(root, "train", num_classes=3)]
    for dataset in datasets:
        message = refusal(lambda dataset=dataset: dataset[0])
        assert message is None or str(root) in message
    shutil.rmtree(root)
