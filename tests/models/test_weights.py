"""``--checkpoint`` and ``--model``: files as timm, DeiT, Lightning and others write them, and names that timm finds."""

import argparse
import os
import re
from pathlib import PosixPath

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.utils import CheckpointSaver, ModelEmaV3

from pm_models import load_pretrained, save_pretrained
from pm_models.checkpoints import load_state_file
from pm_models.cli import main

NAME = "vit_tiny_patch16_224"
SHAPE = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
OPTIONS = [
    "--img-size", "32", "-j", "0", "-b", "3", "--device", "cpu",
    "--model-kwargs", *(f"{name}={value}" for name, value in SHAPE.items()),
]  # fmt: skip


def make(name=NAME, **arguments):
    torch.manual_seed(0)
    model = timm.create_model(name, **{"img_size": 32, "num_classes": 3, **SHAPE, **arguments})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three classes of noise, three images each."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("a", "b", "c"):
            (root / split / name).mkdir(parents=True)
            for index in range(3):
                pixels = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture
def evaluate(capsys, data):
    """Accuracy and loss of the model that options name, or its error."""

    def run(*options, model=NAME, command="eval"):
        status = main([command, str(data), "--model", str(model), *OPTIONS, *(str(option) for option in options)])
        captured = capsys.readouterr()
        assert status in (0, 2), captured.err
        if status:
            assert captured.err.startswith(f"pm-vit {command}: error: ")
            assert len(captured.err.splitlines()) == 1
            assert "\x1b" not in captured.err
            assert len(captured.err) < 1000
            return captured.err
        return captured.out.split(";")[0] + "".join(re.findall("pm-vit: warning: .*", captured.err))

    return run


@pytest.fixture
def expected(evaluate, tmp_path):
    save_file(make().state_dict(), tmp_path / "expected.safetensors")
    found = evaluate("--checkpoint", tmp_path / "expected.safetensors")
    assert re.fullmatch(r"top-1 [\d.]+%, top-5 [\d.]+%, loss [\d.]+ on 9 images", found), found
    return found


def named(weights, prefix):
    return {f"{prefix}{name}": value for name, value in weights.items()}


def zeros(weights):
    return {name: torch.zeros_like(value) for name, value in weights.items()}


ARGUMENTS = argparse.Namespace(
    model=NAME, lr=0.1, output=PosixPath("out"), mean=np.float64(0.5), device=torch.device(0)
)
FILES = {
    "timm's train.py": lambda w: {
        "epoch": 3, "arch": NAME, "state_dict": w, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}},
        "version": 2, "args": ARGUMENTS, "metric": np.float64(71.5), "amp_scaler": {"scale": 1.0},
        "saver": {"checkpoint_files": [("checkpoint-3.pth.tar", np.float32(71.5))], "pending": (3, 1.0)},
    },
    "timm's train.py with an average": lambda w: {"state_dict": zeros(w), "state_dict_ema": w, "args": ARGUMENTS},
    "an average that is off": lambda w: {"state_dict": w, "state_dict_ema": {}, "model_ema": None},
    "DeiT": lambda w: {"model": w, "optimizer": {}, "epoch": 3, "args": ARGUMENTS, "scaler": {}},
    "MAE": lambda w: {"model": w, "args": ARGUMENTS, "history": np.arange(6.0).reshape(2, 3)},
    "Lightning": lambda w: {
        "epoch": 3, "pytorch-lightning_version": "2.5", "state_dict": named(w, "model."),
        "hyper_parameters": {"args": ARGUMENTS}, "callbacks": {"best": {"best_model_score": np.float64(0.7)}},
    },
    "Lightning with a loss": lambda w: {"state_dict": named(w, "model.") | {"loss.weight": torch.ones(3)}},
    "Lightning's backbone": lambda w: {"state_dict": named(w, "net.backbone.") | {"loss.weight": torch.ones(3)}},
    "DDP": lambda w: {"model_state_dict": named(w, "module.")},
    "compiled": lambda w: named(w, "_orig_mod."),
    "compiled, then DDP": lambda w: {"state_dict": named(w, "module._orig_mod.")},
    "DDP, then compiled, in Lightning": lambda w: {"state_dict": named(w, "_orig_mod.module.model._orig_mod.")},
    "compiled blocks": lambda w: {re.sub(r"^(blocks\.\d+\.)", r"\1_orig_mod.", name): w[name] for name in w},
    "torch's AveragedModel": lambda w: {"model_ema": named(w, "module.") | {"n_averaged": torch.tensor(5)}},
    "DeepSpeed": lambda w: {"module": w, "ds_version": "0.15"},
    "teacher and student": lambda w: {
        "student": named(zeros(w), "module.backbone."),
        "teacher": named(w, "backbone.") | {"dino_head.weight": torch.ones(3)},
    },
    "float16": lambda w: {name: value.half().float().half() for name, value in w.items()},
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".pth.tar", ".ckpt"])
@pytest.mark.parametrize("kind", FILES)
def test_files_of_training_scripts(evaluate, expected, tmp_path, kind, suffix):
    path = tmp_path / f"file{suffix}"
    torch.save(FILES[kind](make().state_dict()), path)
    found = evaluate("--checkpoint", path)
    if kind == "float16":
        numbers = [float(re.search(r"loss ([\d.]+)", text)[1]) for text in (found, expected)]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.01)
    else:
        assert found == expected


