"""Read options from a YAML file: a user's own, one of the shipped recipes, or timm's ``args.yaml``."""

import argparse
import difflib
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import yaml
from timm.utils import ParseKwargs

from .arguments import Option

_SHIPPED = Path(__file__).parents[1] / "recipes"
_EMPTY = (None, "", "None")  # values of options that were not given
_TRUTH = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)

# The options of timm's train.py that pm-vit lacks; the args.yaml of every timm run lists them all.
_OF_TIMM = frozenset(
    """
    amp_impl aug_repeats aug_splits bce_loss bce_pos_weight bce_sum bce_target_thresh bn_eps bn_momentum channels_last
    checkpoint_hist class_map clip_mode color_jitter_prob cooldown_epochs cutmix_minmax data data_dir dataset_download
    dataset_trust_remote_code decay_epochs decay_milestones decay_rate device_modules dist_bn distill_loss_weight drop
    drop_block drop_connect drop_path epoch_repeats eval_metric experiment fast_norm fuser gaussian_blur_prob gp
    grayscale_prob head_init_bias head_init_scale initial_checkpoint input_img_mode input_key input_size jsd_loss
    kd_distill_type kd_loss_type kd_model_name kd_student_feature_dim kd_teacher_feature_dim kd_temperature
    kd_token_distill_type layer_decay_min_scale layer_decay_no_opt_scale local_rank log_interval log_wandb
    lr_cycle_decay lr_cycle_limit lr_cycle_mul lr_k_decay lr_noise lr_noise_pct lr_noise_std mixup_mode mixup_off_epoch
    mixup_prob mixup_switch_prob model_dtype model_ema_force_cpu model_ema_warmup momentum naflex_loader
    naflex_loss_scale naflex_max_seq_len naflex_patch_size_probs naflex_patch_sizes naflex_train_seq_lens no_ddp_bb
    no_prefetcher no_resume_opt opt_betas opt_eps opt_kwargs patience_epochs pin_mem pretrained_path resplit resume
    save_images sched_on_updates split_bn start_epoch sync_bn synchronize_step target_key task_loss_weight
    torchcompile torchcompile_mode torchscript train_crop_mode train_num_samples tta use_multi_epochs_loader
    val_interval val_num_samples validation_batch_size wandb_project wandb_resume_id wandb_tags warmup_prefix
    worker_seeding
    """.split()
)


def shipped_configs() -> list[str]:
    """Names of the recipes that ``--config`` takes instead of a file."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def read_config(arguments: list[str], options: Mapping[str, Option], others: Collection[str]) -> dict[str, object]:
    """The values in the file of ``--config``, as the command line would have given them.

    Args:
        arguments: the command line after the command. Where options exclude each other, it has precedence over the
            file.
        options: options of the command that runs.
        others: names of other commands' options, which are ignored, so that one file can serve all steps of a job.
            Unknown options are an error, except in the ``args.yaml`` of timm's ``train.py``, where they are a warning.
            Empty values are ignored.

    Raises:
        FileNotFoundError: there is no such file, and no recipe of that name.
        ValueError: the file is not a YAML file of options, or an option does not accept its value.
    """
    path = _config_path(arguments)
    if path is None:
        return {}
    values = _read(path)
    of_timm = len(_OF_TIMM & values.keys()) > 1  # a single one is more likely a mistake in a user's own file
    if of_timm:
        values = _translated(values)
    known = {name: option for name, option in options.items() if not option.positional and name != "config"}
    passed_over = _unknown(path, values, known.keys() | others, of_timm)
    taken = {
        name: value
        for name, value in values.items()
        if name in known and (value not in _EMPTY or (value is None and known[name].nullable))
    }
    for choice in {option.one_of for option in known.values()} - {None}:
        members = [name for name, option in known.items() if option.one_of == choice]
        if any(is_given(known[name], arguments) for name in members):
            taken = {name: value for name, value in taken.items() if name not in members}
        elif sum(name in taken for name in members) > 1:
            raise ValueError(f"{path}: only one of {', '.join(members)} can be given")
    converted = {
        name: None if value is None else _value(f"{path}: {name}", known[name].arguments, value)
        for name, value in taken.items()
    }
    if passed_over:
        print(
            f"pm-vit: warning: {path} is timm's; its options that pm-vit does not have are passed over: "
            f"{', '.join(passed_over)}",
            file=sys.stderr,
        )
    return converted


def _unknown(path: Path, values: dict, known: set[str], of_timm: bool) -> list[str]:
    """The unknown options of one of timm's files, those with a value first.

    Raises:
        ValueError: an option is probably a mistake, as every unknown one in a user's own file is; the message suggests
            what may be meant.
    """
    unknown = [key for key in values if key not in known]
    likely = {key: difflib.get_close_matches(key, known | _OF_TIMM, 1, 0.8) for key in unknown if key not in _OF_TIMM}
    wrong = [key for key in likely if likely[key]] if of_timm else unknown
    if wrong:
        meant = [name for key in wrong for name in likely.get(key, []) if name in known]
        hint = f"; did you mean {', '.join(meant)}?" if meant else ""
        raise ValueError(f"{path}: {', '.join(wrong)}: no such option{hint}")
    return [f"{key} = {values[key]}" for key in unknown if values[key]] + [key for key in unknown if not values[key]]


def _translated(values: dict) -> dict:
    """Translate values of timm's ``train.py`` that have another meaning here."""
    values = dict(values)
    if str(values.get("device")).startswith("cuda"):
        del values["device"]
    if not values.get("lr"):
        values.pop("lr", None)
    if not values.get("lr_base_scale"):
        rooted = any(part in str(values.get("opt")).lower() for part in ("ada", "lamb"))
        values["lr_base_scale"] = "sqrt" if rooted else "linear"
    size = values.get("input_size")
    if isinstance(size, list) and len(size) == 3 and size[1] == size[2]:
        for key, side in (("in_chans", size[0]), ("img_size", size[1])):
            values[key] = values.get(key) or side
        del values["input_size"]
    return values


