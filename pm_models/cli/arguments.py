"""Build the command line from dataclasses: every option is a field."""

import argparse
from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from timm.utils import ParseKwargs


class Option(NamedTuple):
    """How argparse handles a field.

    Args:
        flags: such as ``("-b", "--batch-size")``, or the field's name if it is positional.
        arguments: arguments of ``ArgumentParser.add_argument``.
        one_of: options with the same word here exclude each other.
        recorded: whether an unfinished run can only be continued with the same value.
        nullable: whether ``None`` is a valid value besides a default.
        group: the field of the command's dataclass that holds this one; ``None``: the command itself.
    """

    flags: tuple[str, ...]
    arguments: dict[str, Any]
    one_of: str | None
    recorded: bool
    nullable: bool
    group: str | None = None

    @property
    def positional(self) -> bool:
        return not self.flags[0].startswith("-")

    @property
    def usage(self) -> str:
        """Its part of the usage line: what must be given, or can be if it is positional."""
        name = self.arguments.get("metavar") or self.flags[-1].removeprefix("--").upper().replace("-", "_")
        if self.positional:
            return {"*": f"[{name} ...]", "?": f"[{name}]"}.get(self.arguments.get("nargs"), name)
        return f"{self.flags[-1]} {name}" if self.arguments["required"] else ""


def flag(name: str) -> str:
    """The flag of a field on the command line."""
    return f"--{name.replace('_', '-')}"


def option(help: str, default: object = MISSING, *flags: str, **settings: Any) -> Any:
    """A dataclass field that is an option.

    Args:
        help: text for ``--help``; the default is appended.
        default: the field's default; without one the option must be given.
        flags: flags besides the one from its name.
        settings: further arguments of ``ArgumentParser.add_argument`` that the field's type does not determine;
            ``positional``, the name in ``--help`` of an argument without a flag; ``one_of`` and ``recorded`` as in
            :class:`Option`; ``only``, the one task that has the option. A dict holds settings for the task or command
            of that name.
    """
    metadata = {"help": help, "flags": flags, **settings}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def stages_of(text: str) -> list[tuple[int, int]]:
    """Parse ``3-5,6-11`` as [(3, 5), (6, 11)]; a block may also stand alone."""
    try:
        return [tuple(int(block) for block in (part.split("-") * 2)[:2]) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected blocks such as 0-2,3-5,6, got {text!r}") from None


def group(title: str, only: str | None = None) -> Any:
    """A dataclass field that holds a group of options, shown under a title; ``only``: the one task that has it."""
    return field(metadata={"title": title, "only": only})


def options_of(command: type, task: str | None = None, *, name: str | None = None) -> dict[str, Option]:
    """All options of a command's dataclass for a task, including those in groups; ``name``: the command's name."""
    hints, name = get_type_hints(command), name or command.__name__.lower()
    options = {}
    for member in fields(command):
        hint = hints[member.name]
        if member.metadata.get("only") not in (None, task):
            continue
        if is_dataclass(hint):
            inner = options_of(hint, task, name=name)
            options |= {key: value._replace(group=member.name) for key, value in inner.items()}
        else:
            options[member.name] = _option(member, hint, task, name)
    return options


def _option(member: Field, hint: type, task: str | None, command: str) -> Option:
    default = member.default if member.default_factory is MISSING else member.default_factory()
    settings = {"default": None, "required": True} if default is MISSING else {"default": default, "required": False}
    settings |= _by_type(hint) | member.metadata | member.metadata.get(task, {}) | member.metadata.get(command, {})
    arguments = {key: value for key, value in settings.items() if not isinstance(value, dict) or key == "default"}
    arguments.pop("only", None)
    flags, one_of = arguments.pop("flags"), arguments.pop("one_of", None)
    recorded, positional = arguments.pop("recorded", True), arguments.pop("positional", None)
    arguments["help"] += _default_in_words(arguments["default"], arguments["help"])
    if positional is None:
        flags = tuple(sorted((flag(member.name), *flags), key=len))  # -b before --batch-size
        arguments["dest"] = member.name
    else:
        flags = (member.name,)
        arguments["metavar"] = positional
        del arguments["required"]
    return Option(flags, arguments, one_of, recorded, NoneType in get_args(hint) and default is not None)


def _by_type(hint: type) -> dict[str, Any]:
    """The arguments of ``add_argument`` that follow from a type; ``T | None`` is treated as ``T``."""
    if NoneType in get_args(hint):
        hint = get_args(hint)[0]
    if hint is bool:
        return {"action": "store_true"}
    if get_origin(hint) is dict:
        return {"action": ParseKwargs, "nargs": "*", "metavar": "NAME=VALUE"}
    if get_origin(hint) is tuple:
        item, *others = get_args(hint)
        return {"type": item, "nargs": "+" if others == [...] else 1 + len(others)}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    return {} if hint is str else {"type": hint}


def _default_in_words(default: object, help: str) -> str:
    if isinstance(default, tuple) and default:
        return f" ({' '.join(map(str, default))})"
    told = default is None or isinstance(default, bool | dict | tuple) or default == "" or "%(default)s" in help
    return "" if told else " (%(default)s)"


def add_options(parser: argparse.ArgumentParser, command: type, task: str | None, defaults: Mapping) -> None:
    """Add a command's options for a task to a parser; those in ``defaults`` are not required."""
    titles = {member.name: member.metadata.get("title") for member in fields(command)}
    places = {None: parser}
    for name, option in options_of(command, task).items():
        arguments = option.arguments | ({"default": defaults[name], "required": False} if name in defaults else {})
        if option.group not in places:
            places[option.group] = parser.add_argument_group(titles[option.group])
        place = places[option.group]
        if option.one_of is not None:
            if option.one_of not in places:
                places[option.one_of] = place.add_mutually_exclusive_group()
            place = places[option.one_of]
        place.add_argument(*option.flags, **arguments)


def read_options(command: type, parsed: argparse.Namespace) -> Any:
    """The dataclass with the parsed values; fields that are not options of the task keep their defaults."""
    values = {}
    for name, hint in get_type_hints(command).items():
        if is_dataclass(hint):
            values[name] = read_options(hint, parsed)
        elif hasattr(parsed, name):
            value = getattr(parsed, name)
            values[name] = tuple(value) if isinstance(value, list) else value
    return command(**values)
