"""Read YAML and command-line overrides into a validated pydantic model.

Each mistake is reported in one line. Independent of the configuration's fields: the model class is
an argument. Not supported: includes, interpolation and environment variables, so that one file
shows everything a run used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fastrlhf.config.suggestions import shorten, unknown_key
from fastrlhf.config.yaml_core import EXPONENT_ONLY, MAX_BYTES, YamlError, parse
from fastrlhf.errors import UserError, one_line

Model = TypeVar("Model", bound=BaseModel)
Tree = dict[str, object]
"""A mapping as YAML gives it: key -> scalar, list or mapping."""


class ConfigError(ValueError):
    """A mistake that spans fields.

    `key` (dotted, or a name in the validator's own section) gives the line to report.
    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key} {problem}")
        self.key, self.problem = key, problem


def load(
    model: type[Model],
    path: Path,
    overrides: Sequence[str] = (),
    complete: Callable[[Tree], dict[str, str]] | None = None,
) -> Model:
    """Read `path`, set each `dotted.key=value` override, and validate the result as `model`.

    Raises UserError with one line that names the file and line, or the override.
    """
    return load_with_origins(model, path, overrides, complete)[0]


def load_with_origins(
    model: type[Model],
    path: Path,
    overrides: Sequence[str] = (),
    complete: Callable[[Tree], dict[str, str]] | None = None,
) -> tuple[Model, dict[str, str]]:
    """Return what `load` does, and "file:line" or "override" for each dotted key that was given.

    `complete` adds keys to the tree before it is validated, and returns the origin of each.
    """
    data, lines = _read(path)
    overridden: dict[str, str] = {}
    for override in overrides:
        _apply(data, override, model, overridden)
    filled = complete(data) if complete is not None else {}
    try:
        config = model.model_validate(data)
    except ValidationError as error:
        raise UserError(_explain(error, model, path, lines, overridden)) from None
    origins = {key: f"{path}:{line}" for key, line in lines.items()}
    origins |= {key: f"override {override}" for key, override in overridden.items()}
    return config, origins | filled


def dump(config: BaseModel) -> str:
    """Return YAML of every field, in the order of the model's definition."""
    tree = config.model_dump(mode="json")
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def dump_item(key: str, value: object) -> str:
    """Return `key: value` as one line of YAML; lists and mappings in flow style."""
    text = yaml.dump(
        {key: value},
        Dumper=_Dumper,
        default_flow_style=True,
        allow_unicode=True,
        sort_keys=False,
        width=math.inf,
    )
    return text.strip()[1:-1]


class _Dumper(yaml.SafeDumper):
    """Write strings quoted where a reader could take them for something else.

    In other styles than double-quoted YAML folds a Unicode line break into a space. Numbers are
    those of YAML 1.1 (PyYAML's) and of 1.2.
    """


_NUMBER_ELSEWHERE = re.compile(rf"{EXPONENT_ONLY.pattern}|0o[0-7_]+")


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    if _NUMBER_ELSEWHERE.fullmatch(text):
        style = "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _read(path: Path) -> tuple[Tree, dict[str, int]]:
    """Return the file's mapping, and the line (from 1) of each dotted key."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        data, lines = parse(content.decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, expected a YAML file") from None
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise UserError(
            f"{path}: cannot be read as a configuration file: line {line} has the byte"
            f" 0x{byte:02x}, which is not UTF-8; save the file as UTF-8"
        ) from None
    except YamlError as error:
        where = f"{path}:{error.line}" if error.line else f"{path}"
        raise UserError(one_line(f"{where}: {error.problem}")) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a configuration file: {error}") from None
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise UserError(
            f"{path}:1: expected sections such as 'model:' at the top level, not a"
            f" {type(data).__name__}"
        )
    return data, lines


def _apply(data: Tree, override: str, model: type[BaseModel], origin: dict[str, str]) -> None:
    """Set one `dotted.key=value` in `data`, and record in `origin` which override set that key."""
    key, equals, text = override.partition("=")
    key, where = key.strip(), f"override '{shorten(override)}'"
    if not equals or not key or not all(key.split(".")):
        raise UserError(f"{where}: expected section.key=value, such as train.seed=1")
    try:
        value, _ = parse(text)
    except YamlError as error:
        is_part = "the value is " if error.problem.startswith("not ") else ""
        raise UserError(one_line(f"{where}: {is_part}{error.problem}")) from None
    if key not in known_keys(model):
        raise UserError(f"{where}: {unknown_key(key, known_keys(model))}")
    *sections, name = key.split(".")
    for section in sections:
        child = data.get(section)
        if not isinstance(child, dict):
            child = data[section] = {}
        data = child
    data[name] = value
    origin[key] = override


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return every dotted key that `model` accepts, including the sections."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _explain(
    error: ValidationError,
    model: type[BaseModel],
    path: Path,
    lines: dict[str, int],
    origin: dict[str, str],
) -> str:
    """Return the first mistake in one line.

    Unknown keys come first, because a misspelt key is also a missing one.
    """
    problems = []
    for detail in error.errors(include_url=False):
        # A consequence of another mistake in the same section.
        if detail["type"] == "default_factory_not_called":
            continue
        key = _key(detail)
        parent = key.rpartition(".")[0]
        override = next((origin[name] for name in (key, parent) if name in origin), None)
        line = 0 if override else lines.get(key) or lines.get(parent, 0)
        where = (
            f"override '{shorten(override)}'"
            if override
            else f"{path}:{line}"
            if line
            else f"{path}"
        )
        problems.append((detail["type"] != "extra_forbidden", line, where, detail))
    _, _, where, detail = min(problems, key=lambda problem: problem[:2])
    more = len(problems) - 1
    others = f" (and {more} more mistake{'s' if more > 1 else ''})" if more else ""
    return one_line(f"{where}: {_describe(detail, model)}{others}")


def _key(detail: ErrorDetails) -> str:
    """Return the dotted key of one pydantic error."""
    key = ".".join(name for name in map(str, detail["loc"]) if not name.isdigit())
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return f"{key}.{cause.key}" if key else cause.key
    return key


def _describe(detail: ErrorDetails, model: type[BaseModel]) -> str:
    """Return the message of one pydantic error."""
    key, kind, value = _key(detail), detail["type"], detail["input"]
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return f"{key} {cause.problem}"
    if kind == "extra_forbidden":
        return unknown_key(key, known_keys(model))
    if kind == "missing" and any(known.startswith(f"{key}.") for known in known_keys(model)):
        return f"missing section {key}; add it"
    if kind == "missing":
        return f"missing required key {key}; add it, or pass {key}=VALUE"
    return f"{shorten(key)} is {_shown(value)}, expected {_expected(detail)}"


def _expected(detail: ErrorDetails) -> str:
    kind, value = detail["type"], detail["input"]
    if kind == "model_type":
        return f"a section with keys of its own, such as '{_key(detail)}: {{...}}'"
    if kind.startswith("bool"):
        return "true or false"
    expected = detail["msg"].removeprefix("Input should be ").partition(", unable to")[0]
    if kind == "int_parsing_size":
        expected = "an integer of fewer digits"
    expected = expected.replace("a valid integer", "an integer").replace("a valid ", "a ")
    expected = re.sub("^(greater|less) than", r"a number \1 than", expected)
    if kind == "string_type" and isinstance(value, (int, float)):
        return f"{expected}; quote it to make it text"
    return expected


def _shown(value: object) -> str:
    return "null" if value is None else shorten(repr(value), 60)
