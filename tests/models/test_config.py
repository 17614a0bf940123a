"""``--config``: a user's YAML as people write it, and the ``args.yaml`` of timm's ``train.py``."""

import json
import re

import numpy as np
import pytest
import yaml
from PIL import Image

from pm_models import load_pretrained
from pm_models.cli import main

MODEL = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
COMMON = ["-j", "0", "-b", "4", "--device", "cpu"]

# As timm's train.py writes it, all of its options and those of older versions.
ARGS = """
aa: rand-m9-mstd0.5-inc1
amp: false
amp_dtype: float16
amp_impl: native
aug_repeats: 0
aug_splits: 0
batch_size: 4
bce_loss: false
bce_pos_weight: null
bce_sum: false
bce_target_thresh: null
bn_eps: null
bn_momentum: null
channels_last: false
checkpoint_hist: 10
class_map: ''
clip_grad: null
clip_mode: norm
color_jitter: 0.3
color_jitter_prob: null
cooldown_epochs: 0
crop_pct: null
cutmix: 0.0
cutmix_minmax: null
data: /imagenet
data_dir: null
dataset: ''
dataset_download: false
dataset_trust_remote_code: false
decay_epochs: 90
decay_milestones:
- 90
- 180
- 270
decay_rate: 0.1
device: cuda
device_modules: null
dist_bn: reduce
drop: 0.0
drop_block: null
drop_connect: null
drop_path: 0.1
epoch_repeats: 0.0
epochs: 2
eval_metric: top1
experiment: ''
fast_norm: false
fuser: ''
gaussian_blur_prob: null
gp: null
grad_accum_steps: 1
grad_checkpointing: false
grayscale_prob: null
head_init_bias: null
head_init_scale: null
hflip: 0.5
img_size: null
in_chans: null
initial_checkpoint: ''
input_img_mode: null
input_key: null
input_size:
- 3
- 32
- 32
interpolation: ''
jsd_loss: false
layer_decay: 0.9
layer_decay_min_scale: 0
layer_decay_no_opt_scale: null
local_rank: 0
log_interval: 50
log_wandb: false
lr: null
lr_base: 0.002
lr_base_scale: ''
lr_base_size: 16
lr_cycle_decay: 0.5
lr_cycle_limit: 1
lr_cycle_mul: 1.0
lr_k_decay: 1.0
lr_noise: null
lr_noise_pct: 0.67
lr_noise_std: 1.0
mean: null
min_lr: 0
mixup: 0.0
mixup_mode: batch
mixup_off_epoch: 0
mixup_prob: 1.0
mixup_switch_prob: 0.5
model: vit_tiny_patch16_224
model_dtype: null
model_ema: false
model_ema_decay: 0.9998
model_ema_force_cpu: false
model_ema_warmup: false
model_kwargs:
  patch_size: 8
  embed_dim: 32
  depth: 2
  num_heads: 2
momentum: 0.9
no_aug: false
no_ddp_bb: false
no_prefetcher: false
no_resume_opt: false
num_classes: null
opt: adamw
opt_betas: null
opt_eps: null
opt_kwargs: {}
output: ''
patience_epochs: 10
pin_mem: false
pretrained: false
pretrained_path: null
ratio:
- 0.75
- 1.3333333333333333
recount: 1
recovery_interval: 0
remode: pixel
reprob: 0.0
resplit: false
resume: ''
save_images: false
scale:
- 0.08
- 1.0
sched: cosine
sched_on_updates: false
seed: 42
smoothing: 0.1
some_option_of_a_later_version: 3
split_bn: false
start_epoch: null
std: null
sync_bn: false
synchronize_step: false
target_key: null
torchcompile: null
torchcompile_mode: null
torchscript: false
train_crop_mode: null
train_interpolation: random
train_num_samples: null
train_split: train
tta: 0
use_multi_epochs_loader: false
val_num_samples: null
val_split: validation
validation_batch_size: null
vflip: 0.0
wandb_project: null
warmup_epochs: 0
warmup_lr: 1.0e-05
warmup_prefix: false
weight_decay: 0.05
worker_seeding: all
workers: 0
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two classes of noise, four images each."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for index in range(4):
                pixels = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture
def train(capsys, data, tmp_path):
    """The recipe that a file leads to, the model, and what was said; or the one line of its error."""

    def run(content, *options):
        (tmp_path / "c.yaml").write_text(content)
        arguments = ["train", data, "--config", tmp_path / "c.yaml", "--output", tmp_path / "out", *options]
        status = main([str(argument) for argument in arguments])
        err = capsys.readouterr().err
        if status:
            assert status == 2
            assert err.startswith("pm-vit train: error: "), err
            assert len(err.splitlines()) == 1
            return err
        told = re.findall("pm-vit: warning: (.*)", err)
        return json.loads((tmp_path / "out" / "training.json").read_text())["recipe"], told

    return run


def own(**options):
    """A user's file with the small model."""
    values = {"model": "vit_tiny_patch16_224", "img_size": 32, "model_kwargs": MODEL, "epochs": 1, "warmup_epochs": 0}
    return yaml.safe_dump(values | options)