def find_task(arguments: list[str], tasks: Collection[str], default: str) -> str:
    """The task that the command line or its ``--config`` names, which determines the parser's options.

    Names that are not in ``tasks`` are left for the parser to refuse.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_config` does.
    """
    named = _finder("--task").parse_known_args(arguments)[0].task
    if named is None and (path := _config_path(arguments)) is not None:
        named = _read(path).get("task")
    return named if isinstance(named, str) and named in tasks else default


def _config_path(arguments: list[str]) -> Path | None:
    name = _finder("-c", "--config").parse_known_args(arguments)[0].config
    if name is None:
        return None
    path = Path(name)
    if not path.is_file() and name in shipped_configs():
        path = _SHIPPED / f"{name}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"no file {name}, and no recipe of that name: there are {', '.join(shipped_configs())}")
    return path


def _finder(*names: str) -> argparse.ArgumentParser:
    finder = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    finder.add_argument(*names, nargs="?")
    return finder


def _read(path: Path) -> dict:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected options and values, such as epochs: 30, got {type(values).__name__}")
    named = {str(key).lstrip("-").replace("-", "_"): value for key, value in values.items()}
    if len(named) < len(values):
        raise ValueError(f"{path}: an option is given twice, with - and with _")
    return named


def is_given(option: Option, arguments: list[str]) -> bool:
    """Whether an option is given on the command line, abbreviated or not."""
    names = [argument.partition("=")[0] for argument in arguments if argument.startswith("--") and argument != "--"]
    return any(flag.startswith(name) for flag in option.flags for name in names)


def _value(where: str, arguments: dict[str, Any], value: object) -> object:
    """Convert a value as argparse would, by the arguments of ``add_argument``.

    Raises:
        ValueError: the option does not accept the value.
    """
    action, nargs, choices = (arguments.get(name) for name in ("action", "nargs", "choices"))
    if action is ParseKwargs:
        return _names_and_values(where, value)
    if action is not None:
        if (truth := _TRUTH.get(str(value).lower())) is None:
            raise ValueError(f"{where} must be true or false, got {value!r}")
        return truth
    if isinstance(value, dict):
        raise ValueError(f"{where} does not take names and values, got {value!r}")
    values = value if isinstance(value, list) else [value] if nargs is None else str(value).replace(",", " ").split()
    if nargs is None:
        fits, expected = not isinstance(value, list), "one value"
    elif nargs == "+":
        fits, expected = len(values) > 0, "a list"
    else:
        fits, expected = len(values) == nargs, f"{nargs} values"
    if not fits:
        raise ValueError(f"{where} takes {expected}, got {value!r}")
    try:
        converted = [_converted(arguments.get("type"), item) for item in values]
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{where}: {error}") from error
    for item in converted:
        if choices is not None and item not in choices:
            raise ValueError(f"{where} must be one of {', '.join(map(str, choices))}, got {item!r}")
    return converted[0] if nargs is None else converted


def _converted(convert: Callable[[str], object] | None, item: object) -> object:
    if isinstance(item, bool):
        raise ValueError(f"does not take true or false, got {item!r}; quote it if it is a word")
    if convert is None:
        return str(item)
    return convert(str(int(item) if isinstance(item, float) and item.is_integer() else item))


def _names_and_values(where: str, value: object) -> dict:
    """A dict from a dict, from ``NAME=VALUE`` as on the command line, or from a list of these."""
    if isinstance(value, dict):
        return value
    parsed = argparse.Namespace()
    try:
        texts = [str(item) for item in (value if isinstance(value, list) else str(value).split())]
        ParseKwargs([], "values", nargs="*")(None, parsed, texts)
    except ValueError as error:
        raise ValueError(f"{where} takes names and values, got {value!r}") from error
    return parsed.values
