"""The commands train, compress, finetune and eval."""

import json
import shutil
import warnings
from collections.abc import Callable, Collection
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import set_seed
from timm.task.task import TrainingTask
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ..adaptive_plan import AdaptivePlan
from ..budget import KeepRates, fit_gmacs, fit_speedup
from ..checkpoints import CONFIG_NAME, load_pretrained, save_pretrained
from ..files import check_writable, write_atomically
from ..measure import count_gmacs, throughput
from ..models import Model, compressed, compression_of, encoder_of, input_size, tokens_of, uncompressed
from ..plan import CompressionPlan, Plan
from ..scoring import score_tokens
from ..segmenter import Segmenter
from ..tables import compare
from ..training import Recipe, fit, make_accelerator
from ..training.state import flat_settings, refuse_other_settings
from ..vision_transformer import PlainModel, check_vision_transformer
from ..visualize import save_accuracy_picture, save_cluster_picture, save_plan_picture
from .arguments import options_of
from .options import DEFAULT_TASK, Command, Compress, CompressionOptions, Eval, Finetune, ModelOptions, Train
from .tasks import TASKS, Task

_STATE = "state"
_SUMMARY = "training.json"
_COMPRESSED = "compressed"
_SETTINGS = "settings.json"  # beside a model that finetune compressed
_PICTURED_IMAGES = 3


def train(options: Train) -> None:
    task = _begin(options)
    model, (train_set, eval_set) = task.open(options.data.train_split, options.data.val_split)
    check_vision_transformer(encoder_of(model))
    _fit_and_save(task, task.losses(model), train_set, eval_set)


def compress_model(options: Compress) -> None:
    task = _begin(options)
    adaptive = options.compression.adaptive
    model, datasets = task.open(*([] if adaptive else [options.data.train_split]))
    _compress_into(options.output, task, model, *datasets)
    flag = "" if options.task == DEFAULT_TASK else f"--task {options.task} "
    following = f"finetune {options.data.data_dir} {flag}--model {options.output}"
    if adaptive:
        following = f"show {options.output} IMAGE"
    task.accelerator.print(f"compressed model: {options.output}; next: pm-vit {following}")


def finetune(options: Finetune) -> None:
    task = _begin(options)
    model, (train_set, eval_set) = task.open(options.data.train_split, options.data.val_split)
    source = options.model.model
    if compression_of(model) is None:
        source = options.output / _COMPRESSED
        settings = _settings(options, left_out=("training", "augmentation", "crops", "distillation"))
        del settings["val_split"]
        settings |= {"seed": options.device.seed, "mixed_precision": task.accelerator.mixed_precision}
        if (source / CONFIG_NAME).is_file():
            _check_compressed(options.compression, source, settings)
        else:
            if missing := options.compression.missing:
                raise ValueError(
                    f"{options.model.model} is uncompressed: give {' and '.join(missing)}, or --adaptive, or a folder "
                    "that pm-vit compress wrote"
                )
            _compress_into(source, task, model, train_set, settings)
        task.accelerator.wait_for_everyone()
        model = load_pretrained(source)
    teacher = _teacher(options.distillation.teacher, model, source)
    _fit_and_save(task, task.losses(model, teacher), train_set, eval_set)


def evaluate_model(options: Eval) -> None:
    task = _begin(options)
    accelerator, batch = task.accelerator, options.data.batch_size
    model, (eval_set,) = task.open(options.data.val_split)
    model.to(accelerator.device).eval()
    loader = task.evaluation_loader(eval_set, model)
    _warn_of_random_weights(options.model)
    result = task.evaluator(model, loader, accelerator=accelerator)
    if not accelerator.is_main_process:
        return
    size = input_size(model)
    result |= {
        "model": options.model.model,
        "gmacs": count_gmacs(model, size),
        "param_count": sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        "samples_per_sec": _throughput(task, {"model": model})["model"],
    }
    print(
        f"{task.in_words(result)}; {result['gmacs']:.4g} GMACs, {result['param_count']:.2f} M parameters, "
        f"{result['samples_per_sec']:.0f} images/s of {size[1]} x {size[2]} pixels at batch {batch} on "
        f"{accelerator.device.type}"
    )
    if options.results_file is not None:
        _write_json(options.results_file, result)


