"""What each command of ``pm-vit`` does with its options."""

import argparse
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch.utils.data import Dataset
from tqdm import tqdm

from .budget import fit_gmacs, fit_speedup
from .checkpoints import CONFIG_NAME, load_pretrained, load_state_file, save_pretrained
from .data import (
    calibration_loader,
    check_classes,
    check_same_classes,
    class_names,
    input_size,
    make_loader,
    open_dataset,
    sample_images,
)
from .files import write_atomically
from .measure import count_gmacs, throughput
from .plan import CompressionPlan
from .report import compare
from .scoring import score_tokens
from .segmenter import Segmenter
from .training import Recipe, classification_task, distillation_task, evaluate, fit, make_accelerator
from .vision_transformer import PMVisionTransformer, check_vision_transformer, compress
from .visualize import save_accuracy_picture, save_plan_picture

_STATE = "state"
_SUMMARY = "training.json"
_COMPRESSED = "compressed"
_PICTURED_IMAGES = 3


def demo(options: argparse.Namespace) -> None:
    from .demo import run_demo  # scikit-learn is read for the demo alone

    run_demo(options.output, seed=options.seed)


def train(options: argparse.Namespace) -> None:
    _check_output(options.output)
    accelerator = _accelerator(options)
    model, (train_set, eval_set) = _model_and_data(options, options.train_split, options.val_split)
    check_vision_transformer(model)
    task = classification_task(model, smoothing=options.smoothing)
    _fit_and_save(options, accelerator, model, task, train_set, eval_set)


def compress_model(options: argparse.Namespace) -> None:
    _check_output(options.output)
    accelerator = _accelerator(options)
    model, (train_set,) = _model_and_data(options, options.train_split)
    _compress_into(options, accelerator, model, train_set, options.output)
    accelerator.print(
        f"compressed model: {options.output}; next: pm-vit finetune {options.data_dir} --model {options.output}"
    )


def finetune(options: argparse.Namespace) -> None:
    _check_output(options.output)
    accelerator = _accelerator(options)
    model, (train_set, eval_set) = _model_and_data(options, options.train_split, options.val_split)
    source = options.model
    if not isinstance(model, PMVisionTransformer):
        source = options.output / _COMPRESSED
        if not (source / CONFIG_NAME).is_file():
            _check_compression(options)
            _compress_into(options, accelerator, model, train_set, source)
        accelerator.wait_for_everyone()
        model = load_pretrained(source)
    teacher = _teacher(options, model, source)
    task = distillation_task(
        model,
        teacher,
        alpha=options.distill_alpha,
        temperature=options.distill_temperature,
        smoothing=options.smoothing,
    )
    model.set_grad_checkpointing(options.grad_checkpointing)
    _fit_and_save(options, accelerator, model, task, train_set, eval_set)


def evaluate_model(options: argparse.Namespace) -> None:
    accelerator = _accelerator(options)
    model, (eval_set,) = _model_and_data(options, options.val_split)
    model.to(accelerator.device).eval()
    loader = make_loader(eval_set, model, **_loading(options))
    _warn_of_random_weights(options)
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


def _compress_into(
    options: argparse.Namespace,
    accelerator: Accelerator,
    model: VisionTransformer,
    train_set: Dataset,
    output: Path,
) -> None:
    """Score the model's tokens, plan by the rates or the budget asked for, and save the compressed model and its plan.

    Every process scores its share of the batches; the first one saves.
    """
    again = isinstance(model, PMVisionTransformer)
    plain = model.uncompressed() if again else model
    check_vision_transformer(plain)
    for part in (model, plain):
        part.to(accelerator.device)
    loader = calibration_loader(
        train_set,
        plain,
        batches=options.score_batches,
        seed=options.seed,
        **_loading(options),
    )
    make_plan = partial(
        CompressionPlan.from_scores,
        grid=tuple(plain.patch_embed.grid_size),
        prune_rate=options.prune_rate,
        layer_decay=options.score_decay,
        num_prefix_tokens=plain.num_prefix_tokens,
        allocation=options.allocation,
        row_weights=options.row_weights,
        segments=options.segments,
        stages=options.stages,
    )
    make_model = partial(
        compress,
        plain,
        train_matrices=None if options.train_matrices == "none" else options.train_matrices,
        size_bias=options.size_bias,
        merge_site=options.merge_site,
    )
    # Wrong rates are told before the scoring.
    make_plan(torch.ones(len(plain.blocks), plain.patch_embed.num_patches), keep_rate=options.keep_rate or 1e-6)
    _warn_of_random_weights(options)
    batches = len(range(accelerator.process_index, min(options.score_batches, len(loader)), accelerator.num_processes))
    bar = tqdm(
        accelerator.prepare(loader), "score", leave=False, total=batches, disable=not accelerator.is_main_process
    )
    with accelerator.autocast():
        scores = score_tokens(model, bar, batches=batches)
        if not accelerator.is_main_process:
            return
        plan = _plan(options, plain, partial(make_plan, scores), make_model, accelerator.device)
    compressed = make_model(plan)
    output.mkdir(parents=True, exist_ok=True)
    if again:  # its plain weights were trained to be compressed: no teacher
        _write_json(output / _SUMMARY, {"command": "compress", "model": str(options.model)})
    plan.save(output / "plan.json")
    save_plan_picture(plan, output / "plan.png")
    save_pretrained(compressed, output, model_args=_model_args(options))
    size = input_size(plain)
    before, after = count_gmacs(plain, size), count_gmacs(compressed, size)
    print(plan)
    print(f"GMACs per image: {before:.4g} before, {after:.4g} after ({after / before:.1%})")


