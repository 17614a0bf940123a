"""The command line on small folders of images: the whole path, and every mistake's message."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import pm_models
from pm_models import (
    AdaptivePlan,
    CompressionPlan,
    PMVisionTransformer,
    Segmenter,
    compress,
    load_pretrained,
    save_pretrained,
)
from pm_models.budget import Fit
from pm_models.cli import main
from pm_models.measure import count_gmacs
from pm_models.training import distillation_task
from pm_models.training.state import RunState
from pm_models.vision_transformer import check_vision_transformer

MODEL = ["--model", "vit_tiny_patch16_224", "--img-size", "32"]
SHAPE = ["--model-kwargs", "patch_size=8", "embed_dim=32", "depth=3", "num_heads=2"]
COMMON = ["-j", "0", "-b", "4", "--device", "cpu"]
MODEL_FILES = {"README.md", "config.json", "model.safetensors"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Red, green and blue noise: 8 training and 4 validation images of each."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for channel, name in enumerate(("red", "green", "blue")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 60, (40, 36, 3), dtype=np.uint8)
                pixels[..., channel] += 180
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def dense(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("dense") / "model"
    assert (
        main(
            [
                "train",
                str(data),
                *MODEL,
                *SHAPE,
                *COMMON,
                "--output",
                str(output),
                "--epochs",
                "6",
                "--warmup-epochs",
                "1",
                "--lr",
                "2e-3",
            ]
        )
        == 0
    )
    return output


@pytest.fixture(scope="module")
def compressed(data, dense, tmp_path_factory):
    output = tmp_path_factory.mktemp("compressed") / "model"
    assert (
        main(
            [
                "compress",
                str(data),
                "--model",
                str(dense),
                *COMMON,
                "--output",
                str(output),
                "--keep-rate",
                "0.5",
                "--prune-rate",
                "0.2",
                "--score-batches",
                "3",
            ]
        )
        == 0
    )
    return output


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_train_writes_a_model_and_its_history(dense):
    assert {path.name for path in dense.iterdir()} == {*MODEL_FILES, "training.json", "summary.csv"}
    history = json.loads((dense / "training.json").read_text())
    assert history["recipe"]["lr"] == 2e-3
    assert [epoch["epoch"] for epoch in history["epochs"]] == [1, 2, 3, 4, 5, 6]
    rows = list(csv.DictReader((dense / "summary.csv").open()))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [float(row["eval_top1"]) for row in rows] == [epoch["top1"] for epoch in history["epochs"]]
    assert float(rows[-1]["lr"]) < float(rows[2]["lr"]) < 2e-3
    assert load_pretrained(dense).num_classes == 3


def test_compress_writes_plan_and_picture(capsys, compressed):
    assert {path.name for path in compressed.iterdir()} == {*MODEL_FILES, "plan.json", "plan.png"}
    model = load_pretrained(compressed)
    assert isinstance(model, PMVisionTransformer)
    assert CompressionPlan.load(compressed / "plan.json") == model.plan


def test_compress_options_reach_the_plan_and_the_model(capsys, data, dense, tmp_path):
    status, out, _ = run(
        capsys, "compress", data, "--model", dense, *COMMON, "--output", tmp_path / "m", "--keep-rate", "0.5",
        "--prune-rate", "0.0", "--stages", "0,1-2", "--allocation", "layer", "--row-weights", "average",
        "--train-matrices", "none", "--size-bias", "--merge-site", "attention", "--score-batches", "2", "--amp",
    )  # fmt: skip
    assert status == 0
    model = load_pretrained(tmp_path / "m")
    assert (model.train_matrices, model.size_bias, model.merge_site) == (None, True, "attention")
    assert [(stage.first, stage.last) for stage in model.plan.stages] == [(0, 0), (1, 2)]
    assert model.plan.tokens == (9, 9, 9)
    torch.testing.assert_close(model.plan.merge_matrix(1).sum(dim=1), torch.ones(9))
    assert "1..2          9       8       8       0" in out
    assert re.search(r"GMACs per image: [\d.e-]+ before, [\d.e-]+ after \(\d+\.\d%\)", out)


def test_compress_to_a_budget(capsys, monkeypatch, data, dense, tmp_path):
    model = load_pretrained(dense)
    size = (model.in_chans, *model.patch_embed.img_size)
    whole = count_gmacs(model, size)
    common = ("compress", data, "--model", dense, *COMMON, "--prune-rate", "0.1", "--score-batches", "2")
    status, out, _ = run(capsys, *common, "--output", tmp_path / "gmacs", "--target-gmacs", 0.6 * whole)
    assert status == 0
    model = load_pretrained(tmp_path / "gmacs")
    assert 0.45 * whole < count_gmacs(model, size) <= 0.6 * whole
    assert re.search(r"keep rate 0\.\d{3} for [\d.e-]+ GMACs: [\d.e-]+", out)

    def fit(model, plans, make_model, target, images):
        assert not model.training
        assert (len(plans), target, images.shape[1:]) == (int(0.9 * 16), 1.25, size)
        assert make_model(plans[7]).plan == plans[7]
        return Fit(plans[7], 7, 1.26)

    monkeypatch.setattr("pm_models.cli.commands.fit_speedup", fit)
    status, out, _ = run(capsys, *common, "--output", tmp_path / "speed", "--target-speedup", "1.25")
    assert status == 0
    assert re.search(r"keep rate 0\.500 for 1\.25 times the speed: 1\.260 times, measured at batch \d+ on", out)
    assert max(load_pretrained(tmp_path / "speed").plan.tokens) < 17
    status, _, err = run(capsys, *common, "--output", tmp_path / "never", "--target-gmacs", 1e-9)
    assert status == 2
    assert "target_gmacs must be at least" in err
    assert not (tmp_path / "never").exists()


def test_finetune_and_eval(capsys, data, compressed, tmp_path):
    tuned = tmp_path / "tuned"
    status, out, err = run(capsys, "finetune", data, "--model", compressed, *COMMON, "--output", tuned, "--epochs", "2")
    assert status == 0, err
    assert re.search(r"^dense +\d", out, re.MULTILINE)
    assert re.search(r"^finetune +\d", out, re.MULTILINE)
    before, after = load_pretrained(compressed), load_pretrained(tuned)
    assert after.plan == before.plan
    assert not torch.equal(after.stages["0"].merge, before.stages["0"].merge)

    results = tmp_path / "results.json"
    status, out, err = run(capsys, "eval", data, "--model", tuned, *COMMON, "--results-file", results)
    assert status == 0, err
    values = json.loads(results.read_text())
    assert values["images"] == 12
    assert values["top1"] == json.loads((tuned / "training.json").read_text())["epochs"][-1]["top1"]
    assert values["gmacs"] > 0
    assert values["param_count"] == sum(parameter.numel() for parameter in after.parameters()) / 1e6
    assert f"top-1 {values['top1']:.2f}%" in out

    status, _, err = run(capsys, "finetune", data, "--model", tuned, *COMMON, "--output", tmp_path / "again")
    assert status == 2
    assert "is fine-tuned already" in err
    assert "--teacher" in err


def test_an_adaptive_model_is_tuned_and_measured(capsys, data, dense, tmp_path):
    model = load_pretrained(dense)
    plan = AdaptivePlan.for_model(model, gmacs=0.7)
    save_pretrained(compress(model, plan), tmp_path / "adaptive")
    arguments = ["--model", tmp_path / "adaptive", *COMMON, "--output", tmp_path / "tuned", "--epochs", "1"]
    status, out, err = run(capsys, "finetune", data, *arguments)
    assert status == 0, err
    assert re.search(r"^finetune +\d", out, re.MULTILINE)
    tuned = load_pretrained(tmp_path / "tuned")
    assert tuned.plan == plan
    assert not torch.equal(tuned.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    status, out, err = run(capsys, "eval", data, "--model", tmp_path / "tuned", *COMMON)
    assert status == 0, err
    pictures = {"accuracy.png", "merging-1.png", "merging-2.png", "merging-3.png"}
    assert {path.name for path in (tmp_path / "tuned").iterdir()} == {
        *MODEL_FILES, *pictures, "training.json", "summary.csv"
    }  # fmt: skip


def test_finetune_compresses_first(capsys, data, dense, tmp_path):
    """One command from a trained model to a compressed one; stopped and started again it plans nothing anew."""
    arguments = ["finetune", data, "--model", dense, *COMMON, "--output", tmp_path / "tuned", "--epochs", "1"]
    rates = ["--keep-rate", "0.5", "--prune-rate", "0.2", "--score-batches", "3"]
    status, out, err = run(capsys, *arguments, *rates, "--model-ema", "--log-tensorboard")
    assert status == 0, err
    tuned, compressed = load_pretrained(tmp_path / "tuned"), load_pretrained(tmp_path / "tuned" / "compressed")
    assert tuned.plan == compressed.plan
    assert max(tuned.plan.tokens) < 17
    weights = load_pretrained(dense).state_dict()
    assert all(torch.equal(compressed.state_dict()[name], weights[name]) for name in weights)
    pictures = {"accuracy.png", "plan-1.png", "plan-2.png", "plan-3.png"}
    assert {path.name for path in (tmp_path / "tuned").iterdir()} == {
        *MODEL_FILES, *pictures, "training.json", "summary.csv", "compressed", "logs"
    }  # fmt: skip
    for picture in pictures:
        assert np.asarray(Image.open(tmp_path / "tuned" / picture)).std() > 0
    models = json.loads((tmp_path / "tuned" / "training.json").read_text())["models"]
    assert models["dense"]["tokens"] == [17, 17, 17]
    assert models["finetune"]["tokens"] == list(tuned.plan.tokens)
    (tmp_path / "tuned" / "config.json").unlink()  # as if it had been stopped just before its end
    status, out, err = run(capsys, *arguments)
    assert status == 0, err
    assert "GMACs per image" not in out


def test_another_round_of_compression(capsys, data, dense, compressed, tmp_path):
    tuned, again = tmp_path / "tuned", tmp_path / "again"
    assert run(capsys, "finetune", data, "--model", compressed, *COMMON, "--output", tuned, "--epochs", "1")[0] == 0
    rates = ["--keep-rate", "0.3", "--prune-rate", "0.3", "--score-batches", "3"]
    status, _, err = run(capsys, "compress", data, "--model", tuned, *COMMON, "--output", again, *rates)
    assert status == 0, err
    before, after = load_pretrained(tuned), load_pretrained(again)
    assert sum(after.plan.tokens) < sum(before.plan.tokens)
    assert torch.equal(after.blocks[1].mlp.fc1.weight, before.blocks[1].mlp.fc1.weight)
    arguments = ["finetune", data, "--model", again, *COMMON, "--output", tmp_path / "end", "--epochs", "1"]
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert "name the uncompressed model's folder with --teacher" in err
    status, _, err = run(capsys, *arguments, "--teacher", dense)
    assert status == 0, err


def test_random_weights_are_warned_of(capsys, data, tmp_path):
    rates = ["--keep-rate", "0.5", "--prune-rate", "0.2", "--score-batches", "1"]
    status, _, err = run(capsys, "compress", data, *MODEL, *SHAPE, *COMMON, "--output", tmp_path / "m", *rates)
    assert status == 0
    assert "pm-vit: warning: vit_tiny_patch16_224 has random weights: name a folder" in err
    status, _, err = run(capsys, "eval", data, *MODEL, *SHAPE, *COMMON, "--num-classes", "5")
    assert status == 0
    assert "pm-vit: warning: the data has 3 classes, but the model distinguishes 5" in err


CONFIG = """
model: vit_tiny_patch16_224
img_size: 32
model_kwargs: {patch_size: 8, embed_dim: 32, depth: 3, num_heads: 2}
keep_rate: 0.5
prune_rate: 0.1
epochs: 3
warmup_epochs: 0
lr_base: 1e-3
lr_base_size: 8
scale: [0.5, 1.0]
mixup: 0.5
model_ema: true
aa: null
"""


def test_options_from_a_file(capsys, data, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    output = tmp_path / "dense"
    status, _, err = run(
        capsys, "train", data, "-c", config, *COMMON, "--output", output, "--epochs", "2", "--grad-accum-steps", "4"
    )
    assert status == 0, err
    recipe = json.loads((output / "training.json").read_text())["recipe"]
    assert recipe["epochs"] == 2
    assert recipe["lr"] == 1e-3 * 4 * 4 / 8
    assert (recipe["mixup"], recipe["cutmix"], recipe["model_ema_decay"]) == (0.5, 0.0, 0.9998)
    model = load_pretrained(output)
    assert (model.embed_dim, len(model.blocks)) == (32, 3)
    arguments = ["compress", data, "--config", config, "--model", output, *COMMON, "--score-batches", "1", "--output"]
    assert run(capsys, *arguments, tmp_path / "by file")[0] == 0
    arguments.remove(data)
    assert run(capsys, *arguments, tmp_path / "data last", "--", data)[0] == 0  # which gives no option
    arguments.insert(1, data)
    gmacs = 0.8 * count_gmacs(model, (3, 32, 32))
    status, out, err = run(capsys, *arguments, tmp_path / "by hand", "--target-gmacs", gmacs)
    assert status == 0, err
    assert f"for {gmacs:g} GMACs" in out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epoch: 3", "epoch: no such option"),
        ("data_dir: x", "data_dir: no such option"),
        ("config: x", "config: no such option"),
        ("- 3", "expected options and values, such as epochs: 30, got list"),
        ("epochs: [", "is not a YAML file"),
        ("epochs: three", "epochs: invalid literal for int"),
        ("epochs: 0", "epochs: must be at least 1, got 0"),
        ("epochs: [3]", "epochs takes one value, got [3]"),
        ("scale: 0.3", "scale takes 2 values, got 0.3"),
        ("scale: [1]", "scale takes 2 values, got [1]"),
        ("lr: {a: 1}", "lr does not take names and values"),
        ("model_ema: 3", "model_ema must be true or false, got 3"),
        ("lr_base_scale: cubic", "lr_base_scale must be one of linear, sqrt, got 'cubic'"),
    ],
)
def test_mistakes_in_a_file_of_options(capsys, data, tmp_path, content, message):
    (tmp_path / "c.yaml").write_text(content)
    status, _, err = run(
        capsys, "train", data, "--config", tmp_path / "c.yaml", *MODEL, *COMMON, "--output", tmp_path / "o"
    )
    assert status == 2
    assert err.startswith("pm-vit train: error: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_exclusive_options_in_a_file(capsys, data, tmp_path):
    (tmp_path / "c.yaml").write_text("keep_rate: 0.5\ntarget_gmacs: 1.0")
    status, _, err = run(
        capsys, "compress", data, "--config", tmp_path / "c.yaml", *MODEL, "--prune-rate", "0", "--output", tmp_path
    )
    assert status == 2
    assert "only one of keep_rate, target_gmacs, target_speedup can be given" in err


def test_no_such_recipe(capsys, data, tmp_path):
    status, _, err = run(capsys, "finetune", data, "--config", "deit_smal", "--output", tmp_path / "o")
    assert status == 2
    assert "no file deit_smal, and no recipe of that name: there are augreg_base, deit_base" in err


def test_the_shipped_way_to_compress(capsys, data, dense, tmp_path):
    arguments = ["compress", data, "--config", "merge_and_carry", "--model", dense, "--keep-rate", "0.5", *COMMON]
    status, _, err = run(capsys, *arguments, "--score-batches", "1", "--output", tmp_path / "o")
    assert status == 0, err
    model = load_pretrained(tmp_path / "o")
    assert (model.shortcut, model.size_bias) == ("all", True)
    assert len(set(model.plan.tokens)) == 1
    for block in range(model.plan.depth):
        assert model.plan.token_mask(block).min() == 1
        merge = model.plan.merge_matrix(block)
        torch.testing.assert_close(merge.sum(dim=1), torch.ones(len(merge)))


@pytest.mark.parametrize("name", ["augreg_base", "deit_base", "deit_small", "deit_tiny", "mae_base"])
def test_shipped_recipes(capsys, data, dense, tmp_path, name):
    """Each is the whole of a command: with the data, the model and the folder it runs, on four images a step."""
    alpha = {"deit_tiny": 0.8}.get(name, 1.0)
    small = ["-j", "0", "-b", "4", "--device", "cpu", "--no-amp", "--epochs", "1", "--score-batches", "1"]
    arguments = ["finetune", data, "--config", name, "--model", dense, *small, "--output", tmp_path / "o"]
    found = {}

    def task(*models, **options):
        found.update(options)
        return distillation_task(*models, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pm_models.cli.tasks.distillation_task", task)
        status, _, err = run(capsys, *arguments)
    assert status == 0, err
    assert found == {"alpha": alpha, "temperature": 20.0, "smoothing": 0.1}
    recipe = json.loads((tmp_path / "o" / "training.json").read_text())["recipe"]
    assert recipe["lr"] == pytest.approx(1e-4 * 4 / 512)
    assert (recipe["opt"], recipe["weight_decay"], recipe["mixup"]) == ("adamw", 1e-3, 0.8)
    values = yaml.safe_load((Path(pm_models.__file__).parent / "recipes" / f"{name}.yaml").read_text())
    assert (values["keep_rate"], values["prune_rate"], values["epochs"]) == (0.7, 0.1, 30)
    with torch.device("meta"):
        check_vision_transformer(timm.create_model(values["model"], **values.get("model_kwargs", {})))


def test_mixed_precision_and_checkpointing(capsys, data, compressed, tmp_path):
    common = [data, *COMMON, "--amp"]
    tuned = tmp_path / "tuned"
    arguments = ["--model", compressed, "--output", tuned, "--epochs", "1", "--grad-checkpointing"]
    status, _, err = run(capsys, "finetune", *common, *arguments)
    assert status == 0, err
    assert load_pretrained(tuned).head.weight.dtype == torch.float32
    status, _, err = run(capsys, "eval", *common, "--model", tuned)
    assert status == 0, err


def test_a_named_model_with_a_checkpoint(capsys, data, dense, tmp_path):
    weights = load_pretrained(dense).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    torch.save({"state_dict": weights}, tmp_path / "weights.pth")
    outputs = []
    for source in (
        ["--model", dense],
        *([*MODEL, *SHAPE, "--checkpoint", tmp_path / f"weights.{kind}"] for kind in ("safetensors", "pth")),
    ):
        status, out, err = run(capsys, "eval", data, *source, *COMMON)
        assert status == 0, err
        outputs.append(out.split(";")[0])
    assert outputs[0] == outputs[1] == outputs[2]


def test_a_data_set_that_timm_reads(capsys, tmp_path):
    """MNIST's own files, of 40 random images: grey, 28 x 28, ten classes by name."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for split in ("train", "t10k"):
        images = random.integers(0, 255, (40, 28, 28), dtype=np.uint8)
        header = np.array([0x803, 40, 28, 28], dtype=">i4").tobytes()
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = np.arange(40, dtype=np.uint8) % 10
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(
            np.array([0x801, 40], dtype=">i4").tobytes() + labels.tobytes()
        )
    arguments = ["train", tmp_path, "--dataset", "torch/mnist", *MODEL, *SHAPE, *COMMON, "--in-chans", "1"]
    output = tmp_path / "m"
    status, _, err = run(capsys, *arguments, "--epochs", "1", "--warmup-epochs", "0", "--output", output)
    assert status == 0, err
    assert load_pretrained(output).num_classes == 10