def _begin(options: Command) -> Task:
    """Check the output folder, seed the initialisation of new models, and form the group of processes."""
    if not isinstance(options, Eval):
        _check_output(options.output)
    device = options.device
    set_seed(device.seed)
    precision = {"bfloat16": "bf16", "float16": "fp16"}[device.amp_dtype] if device.amp else "no"
    logs = options.output / "logs" if isinstance(options, Train) and options.training.log_tensorboard else None
    accelerator = make_accelerator(mixed_precision=precision, cpu=device.device == "cpu", tensorboard=logs)
    return TASKS[options.task](options, accelerator)


# --- Compressing.


def _compress_into(
    output: Path,
    task: Task,
    model: Model,
    train_set: Dataset | None = None,
    settings: dict[str, object] | None = None,
) -> None:
    """Make the requested plan, and save the compressed model and the plan.

    For a static plan every process scores its share of the batches of ``train_set``. The first process saves, including
    ``settings`` if they are given.
    """
    accelerator, compression, chosen = task.accelerator, task.options.compression, task.options.model
    plain = uncompressed(model)
    check_vision_transformer(encoder_of(plain))
    for part in (model, plain):
        part.to(accelerator.device)
    planning = None if compression.adaptive else _checked_planning(compression, encoder_of(plain))
    _warn_of_random_weights(chosen)
    make_model = partial(compressed, plain, **compression.compressing())
    with accelerator.autocast():
        scores = None if planning is None else _scores(task, model, train_set)
        if not accelerator.is_main_process:
            return
        plan = _plan(task, plain, make_model, None if planning is None else partial(planning, scores))
    smaller = make_model(plan)
    output.mkdir(parents=True, exist_ok=True)
    if plain is not model:  # its plain weights were trained in a compressed model, and make no teacher
        _write_json(output / _SUMMARY, {"command": "compress", "model": chosen.model})
    if settings is not None:
        _write_json(output / _SETTINGS, settings)
    plan.save(output / "plan.json")
    if not compression.adaptive:
        save_plan_picture(plan, output / "plan.png")
    save_pretrained(smaller, output, model_args=_model_args(chosen))
    before, after = (count_gmacs(part, input_size(plain)) for part in (plain, smaller))
    print(plan)
    print(f"GMACs per image: {before:.4g} before, {after:.4g} after ({after / before:.1%})")


def _checked_planning(
    compression: CompressionOptions, encoder: PlainModel
) -> Callable[[Tensor, float], CompressionPlan]:
    """A function from scores and a keep rate to a plan; invalid rates raise now, before the scoring."""
    grid, prefix = tuple(encoder.patch_embed.grid_size), encoder.num_prefix_tokens

    def plan_of(scores: Tensor, keep_rate: float) -> CompressionPlan:
        return CompressionPlan.from_scores(scores, grid, keep_rate, num_prefix_tokens=prefix, **compression.planning())

    plan_of(torch.ones(len(encoder.blocks), encoder.patch_embed.num_patches), compression.keep_rate or 1e-6)
    return plan_of


def _scores(task: Task, model: Model, train_set: Dataset) -> Tensor:
    accelerator, batches = task.accelerator, task.options.compression.score_batches
    loader = task.scoring_loader(train_set, model)
    share = len(range(accelerator.process_index, min(batches, len(loader)), accelerator.num_processes))
    bar = tqdm(accelerator.prepare(loader), "score", leave=False, total=share, disable=not accelerator.is_main_process)
    return score_tokens(model, bar, batches=share, loss_fn=task.loss)


