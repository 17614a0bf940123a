"""The command line ``pm-vit``. Its options are the dataclasses in :mod:`.options`, which the commands take."""

import argparse
import inspect
import logging
import sys
import warnings
from collections.abc import Mapping, Sequence

import torch

from ..training import launched_processes
from . import commands, options, tools
from .arguments import Option, add_options, flag, options_of, read_options
from .config import find_task, is_given, read_config
from .tasks import TASKS

_COMMANDS = {
    "demo": (options.Demo, tools.demo),
    "train": (options.Train, commands.train),
    "compress": (options.Compress, commands.compress_model),
    "finetune": (options.Finetune, commands.finetune),
    "eval": (options.Eval, commands.evaluate_model),
    "export": (options.Export, tools.export),
    "show": (options.Show, tools.show),
    "bench": (options.Bench, tools.bench),
    "report": (options.Report, tools.report),
}
# Commands that read data: they have --config and --task, and run in several processes.
_ON_DATA = [name for name, (kind, _) in _COMMANDS.items() if issubclass(kind, options.Command)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``pm-vit``; a user's error gives one line on standard error and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        parser = _configured_parser(arguments)
    except (ValueError, OSError) as error:
        return _failed(arguments[0], error)
    parsed = parser.parse_args(arguments)
    command = parsed.command
    kind, run = _COMMANDS[command]
    for talkative in ("timm", "onnxscript", "onnx_ir"):
        logging.getLogger(talkative).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            warnings.simplefilter("default", UserWarning)
            if command not in _ON_DATA and launched_processes() > 1:
                raise ValueError(f"runs in one process, got {launched_processes()} from the launcher")
            run(read_options(kind, parsed))
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        return _failed(command, error)
    except KeyboardInterrupt:
        hint = "; the same command continues" if command in ("train", "finetune") else ""
        print(f"pm-vit {command}: interrupted{hint}", file=sys.stderr)
        return 130
    finally:
        # Its threads must not outlive the interpreter.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def _failed(command: str, error: Exception) -> int:
    """Print an error in one line, without the traceback that torch adds to errors from a loader's processes."""
    text = str(error)
    if text.startswith("Caught "):
        text = text.strip().splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
    print(f"pm-vit {command}: error: {text}", file=sys.stderr)
    return 2


def _print_warning(message: Warning, category: type[Warning], *_: object, **__: object) -> None:
    print(f"pm-vit: {'warning' if category is UserWarning else category.__name__}: {message}", file=sys.stderr)


def _configured_parser(arguments: list[str]) -> argparse.ArgumentParser:
    """The parser for the arguments' task, with the values of their ``--config`` as defaults."""
    task = find_task(arguments[1:], TASKS, options.DEFAULT_TASK)
    values = {}
    if arguments and arguments[0] in _ON_DATA:
        known = {name: options_of(_COMMANDS[name][0], task) for name in _ON_DATA}
        everything = {name for own in known.values() for name, option in own.items() if not option.positional}
        own = known[arguments[0]]
        values = read_config(arguments[1:], own, everything - {"config"})
        if "adaptive" in own:
            values = _without_static(own, arguments[1:], values)
    return _parser(task, {arguments[0]: values} if values else {})


def _without_static(own: Mapping[str, Option], arguments: list[str], values: dict[str, object]) -> dict[str, object]:
    """A file's values without its rates if ``--adaptive`` is on the command line, which has precedence.

    Raises:
        ValueError: options of a static plan are given with ``--adaptive``, even with their default values.
    """
    given = [name for name in options.STATIC_OPTIONS if is_given(own[name], arguments)]
    if is_given(own["adaptive"], arguments):
        values = {name: value for name, value in values.items() if name not in options.STATIC_OPTIONS}
    elif values.get("adaptive"):
        given = [name for name in options.STATIC_OPTIONS if name in given or name in values]
    else:
        return values
    if given:
        raise ValueError(
            f"{', '.join(map(flag, given))} cannot be given with --adaptive, which takes only --target-gmacs "
            "or --target-speedup"
        )
    return values


def _parser(task: str, defaults: Mapping[str, Mapping]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pm-vit",
        description="Make Vision Transformers faster by running them on fewer tokens.",
        epilog="A first look: pm-vit demo. Then, on your images: pm-vit train DATA --model NAME --output DENSE, and "
        "pm-vit finetune DATA --model DENSE --keep-rate 0.6 --prune-rate 0.1 --output TUNED.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (kind, _) in _COMMANDS.items():
        text = inspect.getdoc(kind)
        summary = text.splitlines()[0].removesuffix(".")
        needed = " ".join(option.usage for option in options_of(kind, task).values() if option.usage)
        subparser = subparsers.add_parser(
            name,
            usage=f"pm-vit {name} {needed} [options]".replace("  ", " "),
            help=summary[0].lower() + summary[1:],
            description=text,
        )
        add_options(subparser, kind, task, defaults.get(name, {}))
    return parser
