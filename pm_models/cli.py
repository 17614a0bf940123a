"""The command line ``pm-vit``."""

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from timm.utils import ParseKwargs
from torch.utils.data import Dataset
from tqdm import tqdm

from .budget import fit_gmacs, fit_speedup
from .checkpoints import CONFIG_NAME, load_pretrained, load_state_file, save_pretrained
from .data import calibration_loader, check_classes, class_names, input_size, make_loader, open_dataset
from .files import write_atomically
from .measure import count_gmacs, throughput
from .plan import CompressionPlan
from .report import compare
from .scoring import score_tokens
from .training import Recipe, classification_task, distillation_task, evaluate, fit, make_accelerator
from .vision_transformer import MERGE_SITES, PMVisionTransformer, check_vision_transformer, compress
from .visualize import save_plan_picture

_STATE = "state"
_SUMMARY = "training.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``pm-vit``; an error of the user's is one line on standard error and exit status 2."""
    options = _parser().parse_args(arguments)
    logging.getLogger("timm").setLevel(logging.ERROR)
    try:
        options.run(options)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"pm-vit {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = "; the same command continues" if options.command in ("train", "finetune") else ""
        print(f"pm-vit {options.command}: interrupted{hint}", file=sys.stderr)
        return 130
    return 0


def _demo(options: argparse.Namespace) -> None:
    from .demo import run_demo  # scikit-learn is read for the demo alone

    run_demo(options.output, seed=options.seed)


def _train(options: argparse.Namespace) -> None:
    accelerator = _accelerator(options)
    _check_output(options.output)
    model, (train_set, eval_set) = _model_and_data(options, options.train_split, options.val_split)
    check_vision_transformer(model)
    _fit_and_save(
        options, accelerator, model, classification_task(model, smoothing=options.smoothing), train_set, eval_set
    )


def _compress(options: argparse.Namespace) -> None:
    accelerator = _accelerator(options)
    _check_output(options.output)
    model, (train_set,) = _model_and_data(options, options.train_split)
    check_vision_transformer(model)
    model.to(accelerator.device)
    loader = calibration_loader(
        train_set,
        model,
        batches=options.score_batches,
        batch_size=options.batch_size,
        workers=options.workers,
        seed=options.seed,
    )
    make_plan = partial(
        CompressionPlan.from_scores,
        grid=tuple(model.patch_embed.grid_size),
        prune_rate=options.prune_rate,
        layer_decay=options.layer_decay,
        num_prefix_tokens=model.num_prefix_tokens,
        allocation=options.allocation,
        row_weights=options.row_weights,
        stages=options.stages,
    )
    make_model = partial(
        compress,
        model,
        train_matrices=None if options.train_matrices == "none" else options.train_matrices,
        size_bias=options.size_bias,
        merge_site=options.merge_site,
    )
    # Wrong rates are told before the scoring.
    make_plan(torch.ones(len(model.blocks), model.patch_embed.num_patches), keep_rate=options.keep_rate or 1e-6)
    batches = len(range(accelerator.process_index, min(options.score_batches, len(loader)), accelerator.num_processes))
    bar = tqdm(
        accelerator.prepare(loader), "score", leave=False, total=batches, disable=not accelerator.is_main_process
    )
    with accelerator.autocast():
        scores = score_tokens(model, bar, batches=batches)
        if not accelerator.is_main_process:
            return
        plan = _plan(options, model, partial(make_plan, scores), make_model, accelerator.device)
    compressed = make_model(plan)
    save_pretrained(compressed, options.output, model_args=options.model_kwargs)
    plan.save(options.output / "plan.json")
    save_plan_picture(plan, options.output / "plan.png")
    size = input_size(model)
    before, after = count_gmacs(model, size), count_gmacs(compressed, size)
    print(plan)
    print(f"GMACs per image: {before:.4g} before, {after:.4g} after ({after / before:.1%})")
    print(f"compressed model: {options.output}; next: pm-vit finetune {options.data_dir} --model {options.output}")


