"""Models written to files, loaded again, and run on batches that they were not made with."""

import copy
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from helpers import images_for, plan_for, small_vit

from pm_models import Segmenter, compress, export_model, load_pretrained, save_pretrained
from pm_models.cli import main


def disturbed(model):
    """With matrices that are not the plan's any more."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.stages.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return model.eval()


def compressed(
    name="vit_tiny_patch16_224", train_matrices="support", merge_site="block", size_bias=True, depth=3, **arguments
):
    model = small_vit(name, depth=depth, **arguments)
    return disturbed(
        compress(model, plan_for(model), train_matrices=train_matrices, merge_site=merge_site, size_bias=size_bias)
    )


def check_is_as_readable_as_others(path):
    plain = path.with_name("plain")
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
    plain.unlink()


@pytest.mark.parametrize(
    "make",
    [
        lambda: compressed(global_pool="avg", depth=2),
        lambda: compressed("deit_tiny_distilled_patch16_224", train_matrices="dense", depth=2),
        lambda: compressed(merge_site="attention", depth=2),
        lambda: Segmenter(compressed(num_classes=0, depth=2), 5).eval(),
    ],
    ids=["support", "dense", "in attention", "segmenter"],
)
def test_onnx(make, tmp_path):
    """By onnxruntime itself, on one image and on five."""
    model = make()
    encoder = getattr(model, "encoder", model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exported = export_model(model, tmp_path / "m.onnx", "onnx")
    assert exported.path == tmp_path / "m.onnx"
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    check_is_as_readable_as_others(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, made.name, given.shape[1:]) == ("images", "logits", [3, 28, 20])
    for batch in (1, 5):
        images = images_for(encoder, batch)
        with torch.no_grad():
            expected = model(images).numpy()
        (found,) = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert exported.max_error < 1e-4
    torch.testing.assert_close(exported.run(images), torch.from_numpy(found))


OF_EVERY_KIND = {
    "uncompressed": lambda: small_vit(depth=1),
    "support": lambda: compressed(global_pool="avg", depth=2),
    "dense": lambda: compressed("deit_tiny_distilled_patch16_224", train_matrices="dense", depth=1),
    "rotary": lambda: compressed("eva02_tiny_patch14_224", depth=1),
    "segmenter": lambda: Segmenter(compressed(num_classes=0, depth=1), 5).eval(),
    "segmenter-linear": lambda: Segmenter(small_vit(num_classes=0, depth=1), 5, decoder="linear").eval(),
}


@pytest.mark.parametrize("kind", OF_EVERY_KIND)
def test_an_older_opset(kind, tmp_path):
    """Means, norms, splits and resizing are other operators in 17 than in 18, from which on PyTorch exports."""
    model = OF_EVERY_KIND[kind]()
    exported = export_model(model, tmp_path / "m.onnx", "onnx", opset=17)
    content = onnx.load(exported.path)
    assert [(opset.domain, opset.version) for opset in content.opset_import] == [("", 17)]
    assert content.ir_version == 8  # what runtimes of opset 17 read
    onnx.checker.check_model(content, full_check=True)
    session = onnxruntime.InferenceSession(str(exported.path), providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        images = images_for(getattr(model, "encoder", model), batch)
        with torch.no_grad():
            expected = model(images).numpy()
        np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], expected, rtol=1e-4, atol=1e-4)


def test_other_opsets(tmp_path):
    model = compressed(depth=1)
    for opset, version in ((18, 18), (21, 21)):
        exported = export_model(model, tmp_path / "m.onnx", "onnx", opset=opset)
        assert [imported.version for imported in onnx.load(exported.path).opset_import] == [version]
        assert exported.max_error < 1e-4


def test_what_an_older_opset_lacks_is_told(tmp_path):
    class Antialiased(torch.nn.Module):
        def forward(self, x):
            smaller = torch.nn.functional.interpolate(x, (12, 10), mode="bilinear", antialias=True)
            return torch.nn.functional.interpolate(smaller, (28, 20))

    model = small_vit(depth=1)
    model.patch_embed = torch.nn.Sequential(Antialiased(), model.patch_embed)
    model.patch_embed.grid_size, model.patch_embed.img_size = (7, 5), (28, 20)
    with pytest.raises(ValueError, match="^opset 17 has no Resize as this model needs it: antialias$"):
        export_model(model, tmp_path / "m.onnx", "onnx", opset=17)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_logits_that_are_all_zero(format, tmp_path):
    """A fresh head gives them."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=28, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5
    )
    torch.nn.init.zeros_(model.head.weight)
    model = compress(model, plan_for(model))
    exported = export_model(model, tmp_path / "m", format)
    assert exported.max_error == 0
    assert not exported.run(images_for(model, 4)).any()