def test_grey_images(capsys, data, tmp_path):
    arguments = [
        "train",
        data,
        *MODEL,
        *SHAPE,
        *COMMON,
        "--in-chans",
        "1",
        "--output",
        tmp_path / "m",
        "--epochs",
        "1",
        "--warmup-epochs",
        "0",
    ]
    status, _, err = run(capsys, *arguments)
    assert status == 0, err
    assert load_pretrained(tmp_path / "m").in_chans == 1
    status, _, err = run(
        capsys,
        "compress",
        data,
        "--model",
        tmp_path / "m",
        *COMMON,
        "--output",
        tmp_path / "c",
        "--keep-rate",
        "0.6",
        "--prune-rate",
        "0.1",
    )
    assert status == 0, err


EVAL = ["eval", "{data}"]
TRAIN = ["train", "{data}", *MODEL, *SHAPE, "--output", "{tmp}/out"]
COMPRESS = ["compress", "{data}", "--output", "{tmp}/out", "--keep-rate", "0.6", "--prune-rate", "0.1"]
FINETUNE = ["finetune", "{data}", "--output", "{tmp}/out", "--model"]
MISTAKES = {
    "no data folder": (
        ["eval", "{tmp}/nowhere", "--model", "{dense}"],
        "no data folder at {tmp}/nowhere",
    ),
    "no split": (
        ["eval", "{tmp}", "--model", "{dense}"],
        "{tmp} has no folder validation or val or .*one folder of images",
    ),
    "no images": (
        ["eval", "{empty}", "--model", "{dense}"],
        "Found 0 images in subfolders .*expected <class>/<image>",
    ),
    "no such data set": (
        [*EVAL, "--model", "{dense}", "--dataset", "torch/cifar10"],
        "Dataset not found.*expected data set 'torch/cifar10'",
    ),
    "unknown model": (
        [*EVAL, "--model", "deit_smal"],
        "deit_smal is neither a saved folder nor a timm model; did you mean deit_small",
    ),
    "no such checkpoint": (
        [*EVAL, *MODEL, *SHAPE, "--checkpoint", "{tmp}/x.pth"],
        "no checkpoint file at {tmp}/x.pth",
    ),
    "truncated checkpoint": (
        [*EVAL, *MODEL, *SHAPE, "--checkpoint", "{tmp}/cut.safetensors"],
        "cut.safetensors is truncated",
    ),
    "foreign checkpoint": (
        [*EVAL, *MODEL, *SHAPE, "--checkpoint", "{tmp}/foreign.pth"],
        "foreign.pth does not hold the weights of vit_tiny_patch16_224",
    ),
    "not a ViT": ([*COMPRESS, "--model", "resnet10t"], "must be a timm VisionTransformer.*got ResNet"),
    "rates": ([*COMPRESS, "--model", "{dense}", "--keep-rate", "0.95"], r"keep_rate \+ prune_rate must be at most 1"),
    "stages": ([*COMPRESS, "--model", "{dense}", "--stages", "0,7"], "stages must be"),
    "too few classes": (
        [*COMPRESS, *MODEL, *SHAPE, "--num-classes", "2"],
        "the data has 3 classes, but the model distinguishes 2",
    ),
    "one class": (
        ["train", "{one}", *MODEL, *SHAPE, "--output", "{tmp}/out"],
        r"the data has 1 class \(cats\), expected at least 2",
    ),
    "other classes in validation": (
        ["train", "{other}", *MODEL, *SHAPE, "--output", "{tmp}/out"],
        "the splits of the data have different classes: cats, cows not in every one of them",
    ),
    "uncompressed": (
        [*FINETUNE, "{dense}"],
        "is uncompressed: give --keep-rate .* and --prune-rate, or --adaptive, or a folder",
    ),
    "uncompressed, half told": (
        [*FINETUNE, "{dense}", "--keep-rate", "0.5"],
        "is uncompressed: give --prune-rate, or --adaptive",
    ),
    "no rates": (
        ["compress", "{data}", "--model", "{dense}", "--output", "{tmp}/out"],
        "the following arguments are required: --keep-rate .*, --prune-rate; or --adaptive",
    ),
    "no data": (
        ["compress", "--model", "{dense}", "--output", "{tmp}/out", "--keep-rate", "0.6"],
        "the following arguments are required: DATA, --prune-rate; or --adaptive",
    ),
    "data that nothing looks at": (
        ["compress", "{data}", "--model", "{dense}", "--output", "{tmp}/out", "--adaptive"],
        "DATA cannot be given with --adaptive, which needs no images, got {data}",
    ),
    "adaptive with rates": (
        [*COMPRESS, "--model", "{dense}", "--adaptive", "--size-bias"],
        "--keep-rate, --prune-rate, --size-bias cannot be given with --adaptive",
    ),
    "a segmenter": ([*FINETUNE, "{segmenter}"], "holds a Segmenter: give --task segmentation"),
    "no model": ([*FINETUNE, "{tmp}/nowhere"], "nowhere is neither a saved folder nor a timm model"),
    "not a folder": ([*FINETUNE, "{tmp}"], "is not a saved model: expected config.json and model.safetensors"),
    "output below a file": (
        [*TRAIN, "--output", "{tmp}/foreign.pth/out"],
        "--output {tmp}/foreign.pth/out cannot be written: .*Not a directory",
    ),
    "finished output": (
        [*FINETUNE, "{compressed}", "--output", "{dense}"],
        "holds a finished model; choose another --output",
    ),
    "output is a file": ([*TRAIN, "--output", "{tmp}/foreign.pth"], "foreign.pth is a file, expected a folder"),
    "batch above data": ([*TRAIN, "-b", "500"], "the data has 24 images, expected at least 500"),
    "recipe": ([*TRAIN, "--epochs", "2"], "warmup_epochs must be at least 0 and below epochs = 2, got 5"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(capsys, data, dense, compressed, tmp_path, mistake):
    (tmp_path / "cut.safetensors").write_bytes((dense / "model.safetensors").read_bytes()[:500])
    torch.save({"weight": torch.ones(3)}, tmp_path / "foreign.pth")
    empty = tmp_path / "empty"
    (empty / "val" / "cats").mkdir(parents=True)
    for root, split, name in (
        *(("one", split, "cats") for split in ("train", "val")),
        *(("other", "train", name) for name in ("cats", "dogs")),
        *(("other", "val", name) for name in ("cows", "dogs")),
    ):
        (tmp_path / root / split / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / root / split / name / "0.png")
    names = {name: tmp_path / name for name in ("one", "other", "empty", "segmenter")}
    if mistake == "a segmenter":
        save_pretrained(Segmenter(load_pretrained(dense), 2), tmp_path / "segmenter")
    names |= {"tmp": tmp_path, "data": data, "dense": dense, "compressed": compressed}
    arguments, message = MISTAKES[mistake]
    first, *rest = (argument.format(**names) for argument in arguments)
    status, _, err = run(capsys, first, *COMMON, *rest)
    assert status == 2
    assert err.startswith(f"pm-vit {arguments[0]}: error: ")
    assert re.search(message.format(**names), err), err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compres"], "invalid choice: 'compres'"),
        (["compress", "data", "--output", "y", "--adaptive"], "required: --model"),
        (["eval", "data", "--model", "x", "-b", "0"], "must be at least 1, got 0"),
        (["compress", "d", "--model", "x", "--keep-rate", ".6", "--prune-rate", "0", "--stages", "a-b"],
         "expected blocks such as 0-2,3-5,6, got 'a-b'"),
    ],
)  # fmt: skip
def test_usage_errors(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "demo", "train", "compress", "finetune", "eval"])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"] if command else ["--help"])
    assert stopped.value.code == 0
    assert "usage: pm-vit" in capsys.readouterr().out


