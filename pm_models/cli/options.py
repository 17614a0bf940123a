"""The options of every command. The docstring of a command's class is its text in ``--help``."""

import argparse
import os
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal

from ..compression import MERGE_SITES, OPTIONS, SHORTCUTS
from ..export import FORMATS, OPSETS
from ..segmenter import DECODERS
from ..training import IGNORED, SCHEDULES, Recipe
from .arguments import group, option, options_of, positive, stages_of
from .config import shipped_configs

DEFAULT_TASK = "classification"
_LEARNING_RATES = {"train": 5e-4, "finetune": 1e-4}
_NAMED_MODEL = "a timm Vision Transformer's name (hf-hub:... and local-dir:... too), a folder saved by pm-vit"

_classifying = partial(option, only="classification")
_segmenting = partial(option, only="segmentation")


# --- Groups of options.


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The images, and how they are loaded and preprocessed."""

    data_dir: Path = option(
        "folder with train/CLASS/IMAGES and validation/CLASS/IMAGES, in any format that Pillow reads",
        positional="DATA",
        compress={"nargs": "?"},
        segmentation={
            "help": "Cityscapes' or ADE20K's folder (annotations/, 150 classes), or one with images/train, "
            "labels/train, images/validation, ..."
        },
    )
    ignore_index: int = _segmenting(f"label of pixels to ignore, besides {IGNORED}", IGNORED)
    dataset: str = _classifying("data set for timm to read instead of folders, such as torch/cifar10", "")
    train_split: str = option("folder or split to train on", "train")
    val_split: str = option("folder or split to evaluate on", "validation")
    batch_size: int = option("images per batch in each process", 128, "-b", type=positive, segmentation={"default": 8})
    workers: int = option("processes that load images", min(4, os.cpu_count() or 1), "-j", recorded=False)
    crop_pct: float | None = _classifying("share of the image's side that is kept in evaluation (the model's)", None)
    interpolation: str | None = _classifying("how images are resized in evaluation (the model's)", None)
    mean: tuple[float, ...] | None = option("mean of each channel (the model's)", None)
    std: tuple[float, ...] | None = option("standard deviation of each channel (the model's)", None)

    def preparation(self) -> dict[str, object]:
        """The given preprocessing options, under the names of timm's loader."""
        names = ("crop_pct", "interpolation", "mean", "std")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True, kw_only=True)