def test_logits_that_are_infinite(tmp_path):
    """A class that is never to be chosen."""
    model = compressed(depth=1)
    with torch.no_grad():
        model.head.bias[2] = -torch.inf
    exported = export_model(model, tmp_path / "m.onnx", "onnx")
    assert exported.max_error < 1e-4
    assert (exported.run(images_for(model, 4))[:, 2] == -torch.inf).all()


@pytest.mark.parametrize("format", ["onnx", "pt2", "aoti"])
def test_logits_that_are_not_a_number_are_the_models(format, tmp_path):
    model = compressed(depth=1)
    with torch.no_grad():
        model.head.bias[2] = torch.nan
    with pytest.raises(ValueError, match="^model gives NaN on random images, .*; nothing is written$"):
        export_model(model, tmp_path / "m", format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("batch", ["fixed", "any"])
@pytest.mark.parametrize("kind", ["support", "segmenter"])
def test_a_frozen_model_is_exported_as_any_other(kind, batch, tmp_path):
    """By PyTorch's own function, gradients on: matrix products mix the tokens, and onnxruntime runs them."""
    model = copy.deepcopy(OF_EVERY_KIND[kind]())
    encoder = getattr(model, "encoder", model)
    if not hasattr(encoder, "freeze"):
        pytest.skip("models cannot be frozen yet")
    encoder.freeze()
    images = images_for(encoder, 3)
    shapes = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)} if batch == "any" else {}
    torch.onnx.export(model, (images,), tmp_path / "m.onnx", dynamo=True, verbose=False, **shapes)
    operators = {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}
    assert not {name for name in operators if name.startswith(("Scatter", "Sequence", "Loop", "If", "Scan"))}
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    if batch == "any":
        images = images_for(encoder, 5)
    with torch.no_grad():
        expected = model(images).numpy()
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_half_precision_becomes_float32_in_onnx(tmp_path):
    model = compressed().bfloat16()
    exported = export_model(model, tmp_path / "m.onnx", "onnx")
    images = images_for(small_vit(), 3)
    with torch.no_grad():
        torch.testing.assert_close(exported.run(images), model.float()(images), rtol=1e-4, atol=1e-4)


def test_pt2(tmp_path):
    model = compressed()
    export_model(model, tmp_path / "m.pt2", "pt2")
    check_is_as_readable_as_others(tmp_path / "m.pt2")
    loaded = torch.export.load(tmp_path / "m.pt2").module()
    for batch in (1, 5):
        images = images_for(model, batch)
        with torch.no_grad():
            torch.testing.assert_close(loaded(images), model(images), rtol=1e-5, atol=1e-5)


KILLED = """
import os, sys
import timm
from pm_models import export

def write_half(model, images, path):
    path.write_bytes(b"half")
    os._exit(1)

export._write_pt2 = write_half
model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1)
export.export_model(model, sys.argv[1], "pt2")
"""


def test_what_a_killed_export_left_is_removed(tmp_path):
    assert subprocess.run([sys.executable, "-c", KILLED, tmp_path / "m.pt2"]).returncode == 1
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".")
    export_model(small_vit(depth=1), tmp_path / "m.pt2", "pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt2"]