def _check_compression(options: argparse.Namespace) -> None:
    """What compressing needs, told before the scoring."""
    if options.prune_rate is None or (options.keep_rate, options.target_gmacs, options.target_speedup) == (None,) * 3:
        raise ValueError(
            f"{options.model} is uncompressed: give --keep-rate (or --target-gmacs, --target-speedup) and "
            "--prune-rate, or a folder that pm-vit compress wrote"
        )


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
        lr=_learning_rate(options, accelerator.num_processes),
        weight_decay=options.weight_decay,
        warmup_epochs=options.warmup_epochs,
        warmup_lr=options.warmup_lr,
        min_lr=options.min_lr,
        clip_grad=options.clip_grad,
        opt=options.opt,
        layer_decay=options.layer_decay,
        grad_accum_steps=options.grad_accum_steps,
        model_ema_decay=options.model_ema_decay if options.model_ema else None,
        mixup=options.mixup,
        cutmix=options.cutmix,
        seed=options.seed,
    )
    train_loader = make_loader(
        train_set, model, training=True, seed=options.seed, **_loading(options) | _augmentation(options)
    )
    eval_loader = make_loader(eval_set, model, **_loading(options))
    results = fit(
        task,
        train_loader,
        eval_loader,
        recipe,
        accelerator=accelerator,
        state_dir=options.output / _STATE,
        recovery_interval=options.recovery_interval,
        summary=options.output / "summary.csv",
        name=options.command,
    )
    model = task.trainable_module.eval()
    models, top1 = {options.command: model}, {options.command: results[-1].top1}
    if isinstance(model, PMVisionTransformer):
        teacher = task.teacher.model.eval()
        models = {"dense": teacher, **models}
        top1["dense"] = evaluate(teacher, accelerator.prepare(eval_loader), accelerator=accelerator)["top1"]
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    summary = {"command": options.command, "recipe": asdict(recipe), "epochs": [asdict(result) for result in results]}
    rows = _compared(options, accelerator, models, top1)
    if isinstance(model, PMVisionTransformer):
        _save_pictures(options, model, eval_set, rows)
    _write_json(options.output / _SUMMARY, summary | {"models": rows})
    # Last, as the model's configuration is what tells a finished run from one to continue.
    save_pretrained(model, options.output, model_args=_model_args(options))
    for state in (_STATE, f"{_STATE}.old"):  # the model is saved: nothing is left to continue
        shutil.rmtree(options.output / state, ignore_errors=True)
    print(compare(rows))
    print(f"model: {options.output}")


def _learning_rate(options: argparse.Namespace, processes: int) -> float:
    """``--lr``; else ``--lr-base``, by the images of a step; else the command's own."""
    if options.lr is not None:
        return options.lr
    if options.lr_base is None:
        return options.default_lr
    share = options.batch_size * processes * options.grad_accum_steps / options.lr_base_size
    return options.lr_base * (share if options.lr_base_scale == "linear" else share**0.5)


def _preprocessing(options: argparse.Namespace) -> dict[str, object]:
    """What was said of preparing images, for timm's loader."""
    found = {name: getattr(options, name) for name in ("crop_pct", "interpolation", "mean", "std")}
    return {name: value for name, value in found.items() if value is not None}


def _loading(options: argparse.Namespace) -> dict[str, object]:
    """The same, with how many images at a time and by how many processes."""
    return {"batch_size": options.batch_size, "workers": options.workers, **_preprocessing(options)}


def _augmentation(options: argparse.Namespace) -> dict[str, object]:
    """What was said of augmenting them, likewise."""
    found = {
        "no_aug": options.no_aug,
        "scale": options.scale,
        "ratio": options.ratio,
        "hflip": options.hflip,
        "vflip": options.vflip,
        "color_jitter": options.color_jitter,
        "auto_augment": options.aa,
        "interpolation": options.train_interpolation,
        "re_prob": options.reprob,
        "re_mode": options.remode,
        "re_count": options.recount,
    }
    return {name: value for name, value in found.items() if value is not None}


