"""Options from a YAML file: a user's own, or one of the recipes that are shipped."""

import argparse
from collections.abc import Collection
from pathlib import Path

import yaml

_SHIPPED = Path(__file__).parent / "recipes"


def shipped_configs() -> list[str]:
    """Names of the recipes that ``--config`` takes in the place of a file."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def apply_config(command: str, parsers: dict[str, argparse.ArgumentParser], arguments: list[str]) -> None:
    """Make the values in the file of ``--config`` the defaults of a command's parser.

    Args:
        command: the command that runs. An option of another command is passed over, so that one file serves the steps
            of one job; an option of none is an error.
        parsers: every command's parser.
        arguments: of the command line, after the command.

    Raises:
        FileNotFoundError: there is no such file, and no recipe of that name.
        ValueError: the file is no YAML of options, or a value is none that the option takes.
    """
    path = _config_path(arguments)
    if path is None:
        return
    values = _read(path)
    options = {
        name: {action.dest: action for action in parser._actions if action.option_strings and action.dest != "config"}
        for name, parser in parsers.items()
    }
    unknown = [key for key in values if not any(key in known for known in options.values())]
    if unknown:
        raise ValueError(f"{path}: {', '.join(map(str, unknown))}: no such option")
    parser, known = parsers[command], options[command]
    taken = {key: value for key, value in values.items() if key in known}
    given = _given(parser, arguments)
    for group in parser._mutually_exclusive_groups:
        members = [action.dest for action in group._group_actions]
        if given & set(members):  # the file's choice gives way to the command line's
            taken = {key: value for key, value in taken.items() if key not in members}
        elif sum(key in taken for key in members) > 1:
            raise ValueError(f"{path}: only one of {', '.join(members)} can be given")
        elif any(key in taken for key in members):
            group.required = False
    for key, value in taken.items():
        known[key].default = _value(path, key, known[key], value)
        known[key].required = False


def find_task(arguments: list[str], tasks: Collection[str], default: str) -> str:
    """The task that the command line or its ``--config`` names, so that the parser can have that task's options.

    What is none of ``tasks`` is left for the parser to refuse.

    Raises:
        FileNotFoundError, ValueError: as :func:`apply_config` does.
    """
    named = _finder("--task").parse_known_args(arguments)[0].task
    if named is None and (path := _config_path(arguments)) is not None:
        named = _read(path).get("task")
    return named if named in tasks else default


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
        raise ValueError(f"{path} is no YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected options and values, such as epochs: 30, got {type(values).__name__}")
    return values


def _given(parser: argparse.ArgumentParser, arguments: list[str]) -> set[str]:
    """The options that stand on the command line, abbreviated or not."""
    found = set()
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("--"):
            found |= {
                action.dest
                for action in parser._actions
                if any(option.startswith(name) for option in action.option_strings)
            }
    return found


def _value(path: Path, key: str, action: argparse.Action, value: object) -> object:
    """A value as the command line would have given it.

    Raises:
        ValueError: the option takes no such value.
    """
    if value is None or (action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction)):
        if isinstance(value, bool) or (value is None and action.nargs != 0):
            return value
        raise ValueError(f"{path}: {key} must be true or false, got {value!r}")
    if isinstance(value, dict):
        if not isinstance(action.default, dict):
            raise ValueError(f"{path}: {key} takes no names and values, got {value!r}")
        return value
    values = value if isinstance(value, list) else [value]
    if (isinstance(value, list) != (action.nargs is not None)) or (
        isinstance(action.nargs, int) and len(values) != action.nargs
    ):
        expected = (
            "one value" if action.nargs is None else "a list" if action.nargs == "+" else f"{action.nargs} values"
        )
        raise ValueError(f"{path}: {key} takes {expected}, got {value!r}")
    try:
        converted = [action.type(str(item)) if action.type else str(item) for item in values]
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{path}: {key}: {error}") from error
    for item in converted:
        if action.choices is not None and item not in action.choices:
            raise ValueError(f"{path}: {key} must be one of {', '.join(map(str, action.choices))}, got {item!r}")
    return converted if action.nargs is not None else converted[0]