class OnDevice:
    """The device."""

    device: Literal["auto", "cpu"] = option("auto: a GPU if there is one", "auto", recorded=False)


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(OnDevice):
    """The device, precision and seed."""

    amp: bool = option("mixed precision", False, action=argparse.BooleanOptionalAction, recorded=False)
    amp_dtype: Literal["bfloat16", "float16"] = option("dtype of mixed precision", "bfloat16", recorded=False)
    seed: int = option("random seed", 0)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model, and the arguments to make it with."""

    model: str = option(_NAMED_MODEL, segmentation={"help": f"{_NAMED_MODEL}, or a published Segmenter's folder"})
    checkpoint: Path | None = option(
        "file with the named model's weights: .safetensors, or what torch.save wrote (.pth, .pth.tar, .ckpt, ...)", None
    )
    pretrained: bool = option("use the named model's pretrained weights, which timm downloads", False)
    num_classes: int | None = option("classes (as many as the data has)", None, type=positive)
    img_size: int | None = option(
        "image size in pixels (the named model's)",
        None,
        type=positive,
        segmentation={"help": "side of the crops and windows in pixels (the named model's)"},
    )
    decoder: str = _segmenting("decoder for the named model", DECODERS[0], choices=DECODERS)
    decoder_kwargs: dict[str, object] = _segmenting(
        "arguments of the mask transformer, such as depth=2 heads=3 drop_path=0.0 dropout=0.1", {}
    )
    in_chans: int | None = _classifying("image channels, 1 or 3 (3)", None, type=positive)
    model_kwargs: dict[str, object] = option(
        "further arguments of timm.create_model, such as depth=6 embed_dim=192", {}
    )

    @property
    def is_folder(self) -> bool:
        return Path(self.model).is_dir()


@dataclass(frozen=True, kw_only=True)
class CompressionOptions:
    """How many tokens are kept, and how a model is compressed."""

    adaptive: bool = option(
        "merge the tokens that are most alike in each image, down to 0.62 of the GMACs or to a target; needs no data",
        False,
    )
    keep_rate: float | None = option("share of all patches to keep as tokens, such as 0.6", None, one_of="budget")
    target_gmacs: float | None = option(
        "use as many tokens as fit into this many GMACs per image", None, one_of="budget"
    )
    target_speedup: float | None = option(
        "use as many tokens as run this many times as fast in inference, measured on this device at --batch-size",
        None,
        one_of="budget",
    )
    prune_rate: float | None = option("share of all patches to skip a block, such as 0.1; the rest is merged", None)
    score_decay: float = option(
        "scores of block l are multiplied by 1 - l * this", 0.025, compress={"flags": ("--layer-decay",)}
    )
    score_batches: int = option("batches to score on", 16, type=positive)
    allocation: Literal["global", "layer"] = option(
        "global: each block finds its own number of tokens; layer: the rates hold in every block", "global"
    )
    row_weights: Literal["sum", "average"] = option(
        "a merged token is the weighted sum (as in the paper) or the average of its patches", "sum"
    )
    segments: Literal["raster", "nearest"] = option(
        "merge into the nearer kept patch in the row (as in the paper) or the nearest one in the grid", "raster"
    )
    stages: list[tuple[int, int]] | None = option(
        "groups of blocks that share merged tokens, such as 3-5,6-8; others stay uncompressed (every block alone)",
        None,
        type=stages_of,
    )
    train_matrices: Literal["support", "dense", "none"] = option(
        "entries of the matrices that fine-tuning changes: the plan's nonzeros, all, or none", "support"
    )
    size_bias: bool = option("attend to merged tokens in proportion to their number of patches", False)
    shortcut: str = option(
        "what skips a block: pruned tokens, as in the paper, or everything that the merge leaves out",
        SHORTCUTS[0],
        choices=SHORTCUTS,
    )
    merge_site: str = option(
        "merge tokens before the block, as in the paper, or inside its attention", MERGE_SITES[0], choices=MERGE_SITES
    )

    @property
    def has_budget(self) -> bool:
        return (self.keep_rate, self.target_gmacs, self.target_speedup) != (None, None, None)

    @property
    def missing(self) -> list[str]:
        """The options that a plan still needs."""
        if self.adaptive:
            return []
        budget = [] if self.has_budget else ["--keep-rate (or --target-gmacs, --target-speedup)"]
        return budget + (["--prune-rate"] if self.prune_rate is None else [])

    def planning(self) -> dict[str, object]:
        """The arguments of :meth:`~pm_models.CompressionPlan.from_scores`, except scores and keep rate."""
        same = ("prune_rate", "allocation", "row_weights", "segments", "stages")
        return {"layer_decay": self.score_decay} | {name: getattr(self, name) for name in same}

    def compressing(self) -> dict[str, object]:
        """The arguments of :func:`pm_models.compress`, except model and plan."""
        values = {name: getattr(self, name) for name in OPTIONS if name != "plan"}
        return values | {"train_matrices": None if self.train_matrices == "none" else self.train_matrices}


_OF_ADAPTIVE = ("adaptive", "target_gmacs", "target_speedup")
STATIC_OPTIONS = tuple(field.name for field in fields(CompressionOptions) if field.name not in _OF_ADAPTIVE)


@dataclass(frozen=True, kw_only=True)
class DistillationOptions:
    """The teacher of a compressed model."""

    teacher: Path | None = option("folder of the uncompressed model (the model before compression)", None)
    distill_alpha: float = option("weight of the distillation loss", 1.0)
    distill_temperature: float = option("temperature of the distillation loss", 20.0)

    def weighting(self) -> dict[str, float]:
        """The arguments of the distillation losses."""
        return {"alpha": self.distill_alpha, "temperature": self.distill_temperature}


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The fields of a :class:`~pm_models.training.Recipe`, the learning rate's scaling, and the losses."""

    epochs: int = option("passes over the data", 100, type=positive, finetune={"default": 30})
    opt: str = option("optimiser, by its name in timm", Recipe.opt)
    sched: str = option("schedule of the learning rate", Recipe.sched, choices=SCHEDULES)
    lr: float | None = option(
        "peak learning rate (from --lr-base, or 0.0005)",
        None,
        finetune={"help": "peak learning rate (from --lr-base, or 0.0001)"},
    )
    lr_base: float | None = option("peak learning rate for --lr-base-size images per step", None, recorded=False)
    lr_base_size: int = option("images per step that --lr-base refers to", 512, type=positive, recorded=False)
    lr_base_scale: Literal["linear", "sqrt"] = option(
        "how the learning rate scales with the images per step", "linear", recorded=False
    )
    warmup_lr: float | None = option(
        "learning rate at the start of warm-up (a thousandth of the peak)", Recipe.warmup_lr
    )
    min_lr: float = option("learning rate at the end", Recipe.min_lr)
    layer_decay: float | None = option("learning rate of a block relative to that of the next (1)", Recipe.layer_decay)
    weight_decay: float = option("weight decay", Recipe.weight_decay, finetune={"default": 1e-3})
    warmup_epochs: int = option("epochs of warm-up", 5, finetune={"default": 0})
    clip_grad: float | None = option("largest gradient norm", Recipe.clip_grad)
    grad_accum_steps: int = option("batches per optimiser step", Recipe.grad_accum_steps, type=positive)
    model_ema: bool = option("evaluate and save a moving average of the weights", False, recorded=False)
    model_ema_decay: float = option("decay of the moving average", 0.9998)
    grad_checkpointing: bool = option("trade time for activation memory", False, recorded=False)
    smoothing: float = _classifying("label smoothing", 0.1, finetune={"default": 0.0})
    mixup: float = _classifying("alpha of mixup; 0: none", Recipe.mixup)
    cutmix: float = _classifying("alpha of cutmix; 0: none", Recipe.cutmix)
    recovery_interval: int = option(
        "also save the state after this many steps within an epoch (%(default)s: only after epochs)", 0, recorded=False
    )
    log_tensorboard: bool = option("also write TensorBoard logs to logs/ in the output folder", False, recorded=False)


