"""The command line ``pm-vit``: its options. What the commands do is in :mod:`.commands`."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from timm.utils import ParseKwargs

from . import commands, tools
from .compression import MERGE_SITES, SHORTCUTS
from .config import apply_config, find_task, shipped_configs
from .export import FORMATS
from .segmenter import DECODERS
from .tasks import DEFAULT_TASK, TASKS
from .training import IGNORED, SCHEDULES, launched_processes

_ON_SEVERAL = ("train", "compress", "finetune", "eval")  # processes of a launcher


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``pm-vit``; an error of the user's is one line on standard error and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        parser, named = _parser(find_task(arguments[1:], TASKS, DEFAULT_TASK))
        if arguments and arguments[0] in named:
            apply_config(arguments[0], named, arguments[1:])
    except (ValueError, OSError) as error:
        print(f"pm-vit {arguments[0]}: error: {error}", file=sys.stderr)
        return 2
    options = parser.parse_args(arguments)
    for talkative in ("timm", "onnxscript", "onnx_ir"):
        logging.getLogger(talkative).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            warnings.simplefilter("default", UserWarning)
            if options.command not in _ON_SEVERAL and launched_processes() > 1:
                raise ValueError(f"runs in one process, got {launched_processes()} from the launcher")
            options.run(options)
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        print(f"pm-vit {options.command}: error: {_told(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = "; the same command continues" if options.command in ("train", "finetune") else ""
        print(f"pm-vit {options.command}: interrupted{hint}", file=sys.stderr)
        return 130
    finally:
        # Its threads must not outlive the interpreter.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def _told(error: Exception) -> str:
    """An error's message; of one that a loader's process raised, without the traceback that torch puts before it."""
    text = str(error)
    if not text.startswith("Caught "):
        return text
    return text.strip().splitlines()[-1].removeprefix(f"{type(error).__name__}: ")


def _print_warning(message: Warning, category: type[Warning], *_: object, **__: object) -> None:
    print(f"pm-vit: {'warning' if category is UserWarning else category.__name__}: {message}", file=sys.stderr)


def _parser(task: str) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser for a task, and that of each command that takes ``--config``."""
    parser = argparse.ArgumentParser(
        prog="pm-vit",
        description="Compress the tokens of Vision Transformers by Prune and Merge.",
        epilog="A first look: pm-vit demo. Then, on your images: pm-vit train DATA --model NAME --output DENSE, and "
        "pm-vit finetune DATA --model DENSE --keep-rate 0.6 --prune-rate 0.1 --output TUNED.",
    )
    found = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = found.add_parser(
        "demo",
        help="the whole path on scikit-learn's digits, in a few minutes on a CPU",
        description="Train a small ViT on scikit-learn's digits, compress it, fine-tune it, and compare both.",
    )
    demo.add_argument("--output", type=Path, default=Path("pm-vit-demo"), help="folder to write to (%(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    demo.set_defaults(run=commands.demo)

    train = found.add_parser(
        "train",
        usage="pm-vit train DATA --model MODEL --output OUTPUT [options]",
        help="train an uncompressed model on labelled images",
        description="Train (or go on training) a timm Vision Transformer, or a Segmenter on one, on labelled images.",
    )
    _add_data(train, task)
    _add_model(train, task)
    _add_output(train)
    _add_training(train, task, lr=5e-4, epochs=100, weight_decay=0.05, warmup_epochs=5, smoothing=0.1)
    train.set_defaults(run=commands.train)

    compress = found.add_parser(
        "compress",
        usage="pm-vit compress DATA --model MODEL --keep-rate RATE --prune-rate RATE --output OUTPUT [options]",
        help="score a trained model's tokens, plan, and compress it",
        description="Score the tokens of a trained timm Vision Transformer on training images, make a plan, and save "
        "the compressed model with the plan and its picture. Fine-tuning comes next. A model that is compressed "
        "already is scored as it is, and its plain weights are compressed anew.",
    )
    _add_data(compress, task)
    _add_model(compress, task)
    _add_output(compress)
    _add_compression(compress, required=True)
    compress.set_defaults(run=commands.compress_model)

    finetune = found.add_parser(
        "finetune",
        usage="pm-vit finetune DATA --model MODEL --output OUTPUT [options]",
        help="fine-tune a compressed model, distilling from the uncompressed one",
        description="Fine-tune a compressed model with soft distillation from the uncompressed one. An uncompressed "
        "model is compressed first, as pm-vit compress does it.",
    )
    _add_data(finetune, task)
    _add_model(finetune, task)
    _add_output(finetune)
    finetune.add_argument(
        "--teacher", type=Path, help="folder of the uncompressed model (the model as it was before compression)"
    )
    finetune.add_argument(
        "--distill-alpha", type=float, default=1.0, help="weight of the distillation loss (%(default)s)"
    )
    finetune.add_argument("--distill-temperature", type=float, default=20.0, help="its temperature (%(default)s)")
    _add_compression(finetune, required=False)
    _add_training(finetune, task, lr=1e-4, epochs=30, weight_decay=1e-3, warmup_epochs=0, smoothing=0.0)
    finetune.set_defaults(run=commands.finetune)

    evaluate = found.add_parser(
        "eval",
        usage="pm-vit eval DATA --model MODEL [options]",
        help="accuracy or mIoU, GMACs and throughput of a model",
        description="Evaluate a model, compressed or not, on labelled images.",
    )
    _add_data(evaluate, task)
    _add_model(evaluate, task)
    if task == "segmentation":
        _add_windows(evaluate)
    evaluate.add_argument("--results-file", type=Path, help="write the results as JSON")
    evaluate.set_defaults(run=commands.evaluate_model)

    export = found.add_parser(
        "export",
        usage="pm-vit export --model MODEL --format {onnx,pt2,aoti} --output FILE [options]",
        help="write a model to a file that runs without pm-vit",
        description="Write a model to a file, run it, and tell how its results and its speed differ: from the model's, "
        "and from the same file of the uncompressed model.",
    )
    export.add_argument(
        "--model", type=Path, required=True, help="a folder saved by pm-vit, or a published Segmenter's"
    )
    export.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help="onnx: for onnxruntime and others; pt2: for torch.export.load; aoti: compiled for this machine",
    )
    export.add_argument("--output", type=Path, required=True, help="file to write")
    export.add_argument("-b", "--batch-size", type=_positive, default=8, help="images to time it on (%(default)s)")
    export.add_argument(
        "--device", choices=("auto", "cpu"), default="auto", help="of pt2 and aoti; auto: a GPU if there is one"
    )
    export.set_defaults(run=tools.export)

    show = found.add_parser(
        "show",
        usage="pm-vit show PLAN [IMAGE ...] [options]",
        help="a picture of what each block keeps, merges and prunes",
        description="Print a plan, and draw for each block which patches it keeps, merges (outlined) and prunes, over "
        "images where some are given.",
    )
    show.add_argument("plan", type=Path, metavar="PLAN", help="plan.json, or a folder saved by pm-vit")
    show.add_argument("images", type=Path, nargs="*", metavar="IMAGE", help="drawn under the patches, a picture each")
    show.add_argument(
        "--output", type=Path, default=Path("plan.png"), help="picture to write, numbered where several (%(default)s)"
    )
    show.set_defaults(run=tools.show)

    bench = found.add_parser(
        "bench",
        usage="pm-vit bench MODEL [options]",
        help="tokens against latency on this device",
        description="Time a model on ever fewer tokens in every block, print and draw how much faster it is, and a "
        "compressed model's own speed beside it.",
    )
    bench.add_argument("model", metavar="MODEL", help="a timm Vision Transformer's name, or a folder saved by pm-vit")
    bench.add_argument("-b", "--batch-size", type=_positive, nargs="+", default=[1, 8], help="images (%(default)s)")
    bench.add_argument("--output", type=Path, default=Path("latency.png"), help="picture to write (%(default)s)")
    bench.add_argument("--results-file", type=Path, help="write the times as JSON")
    bench.add_argument("--amp", action=argparse.BooleanOptionalAction, default=False, help="bfloat16 mixed precision")
    bench.add_argument(
        "--device", choices=("auto", "cpu"), default="auto", help="auto: a GPU if there is one (%(default)s)"
    )
    bench.set_defaults(run=tools.bench)
    return parser, {"train": train, "compress": compress, "finetune": finetune, "eval": evaluate}