def test_what_timm_saves(evaluate, expected, tmp_path):
    """By its own saver, with the arguments of a run and a metric of numpy's."""
    model = make()
    optimizer = torch.optim.AdamW(model.parameters())
    saver = CheckpointSaver(model, optimizer, args=ARGUMENTS, model_ema=ModelEmaV3(model), checkpoint_dir=tmp_path)
    saver.save_checkpoint(0, metric=np.float64(71.5))
    assert [evaluate("--checkpoint", tmp_path / f"{name}.pth.tar") for name in ("last", "model_best")] == [expected] * 2


def test_other_containers(evaluate, expected, tmp_path):
    weights = make().state_dict()
    save_file(weights, tmp_path / "meta.safetensors", metadata={"format": "pt", "epoch": "3"})
    save_file(named(weights, "module."), tmp_path / "really-safetensors.bin")
    save_file(weights, tmp_path / "model-00001-of-00001.safetensors")
    torch.save({"state_dict": weights, "args": ARGUMENTS}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    names = ("meta.safetensors", "really-safetensors.bin", "model-00001-of-00001.safetensors", "old.pt")
    assert [evaluate("--checkpoint", tmp_path / name) for name in names] == [expected] * len(names)


def test_prefixes_go_only_where_all_names_have_them(tmp_path):
    weights = {"model.weight": torch.ones(2), "module.bias": torch.ones(2), "model.module.model.x": torch.ones(1)}
    torch.save(weights, tmp_path / "w.pth")
    assert load_state_file(tmp_path / "w.pth").keys() == weights.keys()
    torch.save({"_orig_mod.a": torch.ones(1), "a": torch.zeros(1)}, tmp_path / "twice.pth")
    assert load_state_file(tmp_path / "twice.pth").keys() == {"_orig_mod.a", "a"}


class Code:
    """A pickle that makes a folder when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["args", "state_dict", "in args"])
def test_code_beside_the_weights_is_not_run(evaluate, tmp_path, place, zipped):
    content = {"state_dict": make().state_dict(), "args": ARGUMENTS}
    code = Code(tmp_path / "ran")
    content |= {"args": argparse.Namespace(code=code)} if place == "in args" else {place: code}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    found = evaluate("--checkpoint", tmp_path / "w.pth")
    assert (
        "w.pth is truncated or not a checkpoint that loads without running code: it holds posix.mkdir; save the"
        in found
    )
    assert not (tmp_path / "ran").exists()


REFUSED = {
    "a whole model": (
        lambda path: torch.save(make(), path / "x.pth"),
        r"it holds timm\.layers\.\w+\.\w+, .*; save the w",
    ),
    "TorchScript": (lambda path: _save_script(path / "x.pt"), r"with TorchScript archives passed to ``torch.load``\.$"),
    "text": (lambda path: (path / "x.pth").write_text("no weights"), "does not begin as a file of torch.save does"),
    "empty": (lambda path: (path / "x.pth").touch(), "does not begin as a file of torch.save does"),
    "cut": (lambda path: _save_cut(path / "x.pth"), "without running code: its end is missing"),
    "a piece": (
        lambda path: save_file({"a": torch.ones(1)}, path / "model-00001-of-00002.safetensors"),
        "several files",
    ),
    "an index": (lambda path: (path / "model.safetensors.index.json").write_text("{}"), "several files"),
    "JAX": (lambda path: (path / "x.msgpack").touch(), "x.msgpack has an unsupported format"),
    "no weights": (lambda path: torch.save({"epoch": 3}, path / "x.pth"), "x.pth holds no weights"),
    "other keys": (lambda path: torch.save({3: torch.ones(1)}, path / "x.pth"), "x.pth holds no weights"),
    "itself": (lambda path: _save_itself(path / "x.pth"), "x.pth holds no weights"),
    "a folder": (lambda path: (path / "x.pth").mkdir(), "x.pth is a folder, expected a file of weights"),
}


def _save_script(path):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(path)


def _save_cut(path):
    torch.save(make().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])


def _save_itself(path):
    content = {}
    content["model"] = content
    torch.save(content, path)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_files_that_are_refused(evaluate, tmp_path, kind):
    write, message = REFUSED[kind]
    write(tmp_path)
    (path,) = tmp_path.iterdir()
    assert re.search(message, evaluate("--checkpoint", path).strip())


OTHER_MODELS = {
    "deeper": ({"depth": 9}, r"not hold the weights of vit_tiny_patch16_224: Unexpected keys \(84\): blocks\.2\.norm1"),
    "wider": ({"embed_dim": 64}, r": Other shapes \(31\): cls_token \(1, 1, 64\) instead of \(1, 1, 32\), pos_embed "),
    "no class token": (
        {"class_token": False, "global_pool": "avg"},
        "it has no class token, and the model has one; --model-kwargs class_token=False global_pool=avg makes",
    ),
    "distilled": (
        {"name": "deit_tiny_distilled_patch16_224"},
        r"Unexpected keys \(3\): dist_token \(1, 1, 32\).* \(1, 18, 32\) instead of \(1, 17, 32\)",
    ),
    "distilled, of another grid": (
        {"name": "deit_tiny_distilled_patch16_224", "img_size": 64},
        "it has a distillation token, and the model has none",
    ),
    "other classes": ({"num_classes": 5}, "has a head for 5 classes, and the model is for 3: give --num-classes 5, or"),
    "no head": ({"num_classes": 0}, "has no head, and the model is for 3: train a new one first, with pm-vit train"),
    "no square": ({"img_size": (32, 64)}, r"its pos_embed \(1, 33, 32\) cannot be resized to \(1, 17, 32\)"),
}


@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_weights_of_another_model(evaluate, tmp_path, kind):
    """In one line, whatever the command that does not train a new head."""
    arguments, message = OTHER_MODELS[kind]
    torch.save(make(**arguments).state_dict(), tmp_path / "other.pth")
    assert re.search(message, evaluate("--checkpoint", tmp_path / "other.pth"))
    compression = ("--keep-rate", "0.5", "--prune-rate", "0.1", "--output", tmp_path / "out")
    assert re.search(message, evaluate("--checkpoint", tmp_path / "other.pth", *compression, command="compress"))
    assert not (tmp_path / "out").exists()


TRAIN = ["--epochs", "1", "--warmup-epochs", "0", "--lr", "1e-12", "--weight-decay", "0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1000}, "has a head for 1000 classes, and the model is for 3: the head starts anew"),
        ({"num_classes": 0}, "has no head, and the model is for 3: the head starts anew"),
        ({"name": "deit_tiny_distilled_patch16_224", "num_classes": 0}, "Unexpected keys (1): dist_token"),
        ({}, None),
    ],
)
def test_training_starts_a_new_head(evaluate, tmp_path, arguments, message):
    model = make(**arguments)
    torch.save({"state_dict": model.state_dict(), "args": ARGUMENTS}, tmp_path / "imagenet.pth")
    output = ["--output", tmp_path / "out", *TRAIN]
    found = evaluate("--checkpoint", tmp_path / "imagenet.pth", *output, command="train")
    assert (message or "") in found
    if "error" in found:
        return
    assert ("starts anew" in found) == (message is not None)
    trained = load_pretrained(tmp_path / "out").state_dict()
    weights = model.state_dict()
    assert trained["head.weight"].shape == (3, 32)
    for name, value in weights.items():
        if message is None or not name.startswith("head."):
            torch.testing.assert_close(trained[name], value, rtol=1e-6, atol=1e-6)


def test_a_pretrained_model_becomes_one_that_averages(evaluate, tmp_path):
    """MAE's weights have a norm of the tokens, and the model that is trained has one of their mean."""
    weights = make(num_classes=0).state_dict()
    torch.save({"model": weights}, tmp_path / "mae.pth")
    options = ["--checkpoint", tmp_path / "mae.pth", "--output", tmp_path / "out", *TRAIN, "--model-kwargs"]
    shape = [f"{name}={value}" for name, value in (SHAPE | {"global_pool": "avg"}).items()]
    assert "the head starts anew" in evaluate(*options, *shape, command="train")
    torch.testing.assert_close(load_pretrained(tmp_path / "out").fc_norm.weight, weights["norm.weight"])
    assert "Missing keys (4): fc_norm.weight (32,), fc_norm.bias (32,), head.weight (3, 32), ...;" in evaluate(
        "--checkpoint", tmp_path / "mae.pth", "--model-kwargs", *shape
    )


@pytest.mark.parametrize(
    ("name", "arguments"), [(NAME, {}), ("vit_small_patch16_rope_ape_224", {"use_abs_pos_emb": True})]
)
def test_positions_are_resized_as_timm_does(evaluate, tmp_path, name, arguments):
    model = make(name, img_size=64, **arguments)
    torch.save({"state_dict": named(model.state_dict(), "module.")}, tmp_path / "large.pth")
    found = evaluate("--checkpoint", tmp_path / "large.pth", model=name)
    small = make(name)
    from timm.models import eva, vision_transformer

    filtered = (vision_transformer if name == NAME else eva).checkpoint_filter_fn(model.state_dict(), small)
    torch.save(filtered, tmp_path / "small.pth")
    assert found == evaluate("--checkpoint", tmp_path / "small.pth", model=name)
    assert "loss" in found


def test_grey_images(evaluate, tmp_path):
    """The colours of the first layer are added up, as timm does with pretrained weights."""
    weights = make().state_dict()
    torch.save(weights, tmp_path / "colour.pth")
    weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.save(weights, tmp_path / "grey.pth")
    found = [evaluate("--checkpoint", tmp_path / name, "--in-chans", "1") for name in ("colour.pth", "grey.pth")]
    assert "loss" in found[0]
    assert found[0] == found[1]


def test_original_jax_weights(evaluate, expected, tmp_path):
    """Written out in the layout that timm reads."""
    model = make()
    heads, width = SHAPE["num_heads"], SHAPE["embed_dim"]
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    arrays = {
        "cls": weights["cls_token"],
        "Transformer/posembed_input/pos_embedding": weights["pos_embed"],
        "embedding/kernel": weights["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": weights["patch_embed.proj.bias"],
        "Transformer/encoder_norm/scale": weights["norm.weight"],
        "Transformer/encoder_norm/bias": weights["norm.bias"],
        "head/kernel": weights["head.weight"].T,
        "head/bias": weights["head.bias"],
    }
    for block in range(SHAPE["depth"]):
        here, there = f"blocks.{block}", f"Transformer/encoderblock_{block}"
        attention = f"{there}/MultiHeadDotProductAttention_1"
        for index, part in enumerate(("query", "key", "value")):
            rows = slice(index * width, (index + 1) * width)
            kernel = weights[f"{here}.attn.qkv.weight"][rows].T
            arrays[f"{attention}/{part}/kernel"] = kernel.reshape(width, heads, -1)
            arrays[f"{attention}/{part}/bias"] = weights[f"{here}.attn.qkv.bias"][rows].reshape(heads, -1)
        arrays[f"{attention}/out/kernel"] = weights[f"{here}.attn.proj.weight"].T.reshape(heads, -1, width)
        arrays[f"{attention}/out/bias"] = weights[f"{here}.attn.proj.bias"]
        for index, norm in ((0, "norm1"), (2, "norm2")):
            arrays[f"{there}/LayerNorm_{index}/scale"] = weights[f"{here}.{norm}.weight"]
            arrays[f"{there}/LayerNorm_{index}/bias"] = weights[f"{here}.{norm}.bias"]
        for index in (0, 1):
            arrays[f"{there}/MlpBlock_3/Dense_{index}/kernel"] = weights[f"{here}.mlp.fc{index + 1}.weight"].T
            arrays[f"{there}/MlpBlock_3/Dense_{index}/bias"] = weights[f"{here}.mlp.fc{index + 1}.bias"]
    np.savez(tmp_path / "w.npz", **arrays)
    assert evaluate("--checkpoint", tmp_path / "w.npz") == expected
    assert "has a head for 3 classes, and the model is for 5" in evaluate(
        "--checkpoint", tmp_path / "w.npz", "--num-classes", "5"
    )
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    assert "other.npz is not a checkpoint in JAX's layout" in evaluate("--checkpoint", tmp_path / "other.npz")


def test_names_of_folders_that_timm_reads(evaluate, expected, tmp_path, data, capsys):
    model = make()
    save_pretrained(model, tmp_path / "saved", model_args={"img_size": 32, **SHAPE})
    folder = f"local-dir:{tmp_path / 'saved'}"
    assert evaluate("--pretrained", model=folder) == expected
    assert "has random weights" in evaluate(model=folder)
    told = f"error: the pretrained {folder} has a head for 3 classes, and the model is for 5: give --num-classes 3, or"
    assert told in evaluate("--pretrained", "--num-classes", "5", model=folder)
    found = evaluate(
        "--output", tmp_path / "out", *TRAIN, "--pretrained", "--num-classes", "5", model=folder, command="train"
    )
    assert "has a head for 3 classes, and the model is for 5: the head starts anew" in found
    assert load_pretrained(tmp_path / "out").num_classes == 5
    compression = ["--keep-rate", "0.5", "--prune-rate", "0.1", "--output", tmp_path / "compressed"]
    evaluate("--pretrained", *compression, model=folder, command="compress")
    compressed = load_pretrained(tmp_path / "compressed")
    assert torch.equal(compressed.head.weight, model.head.weight)
    assert compressed.plan.tokens[0] < 17
    assert "local-dir:nowhere cannot be made: Config file not found: nowhere/config.json" in evaluate(
        model="local-dir:nowhere"
    )
    assert main(["bench", "local-dir:nowhere"]) == 2
    assert "MODEL local-dir:nowhere cannot be made: Config file not found" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["hf-hub:someone/no-such-model", "hf_hub:someone/no-such-model"])
def test_names_of_the_hub_are_timms_to_find(evaluate, monkeypatch, name):
    asked = []

    def download(model_id, *_, **__):
        asked.append(model_id)
        raise ConnectionError(f"\x1b[31mno route to the hub\x1b[0m\nfor {model_id}\n" + "frame\n" * 100)

    monkeypatch.setattr("timm.models._factory.load_model_config_from_hf", download)
    assert f"--model {name} cannot be made: no route to the hub" in evaluate(model=name)
    assert asked == ["someone/no-such-model"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "someone/no-such-model",
            "is neither a saved folder nor a timm model; did you mean hf-hub:someone/no-such-model?",
        ),
        ("http://x.org/model", "--model http://x.org/model is neither a saved folder nor a timm model"),
    ],
)
def test_names_that_nobody_finds(evaluate, name, message):
    assert message in evaluate(model=name)


def test_arguments_that_a_model_does_not_take(evaluate):
    assert "cannot be made: VisionTransformer.__init__() got an unexpected keyword argument 'dept'" in evaluate(
        "--model-kwargs", "dept=3"
    )
    assert "cannot be made: " in evaluate("--model-kwargs", "embed_dim=32", "num_heads=5")


def test_a_random_decoder_is_told(data, tmp_path, capsys):
    for kind in ("images", "labels"):
        for split in ("train", "validation"):
            (tmp_path / kind / split).mkdir(parents=True)
            Image.new("RGB" if kind == "images" else "L", (32, 32)).save(tmp_path / kind / split / "0.png")
    torch.save({"model": named(make(num_classes=0).state_dict(), "encoder.")}, tmp_path / "w.pth")
    arguments = ["eval", tmp_path, "--task", "segmentation", "--model", NAME, "--num-classes", "2", *OPTIONS]
    assert main([str(argument) for argument in [*arguments, "--checkpoint", tmp_path / "w.pth"]]) == 0
    assert "the decoder on vit_tiny_patch16_224 has random weights" in capsys.readouterr().err
