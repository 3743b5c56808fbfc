"""Read YAML and command-line overrides into a validated pydantic model.

Each mistake is reported in one line. Independent of the configuration's fields: the model class is
an argument. Not supported: includes, interpolation and environment variables, so that one file
shows everything a run used.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fastrlhf.errors import UserError

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


def load(model: type[Model], path: Path, overrides: Sequence[str] = ()) -> Model:
    """Read `path`, set each `dotted.key=value` override, and validate the result as `model`.

    Raises UserError with one line that names the file and line, or the override.
    """
    return load_with_origins(model, path, overrides)[0]


def load_with_origins(
    model: type[Model], path: Path, overrides: Sequence[str] = ()
) -> tuple[Model, dict[str, str]]:
    """Return what `load` does, and "file:line" or "override" for each dotted key that was given."""
    data, lines = _read(path)
    overridden: dict[str, str] = {}
    for override in overrides:
        _apply(data, override, model, overridden)
    try:
        config = model.model_validate(data)
    except ValidationError as error:
        raise UserError(_explain(error, model, path, lines, overridden)) from None
    origins = {key: f"{path}:{line}" for key, line in lines.items()}
    return config, origins | {key: f"override {override}" for key, override in overridden.items()}


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
    """Write strings with a Unicode line break double-quoted.

    In other styles YAML folds the break into a space.
    """


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _read(path: Path) -> tuple[Tree, dict[str, int]]:
    """Return the file's mapping, and the line (from 1) of each dotted key."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, expected a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a configuration file: {error}") from None
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        lines = dict(_lines(node, path)) if node is not None else {}
        data = loader.construct_document(node) if node is not None else {}
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        raise UserError(
            f"{path}:1: expected sections such as 'model:' at the top level, not a"
            f" {type(data).__name__}"
        )
    return data, lines


def _lines(node: yaml.Node, path: Path, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield (dotted key, line) of every key below `node`.

    Raises UserError for a key given twice, of which YAML would silently keep the last.
    """
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        line, name = key_node.start_mark.line + 1, str(key_node.value)
        if name in seen:
            raise UserError(
                f"{path}:{line}: {prefix}{name} is already set on line {seen[name]}; remove one of"
                " them"
            )
        seen[name] = line
        yield prefix + name, line
        yield from _lines(value_node, path, f"{prefix}{name}.")


def _apply(data: Tree, override: str, model: type[BaseModel], origin: dict[str, str]) -> None:
    """Set one `dotted.key=value` in `data`, and record in `origin` which override set that key."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        raise UserError(f"override '{override}': expected section.key=value, such as train.seed=1")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error)
        raise UserError(f"override '{override}': the value is not valid YAML: {problem}") from None
    if key not in known_keys(model):
        raise UserError(f"override '{override}': {_unknown(key, model)}")
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


def _unknown(key: str, model: type[BaseModel]) -> str:
    """Return the message for an unknown key.

    It names the nearest key of the section, else the nearest of any section, else all keys.
    """
    keys = known_keys(model)
    parent, _, name = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in keys if k.rpartition(".")[0] == parent}
    settings = {k.rpartition(".")[2]: k for k in keys if "." in k}
    sections = [k for k in keys if "." not in k]
    nearest = [siblings[near] for near in difflib.get_close_matches(name, siblings, n=1)]
    nearest += [
        settings[near] for near in difflib.get_close_matches(name, settings, n=1, cutoff=0.75)
    ]
    if nearest:
        return f"unknown key {key}; did you mean {nearest[0]}?"
    owner, known = (f" of {parent}", siblings) if parent and siblings else ("", sections)
    return f"unknown key {key}; the keys{owner} are {', '.join(known)}"


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
        if (
            detail["type"] == "default_factory_not_called"
        ):  # a consequence of another mistake in the same section
            continue
        key, text = _describe(detail, model)
        parent = key.rpartition(".")[0]
        override = next((origin[name] for name in (key, parent) if name in origin), None)
        line = 0 if override else lines.get(key) or lines.get(parent, 0)
        where = f"override '{override}'" if override else f"{path}:{line}" if line else f"{path}"
        problems.append((detail["type"] != "extra_forbidden", line, f"{where}: {text}"))
    problems.sort(key=lambda problem: problem[:2])
    more = len(problems) - 1
    return problems[0][2] + (f" (and {more} more mistake{'s' if more > 1 else ''})" if more else "")


def _describe(detail: ErrorDetails, model: type[BaseModel]) -> tuple[str, str]:
    """Return the dotted key and the message of one pydantic error."""
    names = [str(part) for part in detail["loc"]]
    key = ".".join(name for name in names if not name.isdigit())
    kind, value = detail["type"], detail["input"]
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        full = f"{key}.{cause.key}" if key else cause.key
        return full, f"{full} {cause.problem}"
    if kind == "extra_forbidden":
        return key, _unknown(key, model)
    if kind == "missing" and any(known.startswith(f"{key}.") for known in known_keys(model)):
        return key, f"missing section {key}; add it"
    if kind == "missing":
        return key, f"missing required key {key}; add it, or pass {key}=VALUE"
    expected = detail["msg"].removeprefix("Input should be ").partition(", unable to")[0]
    expected = expected.replace("a valid integer", "an integer").replace("a valid ", "a ")
    expected = re.sub("^(greater|less) than", r"a number \1 than", expected)
    if kind == "model_type":
        expected = f"a section with keys of its own, such as '{key}: {{...}}'"
    return key, f"{key} is {_shown(value)}, expected {expected}"


def _shown(value: object) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