def _add_data(parser: argparse.ArgumentParser, task: str) -> None:
    parser.add_argument(
        "-c",
        "--config",
        metavar="FILE",
        help="YAML file of options, by their long names, or the args.yaml of timm's train.py; the command line's own "
        f"options come before it. Shipped with pm-vit: {', '.join(shipped_configs())}",
    )
    parser.add_argument(
        "--task",
        choices=TASKS,
        default=DEFAULT_TASK,
        help="one class for each image, or for each pixel; with --help, shows the options of that (%(default)s)",
    )
    segmentation = task == "segmentation"
    group = parser.add_argument_group("data")
    group.add_argument(
        "data_dir",
        type=Path,
        metavar="DATA",
        help="Cityscapes' or ADE20K's folder (annotations/, 150 classes), or one with images/train, labels/train, "
        "images/validation, ..."
        if segmentation
        else "folder with train/CLASS/IMAGES and validation/CLASS/IMAGES, of any kind that Pillow reads",
    )
    if segmentation:
        group.add_argument(
            "--ignore-index",
            type=int,
            default=IGNORED,
            help=f"label of pixels to leave out, as {IGNORED} is (%(default)s)",
        )
    else:
        group.add_argument(
            "--dataset", default="", help="a data set that timm reads instead of folders, such as torch/cifar10"
        )
    group.add_argument("--train-split", default="train", help="folder or split to train on (%(default)s)")
    group.add_argument("--val-split", default="validation", help="folder or split to evaluate on (%(default)s)")
    group.add_argument(
        "-b",
        "--batch-size",
        type=_positive,
        default=8 if segmentation else 128,
        help="images per batch and process (%(default)s)",
    )
    group.add_argument(
        "-j",
        "--workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        help="processes that load images (%(default)s)",
    )
    if not segmentation:
        group.add_argument(
            "--crop-pct", type=float, help="share of the image's side that evaluation sees (the model's)"
        )
        group.add_argument("--interpolation", help="how evaluation resizes images (the model's)")
    group.add_argument("--mean", type=float, nargs="+", help="mean of each channel (the model's)")
    group.add_argument("--std", type=float, nargs="+", help="standard deviation of each channel (the model's)")
    group = parser.add_argument_group("device")
    group.add_argument(
        "--device", choices=("auto", "cpu"), default="auto", help="auto: a GPU if there is one (%(default)s)"
    )
    group.add_argument("--amp", action=argparse.BooleanOptionalAction, default=False, help="mixed precision")
    group.add_argument(
        "--amp-dtype", choices=("bfloat16", "float16"), default="bfloat16", help="its type (%(default)s)"
    )
    group.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")