def _plan(
    task: Task, model: Model, make_model: Callable[[Plan], Model], make_plan: Callable[[float], CompressionPlan] | None
) -> Plan:
    """The plan for the requested keep rate or budget; an adaptive one if ``make_plan`` is ``None``."""
    wanted, batch, device = task.options.compression, task.options.data.batch_size, task.accelerator.device
    if wanted.keep_rate is not None:
        return make_plan(wanted.keep_rate)
    if not wanted.has_budget:
        return AdaptivePlan.for_model(model)
    encoder = encoder_of(model)
    if make_plan is None:
        plans = AdaptivePlan.candidates(encoder)
    else:
        plans = KeepRates(make_plan, encoder.patch_embed.num_patches, wanted.prune_rate)
    model.eval()
    if wanted.target_gmacs is not None:
        found = fit_gmacs(model, plans, make_model, wanted.target_gmacs)
        text = f"{wanted.target_gmacs:g} GMACs: {found.value:.4g}"
    else:
        images = torch.randn(batch, *input_size(model), device=device)
        found = fit_speedup(model, plans, make_model, wanted.target_speedup, images)
        text = (
            f"{wanted.target_speedup:g} times the speed: {found.value:.3f} times, measured at batch {batch} on "
            f"{device.type}"
        )
    name = "adaptive merging" if make_plan is None else f"keep rate {plans.rates[found.index]:.3f}"
    print(f"{name} for {text}")
    return found.plan


def _check_compressed(compression: CompressionOptions, source: Path, settings: dict[str, object]) -> None:
    """Refuse the compressed model of a stopped run if settings differ; without rates, the run's own are meant."""
    if not (source / _SETTINGS).is_file():
        raise ValueError(f"{source} does not say what it was compressed with; delete it, or name it with --model")
    began = json.loads((source / _SETTINGS).read_text(encoding="utf-8"))
    if not (compression.adaptive or compression.has_budget or compression.prune_rate is not None):
        meant = {field.name for field in fields(CompressionOptions)}
        began, settings = (
            {name: value for name, value in values.items() if name not in meant} for values in (began, settings)
        )
    refuse_other_settings({"settings": began}, {"settings": settings}, source)


def _teacher(folder: Path | None, model: Model, source: str | Path) -> Model:
    """The uncompressed model to distil from; by default the model before compression."""
    if folder is not None:
        teacher = load_pretrained(folder)
        if type(teacher) is not type(model.uncompressed()):
            raise ValueError(
                f"--teacher {folder} holds a {type(teacher).__name__}, expected what the model was before compression"
            )
        if teacher.num_classes != model.num_classes:
            raise ValueError(f"--teacher {folder} has {teacher.num_classes} classes, the model has {model.num_classes}")
        return teacher
    if not Path(source).is_dir():
        return model.uncompressed()
    if (Path(source) / _SUMMARY).is_file():
        raise ValueError(
            f"{source} is fine-tuned already: its weights are no longer those of the uncompressed model; "
            "name the uncompressed model's folder with --teacher"
        )
    return load_pretrained(source, uncompressed=True)


def dense_of(folder: Path, model: Model) -> Model | None:
    """The uncompressed model that a folder's compressed one was made from.

    None where it was fine-tuned, and the folder does not hold it as it was before.
    """
    if not (folder / _SUMMARY).is_file():
        return uncompressed(model)
    before = folder / _COMPRESSED
    if not (before / CONFIG_NAME).is_file() or (before / _SUMMARY).is_file():
        return None
    return load_pretrained(before, uncompressed=True)


# --- Training.


def _fit_and_save(task: Task, losses: TrainingTask, train_set: Dataset, eval_set: Dataset) -> None:
    """Train the model of ``losses``, continuing a stopped run if there is one, and save it with its results."""
    options, accelerator, output = task.options, task.accelerator, task.options.output
    model = losses.trainable_module
    encoder_of(model).set_grad_checkpointing(options.training.grad_checkpointing)
    recipe = options.recipe(accelerator.num_processes)
    eval_loader = task.evaluation_loader(eval_set, model)
    results = fit(
        losses,
        task.training_loader(train_set, model),
        eval_loader,
        recipe,
        accelerator=accelerator,
        evaluator=task.evaluator,
        state_dir=output / _STATE,
        settings=_settings(options, left_out=("compression",)),
        recovery_interval=options.training.recovery_interval,
        summary=output / "summary.csv",
        name=options.command,
    )
    model = losses.trainable_module.eval()
    models, quality = {options.command: model}, {options.command: getattr(results[-1], task.quality)}
    if compression_of(model) is not None:
        teacher = losses.teacher if isinstance(model, Segmenter) else losses.teacher.model
        models = {"dense": teacher.eval(), **models}
        quality["dense"] = task.evaluator(teacher, eval_loader, accelerator=accelerator)[task.quality]
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    summary = {"command": options.command, "recipe": asdict(recipe), "epochs": [asdict(result) for result in results]}
    rows = _compared(task, models, quality)
    _save_pictures(task, models, eval_set, rows)
    _write_json(output / _SUMMARY, summary | {"models": rows})
    # Last, because the model's configuration marks a run as finished.
    save_pretrained(model, output, model_args=_model_args(options.model), results=rows)
    for state in (_STATE, f"{_STATE}.old"):  # the model is saved: nothing is left to continue
        shutil.rmtree(output / state, ignore_errors=True)
    print(compare(rows))
    print(f"model: {output}")