def test_timms_args(train, tmp_path):
    recipe, told = train(ARGS, "--device", "cpu")
    # timm's rule: for an optimiser such as AdamW the root of the images a step over those that lr_base is for.
    assert recipe["lr"] == pytest.approx(0.002 * (4 / 16) ** 0.5)
    assert (recipe["epochs"], recipe["opt"], recipe["seed"], recipe["layer_decay"]) == (2, "adamw", 42, 0.9)
    assert recipe["clip_grad"] is None
    assert recipe["warmup_lr"] == 1e-5
    model = load_pretrained(tmp_path / "out")
    assert (model.embed_dim, len(model.blocks), model.patch_embed.img_size) == (32, 2, (32, 32))
    (warning,) = told
    start, names = warning.split(" are passed over: ")
    assert start == f"{tmp_path / 'c.yaml'} is timm's; its options that pm-vit does not have"
    assert "drop_path = 0.1, " in names
    names = {name.split(" = ")[0] for name in re.split(r", (?=[a-z])", names)}
    assert {"data", "data_dir", "drop_path", "fuser", "opt_kwargs", "some_option_of_a_later_version"} <= names
    assert not {"aa", "lr", "model", "output", "device", "scale", "img_size"} & names


@pytest.mark.parametrize(
    ("change", "lr"),
    [
        ({"opt": "sgd"}, 0.002 * 4 / 16),
        ({"opt": "lamb"}, 0.002 * (4 / 16) ** 0.5),
        ({"lr_base_scale": "linear"}, 0.002 * 4 / 16),
        ({"lr": 0.003}, 0.003),
        ({"lr": 0}, 0.002 * (4 / 16) ** 0.5),
    ],
)
def test_the_learning_rate_of_timms_args(train, change, lr):
    recipe, _ = train(yaml.safe_dump(yaml.safe_load(ARGS) | change), "--device", "cpu", "--epochs", "1")
    assert recipe["lr"] == pytest.approx(lr)


def test_a_part_of_timms_args_for_another_command(capsys, data, train, tmp_path):
    """With the names of a command line, and for eval, which has few of the options."""
    train(own(), *COMMON)
    values = {"data-dir": None, "opt-eps": None, "no-prefetcher": False, "amp": False, "mean": None, "batch-size": 3}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    arguments = ["eval", data, "-c", tmp_path / "c.yaml", "--model", tmp_path / "out", "-j", "0", "--device", "cpu"]
    assert main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    assert "at batch 3 on cpu" in captured.out
    assert "are passed over: data_dir, no_prefetcher, opt_eps" in captured.err


