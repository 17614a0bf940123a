"""What each command of ``pm-vit`` does with its options."""

import argparse
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.task.task import TrainingTask
from torch.utils.data import Dataset
from tqdm import tqdm

from .budget import fit_gmacs, fit_speedup
from .checkpoints import CONFIG_NAME, load_pretrained, save_pretrained
from .data import input_size
from .files import write_atomically
from .measure import count_gmacs, throughput
from .plan import CompressionPlan
from .report import compare
from .scoring import score_tokens
from .segmenter import Segmenter, encoder_of
from .tasks import DEFAULT_TASK, TASKS, Model, Task
from .training import Recipe, fit, make_accelerator
from .training.state import flat_settings, refuse_other_settings
from .vision_transformer import Compressed, PlainModel, check_vision_transformer
from .visualize import save_accuracy_picture, save_plan_picture

_STATE = "state"
_SUMMARY = "training.json"
_COMPRESSED = "compressed"
_SETTINGS = "settings.json"  # beside a model that finetune compressed
_PICTURED_IMAGES = 3

# Options by what they decide: where a run is and what it keeps, and the precision, which fit knows; the recipe; the
# compressed model; its training.
_INCIDENTAL = {
    "run", "config", "output", "device", "workers", "recovery_interval", "log_tensorboard", "grad_checkpointing", "amp",
    "amp_dtype",
}  # fmt: skip
_OF_RECIPE = {field.name for field in fields(Recipe)} | {
    "lr_base", "lr_base_size", "lr_base_scale", "default_lr", "model_ema",
}  # fmt: skip
_RATES = {"keep_rate", "target_gmacs", "target_speedup", "prune_rate"}
_OF_COMPRESSION = _RATES | {
    "score_decay", "score_batches", "allocation", "row_weights", "segments", "stages", "train_matrices", "size_bias",
    "shortcut", "merge_site",
}  # fmt: skip
_OF_TRAINING = {
    "teacher", "distill_alpha", "distill_temperature", "smoothing", "val_split", "no_aug", "scale", "ratio", "hflip",
    "vflip", "color_jitter", "aa", "train_interpolation", "reprob", "remode", "recount",
}  # fmt: skip


def demo(options: argparse.Namespace) -> None:
    from .demo import run_demo  # scikit-learn is read for the demo alone

    run_demo(options.output, seed=options.seed)


def train(options: argparse.Namespace) -> None:
    _check_output(options.output)
    accelerator = _accelerator(options)
    task = _task(options)
    model, (train_set, eval_set) = task.open(options.train_split, options.val_split)
    check_vision_transformer(encoder_of(model))
    encoder_of(model).set_grad_checkpointing(options.grad_checkpointing)
    _fit_and_save(options, accelerator, task, task.training(model), train_set, eval_set)


def compress_model(options: argparse.Namespace) -> None:
    _check_output(options.output)
    accelerator = _accelerator(options)
    task = _task(options)
    model, (train_set,) = task.open(options.train_split)
    _compress_into(options, accelerator, task, model, train_set, options.output)
    flag = "" if options.task == DEFAULT_TASK else f"--task {options.task} "
    accelerator.print(
        f"compressed model: {options.output}; next: pm-vit finetune {options.data_dir} {flag}--model {options.output}"
    )


def finetune(options: argparse.Namespace) -> None:
    _check_output(options.output)
    accelerator = _accelerator(options)
    task = _task(options)
    model, (train_set, eval_set) = task.open(options.train_split, options.val_split)
    source = options.model
    if not _is_compressed(model):
        source = options.output / _COMPRESSED
        settings = _settings(options, _OF_TRAINING)
        settings |= {"seed": options.seed, "mixed_precision": accelerator.mixed_precision}
        if (source / CONFIG_NAME).is_file():
            _check_compressed(options, source, settings)
        else:
            _check_compression(options)
            _compress_into(options, accelerator, task, model, train_set, source, settings)
        accelerator.wait_for_everyone()
        model = load_pretrained(source)
    teacher = _teacher(options, model, source)
    encoder_of(model).set_grad_checkpointing(options.grad_checkpointing)
    _fit_and_save(options, accelerator, task, task.distillation(model, teacher), train_set, eval_set)


def evaluate_model(options: argparse.Namespace) -> None:
    accelerator = _accelerator(options)
    task = _task(options)
    model, (eval_set,) = task.open(options.val_split)
    model.to(accelerator.device).eval()
    loader = task.evaluation_loader(eval_set, model, accelerator)
    _warn_of_random_weights(options)
    result = task.evaluator(model, loader, accelerator=accelerator)
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
        f"{task.evaluated(result)}; {result['gmacs']:.4g} GMACs, {result['param_count']:.2f} M parameters, "
        f"{speed:.0f} images/s of {size[1]} x {size[2]} pixels at batch "
        f"{options.batch_size} on {accelerator.device.type}"
    )
    if options.results_file is not None:
        write_atomically(options.results_file, json.dumps(result, indent=2).encode())