@pytest.mark.fuzz
@pytest.mark.exhaustive
def test_aoti(tmp_path):
    model = compressed(depth=2)
    export_model(model, tmp_path / "m", "aoti")
    check_is_as_readable_as_others(tmp_path / "m")
    loaded = torch._inductor.aoti_load_package(str(tmp_path / "m"))
    images = images_for(model, 5)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"format": "tflite"}, ValueError, "format must be one of 'onnx', 'pt2', 'aoti', got 'tflite'"),
        ({"batch_size": 1}, ValueError, "batch_size must be at least 2"),
        ({"tolerance": -1.0}, RuntimeError, "(?s)the logits of the pt2 file differ.*nothing is written"),
        ({"opset": 17}, ValueError, "opset must be None for format 'pt2', because only ONNX has opsets, got 17"),
        ({"format": "onnx", "opset": 16}, ValueError, "opset must be between 17 and 2[23], got 16"),
        ({"format": "onnx", "opset": 99}, ValueError, "opset must be between 17 and 2[23], got 99"),
        ({"format": "onnx", "opset": "17"}, TypeError, "opset must be an integer, got '17'"),
        ({"format": "onnx", "opset": True}, TypeError, "opset must be an integer, got True"),
    ],
)
def test_errors_leave_nothing(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        export_model(compressed(), tmp_path / "m", **{"format": "pt2"} | arguments)
    assert not list(tmp_path.iterdir())


def test_onnx_needs_its_packages_and_fits_one_file(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "onnxscript", None)
        with pytest.raises(ImportError, match=r"pip install '.\[export\]'"):
            export_model(compressed(), tmp_path / "m", "onnx")
    monkeypatch.setattr("pm_models.export._MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="one ONNX file holds 2; export it as pt2"):
        export_model(compressed(), tmp_path / "m", "onnx")
    assert not list(tmp_path.iterdir())


def test_a_scatter_is_refused(tmp_path):
    """Attention pooling has none; a model that scatters its tokens does."""

    class Scattering(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x, **_):
            x = self.block(x)
            return torch.zeros_like(x).scatter_add(1, torch.zeros_like(x, dtype=torch.long), x)

    model = small_vit(depth=2)
    model.blocks[1] = Scattering(model.blocks[1])
    with pytest.raises(ValueError, match="the ONNX graph has Scatter"):
        export_model(model, tmp_path / "m", "onnx")
    assert not list(tmp_path.iterdir())


def test_the_command(capsys, tmp_path):
    model = compressed()
    save_pretrained(model, tmp_path / "small", model_args={"embed_dim": 32, "depth": 3, "num_heads": 2})
    arguments = ["export", "--model", str(tmp_path / "small"), "--format", "pt2", "--output", str(tmp_path / "m.pt2")]
    assert main([*arguments, "--device", "cpu", "-b", "2"]) == 0
    out = capsys.readouterr().out
    assert "logits within 0 of the model's greatest" in out
    assert "times as fast as the uncompressed model's file" in out
    images = images_for(model, 3)
    with torch.no_grad():
        expected = load_pretrained(tmp_path / "small")(images)
        torch.testing.assert_close(torch.export.load(tmp_path / "m.pt2").module()(images), expected)
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["export", "--model", "nowhere", "--format", "pt2", "--output", str(tmp_path / "n")]) == 2
    assert "nowhere is not a saved model" in capsys.readouterr().err


def test_the_command_takes_an_opset(capsys, tmp_path):
    save_pretrained(compressed(depth=1), tmp_path / "small", model_args={"embed_dim": 32, "depth": 1, "num_heads": 2})
    command = ["export", "--model", str(tmp_path / "small"), "--output", str(tmp_path / "m"), "--opset"]
    assert main([*command, "17", "--format", "onnx", "-b", "2"]) == 0
    assert onnx.load(tmp_path / "m").opset_import[0].version == 17
    (tmp_path / "m").unlink()
    capsys.readouterr()
    for given, told in (("16", "opset must be between 17 and 2"), ("-1", "opset must be between 17 and 2")):
        assert main([*command, given, "--format", "onnx"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"pm-vit export: error: {told}")
        assert line.endswith(f"got {given}")
    assert main([*command, "17", "--format", "pt2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "pm-vit export: error: opset must be None for format 'pt2', because only ONNX has opsets, got 17"
    with pytest.raises(SystemExit):
        main([*command, "new", "--format", "onnx"])
    assert "argument --opset: invalid int value: 'new'" in capsys.readouterr().err


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("kind", ["support", "dense", "rotary", "in attention"])
def test_an_export_of_ones_own(kind, frozen, tmp_path):
    model = compressed(merge_site="attention") if kind == "in attention" else OF_EVERY_KIND[kind]()
    images = images_for(model)
    model = model.freeze() if frozen else model
    with torch.no_grad():
        expected = model(images)
        torch.onnx.export(model, (images,), tmp_path / "m.onnx", dynamo=True, verbose=False)
    operators = {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}
    assert not frozen or not [name for name in operators if name.startswith(("Scatter", "Loop", "If"))]
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