def _compared(
    options: argparse.Namespace,
    accelerator: Accelerator,
    models: dict[str, VisionTransformer],
    top1: dict[str, float],
) -> dict[str, dict]:
    """Accuracy, GMACs, speed and tokens of the models."""
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
            "tokens": _dense_tokens(model) if plan is None else list(plan.tokens),
        }
    return rows


def _save_pictures(
    options: argparse.Namespace, model: PMVisionTransformer, eval_set: Dataset, rows: dict[str, dict]
) -> None:
    """The plan over sample images, and accuracy against throughput."""
    images = sample_images(eval_set, model, _PICTURED_IMAGES, **_preprocessing(options))
    for index, image in enumerate(images, 1):
        save_plan_picture(model.plan, options.output / f"plan-{index}.png", image)
    points = {name: (row["images_per_second"], row["top1"]) for name, row in rows.items()}
    save_accuracy_picture(points, options.output / "accuracy.png")


def _dense_tokens(model: VisionTransformer) -> list[int]:
    return [model.patch_embed.num_patches + model.num_prefix_tokens] * len(model.blocks)


def _accelerator(options: argparse.Namespace) -> Accelerator:
    set_seed(options.seed)  # of a new model's weights
    precision = {"bfloat16": "bf16", "float16": "fp16"}[options.amp_dtype] if options.amp else "no"
    logs = options.output / "logs" if getattr(options, "log_tensorboard", False) else None
    return make_accelerator(mixed_precision=precision, cpu=options.device == "cpu", tensorboard=logs)


def _model_and_data(options: argparse.Namespace, *splits: str) -> tuple[VisionTransformer, list[Dataset]]:
    """The model that ``--model`` names, a saved folder or one of timm's names, and the data's splits."""

    def datasets(in_chans: int) -> list[Dataset]:
        opened = [open_dataset(options.data_dir, split, dataset=options.dataset, in_chans=in_chans) for split in splits]
        check_same_classes(*opened)
        return opened

    if Path(options.model).is_dir():
        model = load_pretrained(options.model)
        if isinstance(model, Segmenter):
            raise ValueError(f"{options.model} holds a Segmenter, expected a model that classifies images")
        found = datasets(model.in_chans)
    else:
        if not timm.is_model(options.model):
            similar = timm.list_models(f"*{options.model}*")[:3]
            hint = f"; did you mean {', '.join(similar)}?" if similar else ""
            raise ValueError(f"--model {options.model} is neither a saved folder nor a timm model{hint}")
        found = datasets(options.in_chans or 3)
        model = _named_model(options, class_names(found[0]))
    for dataset in found:
        check_classes(dataset, model)
    return model, found


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
    if not isinstance(model, PMVisionTransformer):
        check_vision_transformer(model)
    if options.checkpoint is not None:
        weights = load_state_file(options.checkpoint)
        try:
            model.load_state_dict(checkpoint_filter_fn(weights, model))
        except (RuntimeError, KeyError, AttributeError) as error:
            raise ValueError(f"{options.checkpoint} does not hold the weights of {options.model}: {error}") from error
    return model


def _model_args(options: argparse.Namespace) -> dict[str, object]:
    """What a named model was made with; a saved folder tells that itself."""
    return {} if Path(options.model).is_dir() else options.model_kwargs


def _warn_of_random_weights(options: argparse.Namespace) -> None:
    if not Path(options.model).is_dir() and options.checkpoint is None and not options.pretrained:
        warnings.warn(
            f"{options.model} has random weights: name a folder that pm-vit train wrote, or give --checkpoint or "
            "--pretrained",
            stacklevel=2,
        )


def _teacher(options: argparse.Namespace, model: PMVisionTransformer, source: str | Path) -> VisionTransformer:
    """The uncompressed model to distil from; by default the model as it was before compression."""
    if options.teacher is not None:
        teacher = load_pretrained(options.teacher)
        if teacher.num_classes != model.num_classes:
            raise ValueError(
                f"--teacher {options.teacher} has {teacher.num_classes} classes, the model has {model.num_classes}"
            )
        return teacher
    if not Path(source).is_dir():
        return model.uncompressed()
    if (Path(source) / _SUMMARY).is_file():
        raise ValueError(
            f"{source} is fine-tuned already: its weights are no longer those of the uncompressed model; "
            "name the uncompressed model's folder with --teacher"
        )
    return load_pretrained(source, uncompressed=True)


def _check_output(output: Path) -> None:
    """Refuse an output that is there already or cannot be written, before the work."""
    if (output / CONFIG_NAME).exists():
        raise FileExistsError(f"{output} holds a finished model; choose another --output, or delete it")
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"--output {output} is a file, expected a folder or nothing")
    above = output
    while not above.exists():
        above = above.parent
    try:
        tempfile.TemporaryDirectory(dir=above).cleanup()
    except OSError as error:
        raise OSError(f"--output {output} cannot be written: {error}") from error


def _write_json(path: Path, values: Sequence | dict) -> None:
    write_atomically(path, json.dumps(values, indent=2).encode())