def _compress_into(
    options: argparse.Namespace,
    accelerator: Accelerator,
    task: Task,
    model: Model,
    train_set: Dataset,
    output: Path,
    settings: dict[str, object] | None = None,
) -> None:
    """Score the model's tokens, plan by the rates or the budget asked for, and save the compressed model and its plan.

    Every process scores its share of the batches; the first one saves, ``settings`` too where they are given.
    """
    again = _is_compressed(model)
    plain = model.uncompressed() if again else model
    encoder = encoder_of(plain)
    check_vision_transformer(encoder)
    for part in (model, plain):
        part.to(accelerator.device)
    loader = task.scoring_loader(train_set, plain)
    make_plan = partial(
        CompressionPlan.from_scores,
        grid=tuple(encoder.patch_embed.grid_size),
        prune_rate=options.prune_rate,
        layer_decay=options.score_decay,
        num_prefix_tokens=encoder.num_prefix_tokens,
        allocation=options.allocation,
        row_weights=options.row_weights,
        segments=options.segments,
        stages=options.stages,
    )
    make_model = partial(
        task.compress,
        plain,
        train_matrices=None if options.train_matrices == "none" else options.train_matrices,
        size_bias=options.size_bias,
        merge_site=options.merge_site,
        shortcut=options.shortcut,
    )
    # Wrong rates are told before the scoring.
    make_plan(torch.ones(len(encoder.blocks), encoder.patch_embed.num_patches), keep_rate=options.keep_rate or 1e-6)
    _warn_of_random_weights(options)
    batches = len(range(accelerator.process_index, min(options.score_batches, len(loader)), accelerator.num_processes))
    bar = tqdm(
        accelerator.prepare(loader), "score", leave=False, total=batches, disable=not accelerator.is_main_process
    )
    with accelerator.autocast():
        scores = score_tokens(model, bar, batches=batches, loss_fn=task.loss)
        if not accelerator.is_main_process:
            return
        plan = _plan(options, plain, partial(make_plan, scores), make_model, accelerator.device)
    compressed = make_model(plan)
    output.mkdir(parents=True, exist_ok=True)
    if again:  # its plain weights were trained to be compressed: no teacher
        _write_json(output / _SUMMARY, {"command": "compress", "model": str(options.model)})
    if settings is not None:
        _write_json(output / _SETTINGS, settings)
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


def _check_compressed(options: argparse.Namespace, source: Path, settings: dict[str, object]) -> None:
    """Refuse what a stopped run has compressed with other settings; without any rate, its own are meant."""
    if not (source / _SETTINGS).is_file():
        raise ValueError(f"{source} does not tell what it was compressed with; delete it, or name it with --model")
    began = json.loads((source / _SETTINGS).read_text(encoding="utf-8"))
    if all(getattr(options, name) is None for name in _RATES):
        began, settings = (
            {name: value for name, value in values.items() if name not in _OF_COMPRESSION}
            for values in (began, settings)
        )
    refuse_other_settings({"settings": began}, {"settings": settings}, source)