def test_a_stopped_run_continues(capsys, data, tmp_path, monkeypatch):
    arguments = ["train", data, *MODEL, *SHAPE, *COMMON, "--epochs", "3", "--warmup-epochs", "0"]
    assert run(capsys, *arguments, "--output", tmp_path / "whole")[0] == 0
    save, saved = RunState.save, []

    def interrupted(*values):
        save(*values)
        saved.append(1)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunState, "save", interrupted)
        status, _, err = run(capsys, *arguments, "--output", tmp_path / "stopped")
    assert status == 130
    assert "interrupted; the same command continues" in err
    assert not (tmp_path / "stopped" / "config.json").exists()
    status, out, err = run(capsys, *arguments, "--output", tmp_path / "stopped")
    assert status == 0, err
    assert "continuing after epoch 2 of 3" in out
    whole, continued = (load_pretrained(tmp_path / name).state_dict() for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], continued[name]) for name in whole)


def test_a_run_stopped_while_it_saves_the_model_continues(capsys, data, tmp_path, monkeypatch):
    output = tmp_path / "m"
    arguments = ["train", data, *MODEL, *SHAPE, *COMMON, "--epochs", "1", "--warmup-epochs", "0", "--output", output]

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("pm_models.cli.commands.save_pretrained", interrupted)
        assert run(capsys, *arguments)[0] == 130
    assert not (output / "config.json").exists()
    status, out, err = run(capsys, *arguments)
    assert status == 0, err
    assert "continuing after epoch 1 of 1" in out
    assert {path.name for path in output.iterdir()} == {*MODEL_FILES, "training.json", "summary.csv"}


def test_saved_model_of_another_kind_is_evaluated(capsys, data, dense, tmp_path):
    model = load_pretrained(dense).to(torch.bfloat16).float()
    save_pretrained(model, tmp_path / "copy")
    assert run(capsys, "eval", data, "--model", tmp_path / "copy", *COMMON)[0] == 0
