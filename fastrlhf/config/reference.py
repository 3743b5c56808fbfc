"""The settings reference: every key with its type, default and meaning, as text and as Markdown.

`fastrlhf config` and docs/configuration.md are made from the models of `schema.py`, so that neither
can disagree with what the program accepts.
"""

from __future__ import annotations

import difflib
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fastrlhf.config import yaml_file
from fastrlhf.config.commands import COMMANDS
from fastrlhf.config.environment import ENVIRONMENT
from fastrlhf.config.schema import Config
from fastrlhf.config.shape import complete_shape
from fastrlhf.config.suggestions import suggestion
from fastrlhf.errors import UserError


@dataclass(frozen=True)
class Setting:
    """One key of the configuration."""

    key: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True)
class SectionReference:
    """A section of the configuration with its settings.

    `name` is "" for the keys outside all sections.
    """

    name: str
    meaning: str
    commands: tuple[str, ...]
    """Commands that read it."""
    settings: tuple[Setting, ...]


def sections() -> list[SectionReference]:
    """Return every section of the configuration, in the order of `Config`."""
    top: list[Setting] = []
    found: list[SectionReference] = []
    for name, field in Config.model_fields.items():
        model = field.annotation
        if isinstance(model, type) and issubclass(model, BaseModel):
            settings = tuple(
                _setting(f"{name}.{key}", own) for key, own in model.model_fields.items()
            )
            readers = tuple(
                command.name for command in COMMANDS.values() if name in command.sections
            )
            found.append(SectionReference(name, _text(model.__doc__), readers, settings))
        else:
            top.append(_setting(name, field))
    return [*found, SectionReference("", "Keys outside all sections.", tuple(COMMANDS), tuple(top))]


def describe(key: str | None = None) -> str:
    """Return the reference of a section or a key as plain text; of everything if None.

    Raises UserError naming the nearest key if there is no such section or key.
    """
    found = sections()
    if key is None:
        return "\n\n".join(map(_section_text, found))
    for section in found:
        if key == section.name:
            return _section_text(section)
        for setting in section.settings:
            if key == setting.key:
                return "\n".join(_setting_lines(setting))
    known = [
        name
        for section in found
        for name in (section.name, *(s.key for s in section.settings))
        if name
    ]
    near = suggestion(key, known)
    if not near and (close := difflib.get_close_matches(key, known, n=1, cutoff=0.5)):
        near = f"{close[0]}?"
    hint = f"did you mean {near}" if near else "fastrlhf config lists all of them"
    raise UserError(f"{key}: no such section or key; {hint}")


def markdown() -> str:
    """Return docs/configuration.md."""
    parts = [_MARKDOWN_HEAD]
    for section in sections():
        title = f"## `{section.name}`" if section.name else "## Outside the sections"
        readers = ", ".join(f"`{command}`" for command in section.commands)
        parts += [title, section.meaning, f"Read by {readers}."]
        parts.append(
            _table(("key", "type", "default", "meaning"), map(_markdown_row, section.settings))
        )
    parts += ["## Environment variables", _ENVIRONMENT_HEAD]
    rows = (
        (f"`{name}`", _cell(values), meaning) for name, (values, meaning) in ENVIRONMENT.items()
    )
    parts.append(_table(("variable", "values", "meaning"), rows))
    return "\n\n".join(parts) + "\n"


def show(path: str | Path, overrides: Iterable[str] = ()) -> str:
    """Return the resolved configuration as YAML, with the origin of each value as a comment.

    Origins are the file and line, the override, the path of the checkpoint that gives the model's
    shape, "default", or "derived" (from other settings).
    Raises UserError as `load_config` does.
    """
    config, origins = yaml_file.load_with_origins(
        Config, Path(path), list(overrides), complete_shape
    )
    rows: list[tuple[str, str]] = []
    for name, field in Config.model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            rows.append((f"{name}:", ""))
            tree = value.model_dump(mode="json")
            for key, own in type(value).model_fields.items():
                rows.append(
                    (
                        "  " + yaml_file.dump_item(key, tree[key]),
                        origins.get(f"{name}.{key}") or _origin(own),
                    )
                )
        else:
            rows.append((yaml_file.dump_item(name, value), origins.get(name) or _origin(field)))
    width = min(60, max(len(line) for line, _ in rows))
    return (
        "\n".join(f"{line:<{width}}  # {origin}" if origin else line for line, origin in rows)
        + "\n"
    )


def _origin(field: FieldInfo) -> str:
    return "default" if field.default_factory in (None, list) else "derived"


