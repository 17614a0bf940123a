"""Models written to files, loaded again, and run on batches that they were not made with."""

import sys

import numpy as np
import onnxruntime
import pytest
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


@pytest.mark.parametrize(
    "make",
    [
        lambda: compressed(global_pool="avg"),
        lambda: compressed("deit_tiny_distilled_patch16_224", train_matrices="dense"),
        lambda: compressed(merge_site="attention"),
        lambda: Segmenter(compressed(num_classes=0), 5).eval(),
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


def test_half_precision_becomes_float32_in_onnx(tmp_path):
    model = compressed().bfloat16()
    exported = export_model(model, tmp_path / "m.onnx", "onnx")
    images = images_for(small_vit(), 3)
    with torch.no_grad():
        torch.testing.assert_close(exported.run(images), model.float()(images), rtol=1e-4, atol=1e-4)


def test_pt2(tmp_path):
    model = compressed()
    export_model(model, tmp_path / "m.pt2", "pt2")
    loaded = torch.export.load(tmp_path / "m.pt2").module()
    for batch in (1, 5):
        images = images_for(model, batch)
        with torch.no_grad():
            torch.testing.assert_close(loaded(images), model(images), rtol=1e-5, atol=1e-5)


def test_aoti(tmp_path):
    model = compressed(depth=2)
    export_model(model, tmp_path / "m", "aoti")
    loaded = torch._inductor.aoti_load_package(str(tmp_path / "m"))
    images = images_for(model, 5)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"format": "tflite"}, ValueError, "format must be one of 'onnx', 'pt2', 'aoti', got 'tflite'"),
        ({"batch_size": 1}, ValueError, "batch_size must be at least 2"),
        ({"tolerance": -1.0}, RuntimeError, "(?s)the pt2 file gives other logits.*nothing is written"),
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
    assert "is there already" in capsys.readouterr().err
    assert main(["export", "--model", "nowhere", "--format", "pt2", "--output", str(tmp_path / "n")]) == 2
    assert "nowhere is no saved model" in capsys.readouterr().err