def _compared(task: Task, models: dict[str, Model], quality: dict[str, float]) -> dict[str, dict]:
    """Accuracy, GMACs, speed and tokens of the models."""
    speed = _throughput(task, models)
    return {
        name: {
            task.quality: quality[name],
            "gmacs": count_gmacs(model, input_size(model)),
            "images_per_second": speed[name],
            "tokens": tokens_of(model),
        }
        for name, model in models.items()
    }


def _throughput(task: Task, models: dict[str, Model]) -> dict[str, float]:
    """Images per second at ``--batch-size``, for models that take images of the same size."""
    accelerator, size = task.accelerator, input_size(next(iter(models.values())))
    images = torch.randn(task.options.data.batch_size, *size, device=accelerator.device)
    with accelerator.autocast():
        return throughput(models, images, rounds=5)


def _save_pictures(task: Task, models: dict[str, Model], eval_set: Dataset, rows: dict[str, dict]) -> None:
    """Draw predictions, the plan or the merged tokens on sample images, and accuracy against throughput."""
    model, output = models[task.options.command], task.options.output
    task.save_predictions(eval_set, models, _PICTURED_IMAGES, output / "predictions.png")
    compression = compression_of(model)
    if compression is None:
        return
    for index, sample in enumerate(task.samples(eval_set, model, _PICTURED_IMAGES), 1):
        if compression.adaptive:
            save_cluster_picture(model, output / f"merging-{index}.png", sample.image, sample.picture)
        else:
            save_plan_picture(compression.plan, output / f"plan-{index}.png", sample.picture)
    points = {name: (row["images_per_second"], row[task.quality]) for name, row in rows.items()}
    save_accuracy_picture(points, output / "accuracy.png", quality=task.quality_name)


# --- Settings and checks.


def _settings(options: Train, left_out: Collection[str]) -> dict[str, object]:
    """The options that determine results, except those of the recipe and of groups ``left_out``; absolute paths."""
    recipe = {field.name for field in fields(Recipe)}
    kinds, values = options_of(type(options), options.task), options.values()
    given = {"command": options.command} | {
        name: values[name]
        for name, kind in kinds.items()
        if kind.recorded and name not in recipe and kind.group not in left_out
    }
    for name in {"data_dir", "model", "checkpoint", "teacher"} & given.keys():
        if given[name] is not None and Path(given[name]).exists():
            given[name] = str(Path(given[name]).resolve())
    return flat_settings(given)


def _model_args(chosen: ModelOptions) -> dict[str, object]:
    """The arguments that a named model was made with; saved folders record their own."""
    return {} if chosen.is_folder else chosen.model_kwargs


def _warn_of_random_weights(chosen: ModelOptions) -> None:
    if not chosen.is_folder and chosen.checkpoint is None and not chosen.pretrained:
        warnings.warn(
            f"{chosen.model} has random weights: name a folder that pm-vit train wrote, or give --checkpoint or "
            "--pretrained",
            stacklevel=2,
        )


def _check_output(output: Path) -> None:
    """Refuse an output that exists already or cannot be written, before any work."""
    if (output / CONFIG_NAME).exists():
        raise FileExistsError(f"{output} holds a finished model; choose another --output, or delete it")
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"--output {output} is a file, expected a folder or nothing")
    check_writable(output, "--output")


def _write_json(path: Path, values: dict) -> None:
    write_atomically(path, json.dumps(values, indent=2).encode())