def _setting(key: str, field: FieldInfo) -> Setting:
    bounds = [bound for bound in field.metadata if isinstance(bound, annotated_types.BaseMetadata)]
    return Setting(
        key,
        _with_bounds(_type_text(field.annotation), bounds),
        _default(field),
        _text(field.description),
    )


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "[]" if field.default_factory is list else "derived"
    if field.default is PydanticUndefined:
        return "required"
    return yaml_file.dump_item("x", _plain(field.default)).removeprefix("x: ")


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _type_text(annotation: object) -> str:
    """Return a type as a reader of the YAML file knows it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        bounds = [a for a in arguments[1:] if isinstance(a, annotated_types.BaseMetadata)]
        fields = [a for a in arguments[1:] if isinstance(a, FieldInfo)]
        bounds += [
            b for f in fields for b in f.metadata if isinstance(b, annotated_types.BaseMetadata)
        ]
        return _with_bounds(_type_text(arguments[0]), bounds)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        names = [_type_text(argument) for argument in arguments if argument is not type(None)]
        unique = list(dict.fromkeys(part for name in names for part in name.split(" or ")))
        return " or ".join(unique + ["null"] * (type(None) in arguments))
    if origin is list:
        return f"list of {_type_text(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(map(_type_text, arguments))}]"
    if origin is dict:
        return f"mapping of {_type_text(arguments[0])} to {_type_text(arguments[1])}"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _with_bounds(name: str, bounds: Iterable[annotated_types.BaseMetadata]) -> str:
    """Return `name` with its limits, such as "int > 0" or "float in [0, 1)"."""
    low = high = ""
    for bound in bounds:
        if isinstance(bound, annotated_types.Gt):
            low = f"({bound.gt}"
        elif isinstance(bound, annotated_types.Ge) and not _is_generous(bound.ge):
            low = f"[{bound.ge}"
        elif isinstance(bound, annotated_types.Lt):
            high = f"{bound.lt})"
        elif isinstance(bound, annotated_types.Le) and not _is_generous(bound.le):
            high = f"{bound.le}]"
    if low and high:
        return f"{name} in {_number(low)}, {_number(high)}"
    if low:
        return f"{name} {'>' if low[0] == '(' else '>='} {_number(low[1:])}"
    if high:
        return f"{name} {'<' if high[-1] == ')' else '<='} {_number(high[:-1])}"
    return name


def _is_generous(bound: object) -> bool:
    """Return whether a bound only catches misplaced digits; the page leaves it out."""
    return isinstance(bound, (int, float)) and abs(bound) >= 10_000


def _number(text: str) -> str:
    return re.sub(r"\.0(?!\d)", "", text)


def _text(docstring: str | None) -> str:
    return " ".join((docstring or "").split())


def _section_text(section: SectionReference) -> str:
    head = [section.name or "outside all sections", f"  {section.meaning}"]
    head += textwrap.wrap(
        f"Read by {', '.join(section.commands)}.", 96, initial_indent="  ", subsequent_indent="  "
    )
    return "\n".join(
        head + [line for setting in section.settings for line in ("", *_setting_lines(setting))]
    )


def _setting_lines(setting: Setting) -> Iterator[str]:
    yield f"{setting.key}: {setting.type} (default: {setting.default})"
    yield from textwrap.wrap(setting.meaning, 96, initial_indent="    ", subsequent_indent="    ")


_MARKDOWN_HEAD = """\
# Configuration

<!-- Made by `python -m fastrlhf.config.reference > docs/configuration.md`; a test compares the two.
-->

A run is configured by one YAML file and by `section.key=value` arguments after it, whose values are
YAML. YAML is read as version 1.2: only true and false are booleans, `010` is ten, dates are text.
An unknown key is an error that names the nearest valid one. `fastrlhf config [SECTION|KEY]` prints
this page's entries, and `fastrlhf config show CONFIG [section.key=value ...]` the resolved
configuration with the origin of each value.

"derived" defaults depend on other settings, as the meaning says. `null` stands for no value. A list
of one string may be given as the string. Numbers also have generous upper bounds, which the error
names."""

_ENVIRONMENT_HEAD = (
    "Wrong values raise an error at the first use. Variables of torchrun, NCCL and PyTorch are"
    " theirs."
)


def _markdown_row(setting: Setting) -> tuple[str, ...]:
    name = setting.key.rpartition(".")[2]
    default = (
        setting.default if setting.default in ("required", "derived") else f"`{setting.default}`"
    )
    return f"`{name}`", _cell(setting.type), default, _cell(setting.meaning)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


if __name__ == "__main__":
    print(markdown(), end="")