def _plan(
    options: argparse.Namespace,
    model: VisionTransformer,
    make_plan: Callable[..., CompressionPlan],
    make_model: Callable[[CompressionPlan], PMVisionTransformer],
    device: torch.device,
) -> CompressionPlan:
    """The plan of the keep rate, or of the budget, that was asked for."""
    if options.keep_rate is not None:
        return make_plan(keep_rate=options.keep_rate)

    def by_rate(keep_rate: float) -> CompressionPlan:
        return make_plan(keep_rate=keep_rate)

    model.eval()
    if options.target_gmacs is not None:
        fit_ = fit_gmacs(model, by_rate, make_model, options.prune_rate, options.target_gmacs)
        print(f"keep rate {fit_.keep_rate:.3f} for {options.target_gmacs:g} GMACs: {fit_.value:.4g}")
    else:
        images = torch.randn(options.batch_size, *input_size(model), device=device)
        fit_ = fit_speedup(model, by_rate, make_model, options.prune_rate, options.target_speedup, images)
        print(
            f"keep rate {fit_.keep_rate:.3f} for {options.target_speedup:g} times the speed: {fit_.value:.3f} times, "
            f"measured at batch {options.batch_size} on {device.type}"
        )
    return fit_.plan


def _finetune(options: argparse.Namespace) -> None:
    accelerator = _accelerator(options)
    _check_output(options.output)
    model = load_pretrained(options.model)
    if not isinstance(model, PMVisionTransformer):
        raise ValueError(f"{options.model} holds an uncompressed model; run pm-vit compress first, or pm-vit train")
    train_set, eval_set = _datasets(options, (options.train_split, options.val_split), model.in_chans)
    check_classes(train_set, model)
    teacher = _teacher(options, model)
    task = distillation_task(model, teacher, alpha=options.distill_alpha, temperature=options.distill_temperature)
    model.set_grad_checkpointing(options.grad_checkpointing)
    _fit_and_save(options, accelerator, model, task, train_set, eval_set)


def _eval(options: argparse.Namespace) -> None:
    accelerator = _accelerator(options)
    model, (eval_set,) = _model_and_data(options, options.val_split)
    model.to(accelerator.device).eval()
    loader = make_loader(eval_set, model, batch_size=options.batch_size, workers=options.workers)
    result = evaluate(model, accelerator.prepare(loader), accelerator=accelerator)
    if not accelerator.is_main_process:
        return
    size = input_size(model)
    images = torch.randn(options.batch_size, *size, device=accelerator.device)
    with accelerator.autocast():
        speed = throughput({"model": model}, images, rounds=5)["model"]
    result |= {
        "model": str(options.model),
        "gmacs": count_gmacs(model, size),
        "param_count": sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        "samples_per_sec": speed,
    }
    print(
        f"top-1 {result['top1']:.2f}%, top-5 {result['top5']:.2f}%, loss {result['loss']:.4f} on {result['images']} "
        f"images; {result['gmacs']:.4g} GMACs, {result['param_count']:.2f} M parameters, {speed:.0f} images/s at batch "
        f"{options.batch_size} on {accelerator.device.type}"
    )
    if options.results_file is not None:
        write_atomically(options.results_file, json.dumps(result, indent=2).encode())


def _fit_and_save(
    options: argparse.Namespace,
    accelerator: Accelerator,
    model: VisionTransformer,
    task: torch.nn.Module,
    train_set: Dataset,
    eval_set: Dataset,
) -> None:
    """Train the task's model, continuing a stopped run, and save it with its results."""
    recipe = Recipe(
        epochs=options.epochs,
        lr=options.lr,
        weight_decay=options.weight_decay,
        warmup_epochs=options.warmup_epochs,
        clip_grad=options.clip_grad,
        seed=options.seed,
    )
    train_loader = make_loader(
        train_set,
        model,
        batch_size=options.batch_size,
        workers=options.workers,
        training=True,
        seed=options.seed,
        auto_augment=options.aa,
        re_prob=options.reprob,
    )
    eval_loader = make_loader(eval_set, model, batch_size=options.batch_size, workers=options.workers)
    results = fit(
        task,
        train_loader,
        eval_loader,
        recipe,
        accelerator=accelerator,
        state_dir=options.output / _STATE,
        recovery_interval=options.recovery_interval,
        name=options.command,
    )
    model = task.trainable_module.eval()
    models, top1 = {options.command: model}, {options.command: results[-1].top1}
    if isinstance(model, PMVisionTransformer):
        teacher = task.teacher.model.eval()
        models = {"dense": teacher, **models}
        top1["dense"] = evaluate(teacher, accelerator.prepare(eval_loader), accelerator=accelerator)["top1"]
    if not accelerator.is_main_process:
        return
    summary = {"command": options.command, "recipe": asdict(recipe), "epochs": [asdict(result) for result in results]}
    write_atomically(options.output / _SUMMARY, json.dumps(summary, indent=2).encode())
    # Last, as the model's configuration is what tells a finished run from one to continue.
    save_pretrained(model, options.output, model_args=getattr(options, "model_kwargs", None))
    for state in (_STATE, f"{_STATE}.old"):  # the model is saved: nothing is left to continue
        shutil.rmtree(options.output / state, ignore_errors=True)
    _print_comparison(options, accelerator, models, top1)
    print(f"model: {options.output}")