def _plan(
    options: argparse.Namespace,
    model: Model,
    make_plan: Callable[..., CompressionPlan],
    make_model: Callable[[CompressionPlan], Model],
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
    task: Task,
    lesson: TrainingTask,
    train_set: Dataset,
    eval_set: Dataset,
) -> None:
    """Train the lesson's model, continuing a stopped run, and save it with its results."""
    model = lesson.trainable_module
    recipe = Recipe(
        epochs=options.epochs,
        lr=_learning_rate(options, accelerator.num_processes),
        weight_decay=options.weight_decay,
        warmup_epochs=options.warmup_epochs,
        warmup_lr=options.warmup_lr,
        min_lr=options.min_lr,
        clip_grad=options.clip_grad,
        opt=options.opt,
        sched=options.sched,
        layer_decay=options.layer_decay,
        grad_accum_steps=options.grad_accum_steps,
        model_ema_decay=options.model_ema_decay if options.model_ema else None,
        mixup=getattr(options, "mixup", 0.0),
        cutmix=getattr(options, "cutmix", 0.0),
        seed=options.seed,
    )
    train_loader = task.training_loader(train_set, model)
    eval_loader = task.evaluation_loader(eval_set, model, accelerator)
    results = fit(
        lesson,
        train_loader,
        eval_loader,
        recipe,
        accelerator=accelerator,
        evaluator=task.evaluator,
        state_dir=options.output / _STATE,
        settings=_settings(options, _OF_COMPRESSION),
        recovery_interval=options.recovery_interval,
        summary=options.output / "summary.csv",
        name=options.command,
    )
    model = lesson.trainable_module.eval()
    models, quality = {options.command: model}, {options.command: getattr(results[-1], task.quality)}
    if _is_compressed(model):
        teacher = lesson.teacher if isinstance(model, Segmenter) else lesson.teacher.model
        models = {"dense": teacher.eval(), **models}
        quality["dense"] = task.evaluator(teacher, eval_loader, accelerator=accelerator)[task.quality]
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    summary = {"command": options.command, "recipe": asdict(recipe), "epochs": [asdict(result) for result in results]}
    rows = _compared(options, accelerator, task, models, quality)
    _save_pictures(options, task, models, eval_set, rows)
    _write_json(options.output / _SUMMARY, summary | {"models": rows})
    # Last, as the model's configuration is what tells a finished run from one to continue.
    save_pretrained(model, options.output, model_args=_model_args(options), results=rows)
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


def _compared(
    options: argparse.Namespace,
    accelerator: Accelerator,
    task: Task,
    models: dict[str, Model],
    quality: dict[str, float],
) -> dict[str, dict]:
    """Accuracy, GMACs, speed and tokens of the models."""
    size = input_size(models[options.command])
    images = torch.randn(options.batch_size, *size, device=accelerator.device)
    with accelerator.autocast():
        speed = throughput(models, images, rounds=5)
    rows = {}
    for name, model in models.items():
        encoder = encoder_of(model)
        rows[name] = {
            task.quality: quality[name],
            "gmacs": count_gmacs(model, size),
            "images_per_second": speed[name],
            "tokens": list(encoder.plan.tokens) if _is_compressed(model) else _dense_tokens(encoder),
        }
    return rows


def _save_pictures(
    options: argparse.Namespace, task: Task, models: dict[str, Model], eval_set: Dataset, rows: dict[str, dict]
) -> None:
    """Predictions, the plan over sample images, and accuracy against throughput, where there are any."""
    model = models[options.command]
    task.save_predictions(eval_set, models, _PICTURED_IMAGES, options.output / "predictions.png")
    if not _is_compressed(model):
        return
    for index, image in enumerate(task.samples(eval_set, model, _PICTURED_IMAGES), 1):
        save_plan_picture(encoder_of(model).plan, options.output / f"plan-{index}.png", image)
    points = {name: (row["images_per_second"], row[task.quality]) for name, row in rows.items()}
    save_accuracy_picture(points, options.output / "accuracy.png", quality=task.quality_name)


def _dense_tokens(model: PlainModel) -> list[int]:
    return [model.patch_embed.num_patches + model.num_prefix_tokens] * len(model.blocks)


def _is_compressed(model: Model) -> bool:
    return isinstance(encoder_of(model), Compressed)


def _task(options: argparse.Namespace) -> Task:
    return TASKS[options.task](options)


def _accelerator(options: argparse.Namespace) -> Accelerator:
    set_seed(options.seed)  # of a new model's weights
    precision = {"bfloat16": "bf16", "float16": "fp16"}[options.amp_dtype] if options.amp else "no"
    logs = options.output / "logs" if getattr(options, "log_tensorboard", False) else None
    return make_accelerator(mixed_precision=precision, cpu=options.device == "cpu", tensorboard=logs)


def _settings(options: argparse.Namespace, left_out: Collection[str]) -> dict[str, object]:
    """The options that decide what is computed, but for the recipe and those ``left_out``; paths in full."""
    given = {
        name: value
        for name, value in vars(options).items()
        if name not in _INCIDENTAL and name not in _OF_RECIPE and name not in left_out
    }
    for name in {"data_dir", "model", "checkpoint", "teacher"} & given.keys():
        if given[name] is not None and Path(given[name]).exists():
            given[name] = str(Path(given[name]).resolve())
    return flat_settings(given)


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


def _teacher(options: argparse.Namespace, model: Model, source: str | Path) -> Model:
    """The uncompressed model to distil from; by default the model as it was before compression."""
    if options.teacher is not None:
        teacher = load_pretrained(options.teacher)
        if type(teacher) is not type(model.uncompressed()):
            raise ValueError(
                f"--teacher {options.teacher} holds a {type(teacher).__name__}, expected what the model was before "
                "compression"
            )
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