def _add_model(parser: argparse.ArgumentParser, task: str) -> None:
    segmentation = task == "segmentation"
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        required=True,
        help="a timm Vision Transformer's name (hf-hub:... and local-dir:... too), a folder saved by pm-vit"
        + (", or a published Segmenter's folder" if segmentation else ""),
    )
    group.add_argument(
        "--checkpoint",
        type=Path,
        help="file with the named model's weights: .safetensors, or what torch.save wrote (.pth, .pth.tar, .ckpt, ...)",
    )
    group.add_argument("--pretrained", action="store_true", help="let timm download weights for the named model")
    group.add_argument("--num-classes", type=_positive, help="classes (as many as the data has)")
    group.add_argument(
        "--img-size",
        type=_positive,
        help=f"{'side of the crops and windows' if segmentation else 'image size'} in pixels (the named model's)",
    )
    if segmentation:
        parser.set_defaults(in_chans=None)
        group.add_argument(
            "--decoder", choices=DECODERS, default=DECODERS[0], help="what is on the named model (%(default)s)"
        )
        group.add_argument(
            "--decoder-kwargs",
            nargs="*",
            default={},
            action=ParseKwargs,
            metavar="NAME=VALUE",
            help="of the mask transformer: depth=2 heads=3 drop_path=0.0 dropout=0.1",
        )
    else:
        group.add_argument("--in-chans", type=_positive, help="image channels, 1 or 3 (3)")
    group.add_argument(
        "--model-kwargs",
        nargs="*",
        default={},
        action=ParseKwargs,
        metavar="NAME=VALUE",
        help="more arguments of timm.create_model, such as depth=6 embed_dim=192",
    )