def test_a_typo_in_timms_args_is_noticed(train):
    assert "epoch: no such option; did you mean epochs?" in train(f"{ARGS}\nepoch: 3", "--device", "cpu")
    assert "drop_pth: no such option" in train(f"{ARGS}\ndrop_pth: 3", "--device", "cpu")
    assert "sched must be one of cosine, poly, got 'step'" in train(ARGS.replace("sched: cosine", "sched: step"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("momentum: 0.9", "momentum: no such option"),
        ("weight_decy: 0.1", "weight_decy: no such option; did you mean weight_decay?"),
        (
            "epoch: 3\nwarmup: 1\nlr-bas: 1",
            "epoch, warmup, lr_bas: no such option; did you mean epochs, warmup_lr, lr_base?",
        ),
        ("zzz: null", "zzz: no such option"),
        ("3: 4", "3: no such option"),
        ("true: 4", "True: no such option"),
        ("lr-base: 1\nlr_base: 1", "an option is given twice, with - and with _"),
        ("task: [segmentation]", "task takes one value, got ['segmentation']"),
        ("model_ema: maybe", "model_ema must be true or false, got 'maybe'"),
        ("model_ema: 2", "model_ema must be true or false, got 2"),
        ("lr: true", "lr: does not take true or false, got True"),
        ("aa: off", "aa: does not take true or false, got False; quote it if it is a word"),
        ("epochs: 2.5", "epochs: invalid literal for int"),
        ("scale: []", "scale takes 2 values, got []"),
        ("mean: []", "mean takes a list, got []"),
        ("scale: 0.1 0.2 0.3", "scale takes 2 values, got '0.1 0.2 0.3'"),
        ("scale: [[0.1, 0.2], 1]", "scale: could not convert string to float"),
        ("model_kwargs: depth", "model_kwargs takes names and values, got 'depth'"),
        ("model_kwargs: [depth]", "model_kwargs takes names and values, got ['depth']"),
    ],
)
def test_mistakes_of_a_user(train, content, message):
    assert message in train(content, "--model", "vit_tiny_patch16_224", *COMMON)


def test_values_as_people_write_them(train, tmp_path):
    content = """
model: vit_tiny_patch16_224
img-size: "32"
model-kwargs: patch_size=8 embed_dim=32 depth=2 num_heads=2
epochs: 1.0
--warmup-epochs: "0"
lr: 1e-3
weight-decay: "0.01"
model_ema: "True"
model-ema-decay: "0.5"
grad_checkpointing: no
no-aug: "false"
scale: 0.5, 1.0
ratio: "0.75 1.33"
mean: [0.5, "0.5", 0.5]
aa: None
num_classes: null
crop_pct: ''
opt: null
teacher: null
workers: null
"""
    recipe, told = train(content, *COMMON)
    assert told == []
    assert (recipe["epochs"], recipe["lr"], recipe["weight_decay"]) == (1, 1e-3, 0.01)
    assert (recipe["model_ema_decay"], recipe["opt"]) == (0.5, "adamw")
    model = load_pretrained(tmp_path / "out")
    assert (len(model.blocks), model.num_classes) == (2, 2)


@pytest.mark.parametrize("kwargs", [["patch_size=8", "embed_dim=32", "depth=2", "num_heads=2"], MODEL])
def test_names_and_values(train, tmp_path, kwargs):
    train(own(model_kwargs=kwargs), *COMMON)
    assert load_pretrained(tmp_path / "out").embed_dim == 32


@pytest.mark.parametrize(("value", "expected"), [("null", None), ("''", 1.0), ("0.5", 0.5)])
def test_null_is_no_clipping_and_nothing_is_the_default(train, value, expected):
    recipe, _ = train(f"{own()}\nclip_grad: {value}", *COMMON)
    assert recipe["clip_grad"] == expected


def test_empty_values_do_not_exclude_others(capsys, data, tmp_path):
    (tmp_path / "c.yaml").write_text(
        own(keep_rate=0.5, prune_rate=0.1, target_gmacs=None, target_speedup="", epochs=None)
    )
    arguments = ["compress", data, "--config", tmp_path / "c.yaml", *COMMON, "--output", tmp_path / "out"]
    assert main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
    assert load_pretrained(tmp_path / "out").plan.tokens[0] < 17


def test_a_budget_in_a_file(capsys, data, tmp_path):
    """Any of the budgets there makes the others needless on the command line."""
    (tmp_path / "c.yaml").write_text(own(target_gmacs=1e-9, prune_rate=0.1, score_batches=1))
    arguments = ["compress", data, "--config", tmp_path / "c.yaml", *COMMON, "--output", tmp_path / "out"]
    assert main([str(argument) for argument in arguments]) == 2
    assert "target_gmacs must be at least" in capsys.readouterr().err


def test_an_empty_value_of_what_must_be_given(capsys, data, tmp_path):
    (tmp_path / "c.yaml").write_text("model: null")
    with pytest.raises(SystemExit):
        main(["eval", str(data), "--config", str(tmp_path / "c.yaml")])
    assert "the following arguments are required: --model" in capsys.readouterr().err