def _print_comparison(
    options: argparse.Namespace,
    accelerator: Accelerator,
    models: dict[str, VisionTransformer],
    top1: dict[str, float],
) -> None:
    size = input_size(models[options.command])
    images = torch.randn(options.batch_size, *size, device=accelerator.device)
    with accelerator.autocast():
        speed = throughput(models, images, rounds=5)
    rows = {}
    for name, model in models.items():
        plan = getattr(model, "plan", None)
        rows[name] = {
            "top1": top1[name],
            "gmacs": count_gmacs(model, size),
            "images_per_second": speed[name],
            "tokens": _dense_tokens(model) if plan is None else plan.tokens,
        }
    print(compare(rows))


def _dense_tokens(model: VisionTransformer) -> list[int]:
    return [model.patch_embed.num_patches + model.num_prefix_tokens] * len(model.blocks)


def _accelerator(options: argparse.Namespace) -> Accelerator:
    set_seed(options.seed)  # of a new model's weights
    precision = {"bfloat16": "bf16", "float16": "fp16"}[options.amp_dtype] if options.amp else "no"
    return make_accelerator(mixed_precision=precision, cpu=options.device == "cpu")


def _datasets(options: argparse.Namespace, splits: Sequence[str], in_chans: int) -> list[Dataset]:
    return [open_dataset(options.data_dir, split, dataset=options.dataset, in_chans=in_chans) for split in splits]


def _model_and_data(options: argparse.Namespace, *splits: str) -> tuple[VisionTransformer, list[Dataset]]:
    """The model that ``--model`` names, a saved folder or one of timm's names, and the data's splits."""
    if (Path(options.model) / CONFIG_NAME).is_file():
        model = load_pretrained(options.model)
        datasets = _datasets(options, splits, model.in_chans)
    else:
        if not timm.is_model(options.model):
            similar = timm.list_models(f"*{options.model}*")[:3]
            hint = f"; did you mean {', '.join(similar)}?" if similar else ""
            raise ValueError(f"--model {options.model} is neither a saved folder nor a timm model{hint}")
        datasets = _datasets(options, splits, options.in_chans or 3)
        model = _named_model(options, class_names(datasets[0]))
    for dataset in datasets:
        check_classes(dataset, model)
    return model, datasets


def _named_model(options: argparse.Namespace, classes: list[str] | None) -> VisionTransformer:
    """The timm model that ``--model`` names, with the weights of ``--checkpoint``."""
    arguments = {
        "num_classes": options.num_classes or (len(classes) if classes else None),
        "img_size": options.img_size,
        "in_chans": options.in_chans,
        **options.model_kwargs,
    }
    model = timm.create_model(
        options.model,
        pretrained=options.pretrained,
        **{name: value for name, value in arguments.items() if value is not None},
    )
    check_vision_transformer(model)
    if options.checkpoint is not None:
        weights = load_state_file(options.checkpoint)
        try:
            model.load_state_dict(checkpoint_filter_fn(weights, model))
        except (RuntimeError, KeyError, AttributeError) as error:
            raise ValueError(f"{options.checkpoint} does not hold the weights of {options.model}: {error}") from error
    return model


def _teacher(options: argparse.Namespace, model: PMVisionTransformer) -> VisionTransformer:
    """The uncompressed model to distil from; by default the model as it was before compression."""
    if options.teacher is not None:
        teacher = load_pretrained(options.teacher)
        if teacher.num_classes != model.num_classes:
            raise ValueError(
                f"--teacher {options.teacher} has {teacher.num_classes} classes, the model has {model.num_classes}"
            )
        return teacher
    if (Path(options.model) / _SUMMARY).is_file():
        raise ValueError(
            f"{options.model} is fine-tuned already: its weights are no longer those of the uncompressed model; "
            "name the uncompressed model's folder with --teacher"
        )
    return load_pretrained(options.model, uncompressed=True)