def _add_windows(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sliding windows")
    group.add_argument("--stride", type=_positive, help="pixels from one window to the next (its side less 32)")
    group.add_argument(
        "--scales", type=float, nargs="+", default=[1.0], help="sizes of the image to average over (%(default)s)"
    )
    group.add_argument("--flip", action="store_true", help="average over mirrored images too")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")


def _add_compression(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Without ``--layer-decay`` where training has one of that name."""
    group = parser.add_argument_group("compression", None if required else "of a --model that is not compressed yet")
    budget = group.add_mutually_exclusive_group(required=required)
    budget.add_argument("--keep-rate", type=float, help="share of all patches kept as tokens, such as 0.6")
    budget.add_argument("--target-gmacs", type=float, help="the keep rate with at most so many GMACs an image")
    budget.add_argument(
        "--target-speedup",
        type=float,
        help="the keep rate that is so many times as fast in inference, measured on this device at --batch-size",
    )
    group.add_argument(
        "--prune-rate",
        type=float,
        required=required,
        help="share that skips its block, such as 0.1; the rest is merged",
    )
    group.add_argument(
        "--score-decay",
        *(["--layer-decay"] if required else []),
        type=float,
        default=0.025,
        help="scores of block l times 1 - l * this (%(default)s)",
    )
    group.add_argument("--score-batches", type=_positive, default=16, help="batches to score on (%(default)s)")
    group.add_argument(
        "--allocation",
        choices=("global", "layer"),
        default="global",
        help="global: each block finds its own number of tokens; layer: the rates hold in every block (%(default)s)",
    )
    group.add_argument(
        "--row-weights",
        choices=("sum", "average"),
        default="sum",
        help="a merged token is the weighted sum (the paper) or average of its patches (%(default)s)",
    )
    group.add_argument(
        "--segments",
        choices=("raster", "nearest"),
        default="raster",
        help="merge into the nearer kept patch along the row (the paper) or the nearest in the grid (%(default)s)",
    )
    group.add_argument(
        "--stages",
        type=_stages,
        help="blocks that share merged tokens, such as 3-5,6-8; blocks left out stay uncompressed (each block its own)",
    )
    group.add_argument(
        "--train-matrices",
        choices=("support", "dense", "none"),
        default="support",
        help="what fine-tuning may change of the matrices: the plan's nonzeros, all entries, nothing (%(default)s)",
    )
    group.add_argument(
        "--size-bias", action="store_true", help="attend in proportion to the patches that a token stands for"
    )
    group.add_argument(
        "--shortcut",
        choices=SHORTCUTS,
        default="pruned",
        help="what skips a block: pruned tokens, as in the paper, or all that the merge leaves out (%(default)s)",
    )
    group.add_argument(
        "--merge-site",
        choices=MERGE_SITES,
        default="block",
        help="merge tokens before the block, as in the paper, or inside its attention (%(default)s)",
    )


def _add_training(
    parser: argparse.ArgumentParser,
    task: str,
    *,
    lr: float,
    epochs: int,
    weight_decay: float,
    warmup_epochs: int,
    smoothing: float,
) -> None:
    parser.set_defaults(default_lr=lr)
    group = parser.add_argument_group("training (a stopped run with the same --output continues)")
    group.add_argument("--epochs", type=_positive, default=epochs, help="passes over the data (%(default)s)")
    group.add_argument("--opt", default="adamw", help="timm's name of the optimiser (%(default)s)")
    group.add_argument(
        "--sched", choices=SCHEDULES, default=SCHEDULES[0], help="how the learning rate falls (%(default)s)"
    )
    group.add_argument("--lr", type=float, help=f"peak learning rate (from --lr-base, or {lr:g})")
    group.add_argument("--lr-base", type=float, help="peak learning rate for --lr-base-size images a step")
    group.add_argument(
        "--lr-base-size", type=_positive, default=512, help="images a step that --lr-base is for (%(default)s)"
    )
    group.add_argument(
        "--lr-base-scale",
        choices=("linear", "sqrt"),
        default="linear",
        help="how the learning rate grows with the images a step (%(default)s)",
    )
    group.add_argument("--warmup-lr", type=float, help="learning rate that warm-up begins with (a thousandth)")
    group.add_argument("--min-lr", type=float, default=0.0, help="learning rate at the end (%(default)s)")
    group.add_argument("--layer-decay", type=float, help="learning rate of a block over that of the next (1)")
    group.add_argument("--weight-decay", type=float, default=weight_decay, help="weight decay (%(default)s)")
    group.add_argument("--warmup-epochs", type=int, default=warmup_epochs, help="epochs of warm-up (%(default)s)")
    group.add_argument("--clip-grad", type=float, default=1.0, help="largest gradient norm (%(default)s)")
    group.add_argument("--grad-accum-steps", type=_positive, default=1, help="batches that make one step (%(default)s)")
    group.add_argument("--model-ema", action="store_true", help="evaluate and save a moving average of the weights")
    group.add_argument("--model-ema-decay", type=float, default=0.9998, help="its decay (%(default)s)")
    group.add_argument("--grad-checkpointing", action="store_true", help="trade time for activation memory")
    if task == "classification":
        group.add_argument("--smoothing", type=float, default=smoothing, help="label smoothing (%(default)s)")
    group.add_argument(
        "--recovery-interval",
        type=int,
        default=0,
        help="also keep the state after every so many steps of an epoch (%(default)s: after epochs alone)",
    )
    group.add_argument("--log-tensorboard", action="store_true", help="also write the output folder's logs/")
    if task == "segmentation":
        group = parser.add_argument_group("augmentation")
        group.add_argument(
            "--scale",
            type=float,
            nargs=2,
            metavar=("MIN", "MAX"),
            default=[0.5, 2.0],
            help="shorter side of the image over that of the crop, at random (%(default)s)",
        )
        return
    group = parser.add_argument_group("augmentation, as timm has it")
    group.add_argument("--no-aug", action="store_true", help="none: training images are prepared as in evaluation")
    group.add_argument("--scale", type=float, nargs=2, metavar=("MIN", "MAX"), help="area of the random crop (0.08 1)")
    group.add_argument("--ratio", type=float, nargs=2, metavar=("MIN", "MAX"), help="its aspect ratio (0.75 1.33)")
    group.add_argument("--hflip", type=float, default=0.5, help="probability of a flip left to right (%(default)s)")
    group.add_argument("--vflip", type=float, default=0.0, help="probability of a flip upside down (%(default)s)")
    group.add_argument("--color-jitter", type=float, default=0.4, help="strength of colour jitter (%(default)s)")
    group.add_argument("--aa", help="policy, such as rand-m9-mstd0.5-inc1; takes the place of colour jitter (none)")
    group.add_argument("--train-interpolation", help="how crops are resized (the model's)")
    group.add_argument("--reprob", type=float, default=0.0, help="probability of random erasing (%(default)s)")
    group.add_argument("--remode", default="pixel", help="what is put there (%(default)s)")
    group.add_argument("--recount", type=int, default=1, help="how many areas are erased (%(default)s)")
    group.add_argument("--mixup", type=float, default=0.0, help="alpha of mixup; 0: none (%(default)s)")
    group.add_argument("--cutmix", type=float, default=0.0, help="alpha of cutmix; 0: none (%(default)s)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _stages(text: str) -> list[tuple[int, int]]:
    """``3-5,6-11`` as [(3, 5), (6, 11)]; a single block may stand alone."""
    try:
        return [tuple(int(block) for block in (part.split("-") * 2)[:2]) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected blocks such as 0-2,3-5,6, got {text!r}") from None