_LOADER_NAMES = {
    "aa": "auto_augment",
    "train_interpolation": "interpolation",
    "reprob": "re_prob",
    "remode": "re_mode",
    "recount": "re_count",
}


@dataclass(frozen=True, kw_only=True)
class AugmentationOptions:
    """timm's augmentation of training images, under the names of its ``train.py``."""

    no_aug: bool = option("no augmentation: training images are prepared as in evaluation", False)
    scale: tuple[float, float] | None = option(
        "area of the random crop, as a share of the image (0.08 1)", None, metavar=("MIN", "MAX")
    )
    ratio: tuple[float, float] | None = option(
        "aspect ratio of the random crop (0.75 1.33)", None, metavar=("MIN", "MAX")
    )
    hflip: float = option("probability of a horizontal flip", 0.5)
    vflip: float = option("probability of a vertical flip", 0.0)
    color_jitter: float = option("strength of colour jitter", 0.4)
    aa: str | None = option("augmentation policy, such as rand-m9-mstd0.5-inc1; replaces colour jitter (none)", None)
    train_interpolation: str | None = option("how crops are resized (the model's)", None)
    reprob: float = option("probability of random erasing", 0.0)
    remode: str = option("what erased areas are filled with", "pixel")
    recount: int = option("number of erased areas", 1)

    def loading(self) -> dict[str, object]:
        """The given options, under the names of timm's loader."""
        values = {_LOADER_NAMES.get(field.name, field.name): getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class CropOptions:
    """The augmentation of a Segmenter's training images."""

    scale: tuple[float, float] = option(
        "range of the image's shorter side relative to that of the crop", (0.5, 2.0), metavar=("MIN", "MAX")
    )


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """How a Segmenter handles images that are larger than its own size."""

    stride: int | None = option("pixels from one window to the next (the window's side minus 32)", None, type=positive)
    scales: tuple[float, ...] = option("scales of the image to average over", (1.0,))
    flip: bool = option("average over mirrored images too", False)


# --- Commands on data.


@dataclass(frozen=True, kw_only=True)
class Command:
    """Options that train, compress, finetune and eval have in common."""

    config: str | None = option(
        "YAML file of options, by their long names, or the args.yaml of timm's train.py; options on the command "
        f"line have precedence. Shipped with pm-vit: {', '.join(shipped_configs())}",
        None,
        "-c",
        metavar="FILE",
        recorded=False,
    )
    task: Literal["classification", "segmentation"] = option(
        "one class for each image, or one for each pixel; --help shows the options of the task", DEFAULT_TASK
    )
    data: DataOptions = group("data")
    device: DeviceOptions = group("device")
    model: ModelOptions = group("model")

    @property
    def command(self) -> str:
        return type(self).__name__.lower()

    def values(self) -> dict[str, object]:
        """All options of the task, by name."""
        return {
            name: getattr(self if option.group is None else getattr(self, option.group), name)
            for name, option in options_of(type(self), self.task).items()
        }


@dataclass(frozen=True, kw_only=True)
class Saving(Command):
    """Options of the commands that write a model."""

    output: Path = option("folder to write to", recorded=False)


@dataclass(frozen=True, kw_only=True)
class Train(Saving):
    """Train an uncompressed model on labelled images.

    The model is a timm Vision Transformer, or a Segmenter on one. A model that is trained already is trained further.
    """

    training: TrainingOptions = group("training (a stopped run with the same --output continues)")
    augmentation: AugmentationOptions = group("augmentation, as timm has it", only="classification")
    crops: CropOptions = group("augmentation", only="segmentation")

    def recipe(self, processes: int) -> Recipe:
        """The recipe for a number of processes, which ``--lr-base`` depends on."""
        values, told = self.values(), self.training
        lr = _LEARNING_RATES[self.command] if told.lr is None else told.lr
        if told.lr is None and told.lr_base is not None:
            share = self.data.batch_size * processes * told.grad_accum_steps / told.lr_base_size
            lr = told.lr_base * (share if told.lr_base_scale == "linear" else share**0.5)
        known = {field.name: values[field.name] for field in fields(Recipe) if field.name in values}
        return Recipe(**known | {"lr": lr, "model_ema_decay": told.model_ema_decay if told.model_ema else None})


@dataclass(frozen=True, kw_only=True)
class Compress(Saving):
    """Score a trained model's tokens, plan, and compress it.

    Tokens are scored on training images. The compressed model is saved with its plan and a picture of it; fine-tuning
    comes next. A model that is compressed already is scored as it is, and its plain weights are compressed again. With
    --adaptive nothing is scored: no DATA is needed, and the model is ready for use.
    """

    compression: CompressionOptions = group("compression")

    def __post_init__(self) -> None:
        data, missing = self.data.data_dir, self.compression.missing
        if self.compression.adaptive and data is not None:
            raise ValueError(f"DATA cannot be given with --adaptive, which needs no images, got {data}")
        if not self.compression.adaptive and (missing or data is None):
            missing = ["DATA"] * (data is None) + missing
            raise ValueError(f"the following arguments are required: {', '.join(missing)}; or --adaptive")


@dataclass(frozen=True, kw_only=True)
class Finetune(Train):
    """Fine-tune a compressed model, distilling from the uncompressed one.

    The distillation is soft. An uncompressed model is first compressed, as by pm-vit compress.
    """

    distillation: DistillationOptions = group("distillation")
    compression: CompressionOptions = group("compression, for a --model that is not compressed yet")


@dataclass(frozen=True, kw_only=True)
class Eval(Command):
    """Measure accuracy or mIoU, GMACs and throughput of a model, compressed or not, on labelled images."""

    windows: WindowOptions = group("sliding windows", only="segmentation")
    results_file: Path | None = option("write the results as JSON", None)


# --- Commands without data.


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Try adaptive merging and Prune and Merge on a small ViT for scikit-learn's digits, in minutes on a CPU."""

    output: Path = option("folder to write to", Path("pm-vit-demo"))
    seed: int = option("random seed", 0)


@dataclass(frozen=True, kw_only=True)
class Export(OnDevice):
    """Write a model to a file that runs without pm-vit.

    The file is run to compare its results with the model's, and its speed with that of the uncompressed model's file.
    """

    model: Path = option("a folder saved by pm-vit, or a published Segmenter's")
    format: str = option(
        "onnx: for onnxruntime and others, on the CPU; pt2: for torch.export.load; aoti: compiled for this machine",
        choices=tuple(FORMATS),
    )
    output: Path = option("file to write", metavar="FILE")
    opset: int | None = option(
        f"ONNX opset, {OPSETS[0]} to {OPSETS[-1]}; older runtimes need lower ones (PyTorch's choice)", None
    )
    batch_size: int = option("batch size for timing", 8, "-b", type=positive)


@dataclass(frozen=True, kw_only=True)
class Show:
    """Draw what each block keeps, merges and prunes.

    The plan is printed, and a picture shows which patches are kept, merged (outlined) and pruned, over images if any
    are given. For a model that merges adaptively, a picture for each image shows which patches have merged.
    """

    plan: Path = option("plan.json, or a folder saved by pm-vit", positional="PLAN")
    images: tuple[Path, ...] = option("images to draw, each in a picture of its own", (), positional="IMAGE", nargs="*")
    output: Path = option("picture to write, numbered if there are several", Path("plan.png"))


@dataclass(frozen=True, kw_only=True)
class Bench(OnDevice):
    """Time a model with fewer and fewer tokens in every block; print and draw it beside the compressed model."""

    model: str = option("a timm Vision Transformer's name, or a folder saved by pm-vit", positional="MODEL")
    batch_size: tuple[int, ...] = option("batch sizes", (1, 8), "-b", type=positive)
    output: Path = option("picture to write", Path("latency.png"))
    results_file: Path | None = option("write the times as JSON", None)
    amp: bool = option("bfloat16 mixed precision", False, action=argparse.BooleanOptionalAction)


@dataclass(frozen=True, kw_only=True)
class Report(OnDevice):
    """Write a page about a compressed model: what tokens stand for, and speed and answers beside the dense model's."""

    model: Path = option("a folder that pm-vit compress or finetune wrote", positional="MODEL")
    images: tuple[Path, ...] = option("to look at (one that matplotlib has)", (), positional="IMAGE", nargs="*")
    output: Path = option("page to write", Path("report.html"), metavar="FILE")
    dense: Path | None = option(
        "folder of the dense model to compare with (the model as it was before compression, where MODEL tells)", None
    )
    batch_size: tuple[int, ...] = option("images to time it on", (1, 2, 4, 8), "-b", type=positive)