def _check_output(output: Path) -> None:
    if (output / CONFIG_NAME).exists():
        raise FileExistsError(f"{output} holds a finished model; choose another --output, or delete it")
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"--output {output} is a file, expected a folder or nothing")


def _stages(text: str) -> list[tuple[int, int]]:
    """``3-5,6-11`` as [(3, 5), (6, 11)]; a single block may stand alone."""
    try:
        return [tuple(int(block) for block in (part.split("-") * 2)[:2]) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected blocks such as 0-2,3-5,6, got {text!r}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pm-vit",
        description="Compress the tokens of Vision Transformers by Prune and Merge.",
        epilog="A first look: pm-vit demo. Then, on your images: pm-vit compress DATA --model NAME --checkpoint FILE "
        "--output DIR, and pm-vit finetune DATA --model DIR --output DIR2.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="the whole path on scikit-learn's digits, in a few minutes on a CPU",
        description="Train a small ViT on scikit-learn's digits, compress it, fine-tune it, and compare both.",
    )
    demo.add_argument("--output", type=Path, default=Path("pm-vit-demo"), help="folder to write to (%(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    demo.set_defaults(run=_demo)

    train = commands.add_parser(
        "train",
        help="train an uncompressed model on labelled images",
        description="Train (or go on training) a timm Vision Transformer on labelled images.",
    )
    _add_data(train)
    _add_model(train)
    _add_training(train, epochs=100, lr=5e-4, weight_decay=0.05, warmup=5)
    train.add_argument("--smoothing", type=float, default=0.1, help="label smoothing (%(default)s)")
    train.set_defaults(run=_train)

    compress_ = commands.add_parser(
        "compress",
        help="score a trained model's tokens, plan, and compress it",
        description="Score the tokens of a trained timm Vision Transformer on training images, make a plan, and save "
        "the compressed model with the plan and its picture. Fine-tuning comes next.",
    )
    _add_data(compress_)
    _add_model(compress_)
    _add_output(compress_)
    budget = compress_.add_mutually_exclusive_group(required=True)
    budget.add_argument("--keep-rate", type=float, help="share of all patches kept as tokens, such as 0.6")
    budget.add_argument("--target-gmacs", type=float, help="the keep rate with at most so many GMACs an image")
    budget.add_argument(
        "--target-speedup",
        type=float,
        help="the keep rate that is so many times as fast in inference, measured on this device at --batch-size",
    )
    compress_.add_argument(
        "--prune-rate", type=float, required=True, help="share that skips its block, such as 0.1; the rest is merged"
    )
    compress_.add_argument(
        "--layer-decay", type=float, default=0.025, help="scores of block l times 1 - l * this (%(default)s)"
    )
    compress_.add_argument("--score-batches", type=int, default=16, help="batches to score on (%(default)s)")
    compress_.add_argument(
        "--allocation",
        choices=("global", "layer"),
        default="global",
        help="global: each block finds its own number of tokens; layer: the rates hold in every block (%(default)s)",
    )
    compress_.add_argument(
        "--row-weights",
        choices=("sum", "average"),
        default="sum",
        help="a merged token is the weighted sum (the paper) or average of its patches (%(default)s)",
    )
    compress_.add_argument(
        "--stages",
        type=_stages,
        help="blocks that share merged tokens, such as 3-5,6-8; blocks left out stay uncompressed (each block its own)",
    )
    compress_.add_argument(
        "--train-matrices",
        choices=("support", "dense", "none"),
        default="support",
        help="what fine-tuning may change of the matrices: the plan's nonzeros, all entries, nothing (%(default)s)",
    )
    compress_.add_argument(
        "--size-bias", action="store_true", help="attend in proportion to the patches that a token stands for"
    )
    compress_.add_argument(
        "--merge-site",
        choices=MERGE_SITES,
        default="block",
        help="merge tokens before the block, as in the paper, or inside its attention (%(default)s)",
    )
    compress_.set_defaults(run=_compress)

    finetune = commands.add_parser(
        "finetune",
        help="fine-tune a compressed model, distilling from the uncompressed one",
        description="Fine-tune a compressed model with soft distillation from the uncompressed one.",
    )
    _add_data(finetune)
    finetune.add_argument("--model", required=True, help="folder that pm-vit compress wrote")
    finetune.add_argument(
        "--teacher", type=Path, help="folder of the uncompressed model (the model as it was before compression)"
    )
    finetune.add_argument(
        "--distill-alpha", type=float, default=1.0, help="weight of the distillation loss (%(default)s)"
    )
    finetune.add_argument("--distill-temperature", type=float, default=20.0, help="its temperature (%(default)s)")
    finetune.add_argument("--grad-checkpointing", action="store_true", help="trade time for activation memory")
    _add_training(finetune, epochs=30, lr=1e-4, weight_decay=1e-3, warmup=0)
    finetune.set_defaults(run=_finetune)

    evaluate_ = commands.add_parser(
        "eval",
        help="accuracy, GMACs and throughput of a model",
        description="Evaluate a model, compressed or not, on labelled images.",
    )
    _add_data(evaluate_)
    _add_model(evaluate_)
    evaluate_.add_argument("--results-file", type=Path, help="write the results as JSON")
    evaluate_.set_defaults(run=_eval)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "data_dir", type=Path, metavar="DATA", help="folder with train/CLASS/IMAGES and validation/CLASS/IMAGES"
    )
    group.add_argument(
        "--dataset", default="", help="a data set that timm reads instead of folders, such as torch/cifar10"
    )
    group.add_argument("--train-split", default="train", help="folder or split to train on (%(default)s)")
    group.add_argument("--val-split", default="validation", help="folder or split to evaluate on (%(default)s)")
    group.add_argument("-b", "--batch-size", type=_positive, default=128, help="images per batch (%(default)s)")
    group.add_argument(
        "-j",
        "--workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        help="processes that load images (%(default)s)",
    )
    group = parser.add_argument_group("device")
    group.add_argument(
        "--device", choices=("auto", "cpu"), default="auto", help="auto: a GPU if there is one (%(default)s)"
    )
    group.add_argument("--amp", action="store_true", help="mixed precision")
    group.add_argument(
        "--amp-dtype", choices=("bfloat16", "float16"), default="bfloat16", help="its type (%(default)s)"
    )
    group.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, help="a timm Vision Transformer's name, or a folder saved by pm-vit")
    group.add_argument("--checkpoint", type=Path, help="file with the named model's weights (.safetensors or .pth)")
    group.add_argument("--pretrained", action="store_true", help="let timm download weights for the named model")
    group.add_argument("--num-classes", type=_positive, help="classes (as many as the data has)")
    group.add_argument("--img-size", type=_positive, help="image size in pixels (the named model's)")
    group.add_argument("--in-chans", type=_positive, help="image channels, 1 or 3 (3)")
    group.add_argument(
        "--model-kwargs",
        nargs="*",
        default={},
        action=ParseKwargs,
        metavar="NAME=VALUE",
        help="more arguments of timm.create_model, such as depth=6 embed_dim=192",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")


def _add_training(parser: argparse.ArgumentParser, *, epochs: int, lr: float, weight_decay: float, warmup: int) -> None:
    _add_output(parser)
    group = parser.add_argument_group("training (a stopped run with the same --output continues)")
    group.add_argument("--epochs", type=_positive, default=epochs, help="passes over the data (%(default)s)")
    group.add_argument("--lr", type=float, default=lr, help="peak learning rate of AdamW (%(default)s)")
    group.add_argument("--weight-decay", type=float, default=weight_decay, help="weight decay (%(default)s)")
    group.add_argument("--warmup-epochs", type=int, default=warmup, help="epochs of warm-up (%(default)s)")
    group.add_argument("--clip-grad", type=float, default=1.0, help="largest gradient norm (%(default)s)")
    group.add_argument(
        "--recovery-interval",
        type=int,
        default=0,
        help="also keep the state after every so many steps of an epoch (%(default)s: after epochs alone)",
    )
    group.add_argument("--aa", help="timm's augmentation policy, such as rand-m9-mstd0.5-inc1 (none)")
    group.add_argument("--reprob", type=float, default=0.0, help="probability of random erasing (%(default)s)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
