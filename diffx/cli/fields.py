"""Flags made of the fields of frozen dataclasses: one name, one default, one explanation, all in the class."""

import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
import yaml


def flags_of(classes: Iterable[type]) -> list[inspect.Parameter]:
    """One keyword parameter per field that the classes have, with None for "not given"; typer makes flags of them."""
    made: dict[str, inspect.Parameter] = {}
    for cls in classes:
        hints, explained = get_type_hints(cls), explanations(cls)
        for field in dataclasses.fields(cls):
            kind, parser, metavar = _kind(hints[field.name])
            flag = "--" + field.name.replace("_", "-")
            names = [f"{flag}/--no-{flag[2:]}"] if kind is bool else [flag]
            # Without the backslash rich takes it for markup, and drops it.
            default = "" if field.default is dataclasses.MISSING else f" \\[default: {_shown(field.default)}]"
            option = typer.Option(*names, help=explained.get(field.name, "") + default, show_default=False, parser=parser, metavar=metavar)
            annotation = Annotated[kind | None, option]
            made.setdefault(field.name, inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    return list(made.values())


def explanations(cls: type) -> dict[str, str]:
    """What the source says of each field: the comment behind it, or its entry under ``Args:``."""
    found: dict[str, str] = {}
    for part in reversed(cls.__mro__[:-1]):
        for line in inspect.getsource(part).splitlines():
            if match := re.match(r"    (\w+): [^#]*# (.+)", line):
                found[match[1]] = match[2]
        listed = re.search(r"\n    Args:\n(.*?)(?:\n\n|\Z)", part.__doc__ or "", re.DOTALL)
        for match in re.finditer(r"^        (\S[\w, ]*): (.*(?:\n            .*)*)", listed[1] if listed else "", re.MULTILINE):
            for name in match[1].split(", "):
                found[name] = " ".join(match[2].split())
    return {name: text.replace("``", "").replace("[", r"\[") for name, text in found.items()}


def merged(
    file: Path | None, given: Mapping[str, Any], known: Iterable[str], unpacked: Callable[[Any], Any] = lambda values: values
) -> dict[str, Any]:
    """The values of a YAML file, and over them the flags that were given.

    Args:
        unpacked: what makes one mapping of flags of a file that has another form.

    Raises:
        ValueError: the file cannot be read, is no mapping, or has a key that is no flag here.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = unpacked(yaml.safe_load(file.read_text()) or {})
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"config {str(file)!r} cannot be read ({error})") from error
        unknown = sorted(set(values) - set(known)) if isinstance(values, dict) else ["no mapping"]
        if unknown:
            raise ValueError(f"config {str(file)!r} has {', '.join(map(str, unknown))}; it may have {', '.join(known)}")
        values = {name: _plain(value) for name, value in values.items()}
    return values | {name: value for name, value in given.items() if value is not None}


def _plain(value: Any) -> Any:
    """A value of YAML as dataclasses have it: tuples for lists, and 1e-4 a number, which PyYAML takes for text."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value):
        return float(value)
    return tuple(value) if isinstance(value, list) else value


def _kind(hint: Any) -> tuple[Any, Any, str | None]:
    """(type, parser, metavar) of a flag for values of that type."""
    options = [part for part in get_args(hint) if part is not type(None)] if get_origin(hint) in (Union, types.UnionType) else [hint]
    tuples = [part for part in options if get_origin(part) is tuple]
    if tuples:
        number = get_args(tuples[0])[0]
        return str, lambda text: _numbers(text, number, alone=len(options) > 1), "N,N"
    if get_origin(options[0]) is Literal:
        return options[0], None, None
    return (options[0] if options[0] in (int, float, bool) else str), None, None


def _numbers(text: Any, number: type, *, alone: bool) -> Any:
    """ "3,15" -> (3.0, 15.0); a single number as it is where that is allowed."""
    if not isinstance(text, str):
        return text
    try:
        found = tuple(number(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers like 3,15") from None
    return found[0] if alone and len(found) == 1 else found


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(f"{part:g}" for part in value)
    return str(value)
