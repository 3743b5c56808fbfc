"""YAML and command-line overrides to a validated pydantic model; every mistake becomes one line that says where it is.

Knows no field of the configuration: the model class is an argument. Leaves out includes, interpolation and environment
variables on purpose: what a run used can be read in one file.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from fastrlhf.errors import UserError

Model = TypeVar("Model", bound=BaseModel)


class ConfigError(ValueError):
    """A cross-field mistake: `key` (dotted, or a name in the validator's own section) says which line to show."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key} {problem}")
        self.key, self.problem = key, problem


def load(model: type[Model], path: Path, overrides: Sequence[str] = ()) -> Model:
    """Read `path`, set each `dotted.key=value` override, validate as `model`. Raises UserError with one line."""
    data, lines = _read(path)
    origin: dict[str, str] = {}
    for override in overrides:
        _apply(data, override, model, origin)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UserError(_explain(error, model, path, lines, origin)) from None


def dump(config: BaseModel) -> str:
    """Return YAML of every field, in the order of the model's definition."""
    tree = config.model_dump(mode="json")
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Writes strings with a Unicode line break double-quoted: in other styles YAML folds the break into a space."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The file's mapping, and the line (from 1) of each dotted key."""
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
            f"{path}:1: expected sections such as 'model:' at the top level, not a {type(data).__name__}"
        )
    return data, lines


def _lines(node: yaml.Node, path: Path, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(dotted key, line) of every key below `node`; a key given twice is an error, where YAML would keep the last."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        line, name = key_node.start_mark.line + 1, str(key_node.value)
        if name in seen:
            raise UserError(
                f"{path}:{line}: {prefix}{name} is already set on line {seen[name]}; remove one of them"
            )
        seen[name] = line
        yield prefix + name, line
        yield from _lines(value_node, path, f"{prefix}{name}.")


def _apply(
    data: dict[str, Any], override: str, model: type[BaseModel], origin: dict[str, str]
) -> None:
    """Set one `dotted.key=value` in `data`, and note in `origin` which override set that key."""
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
        if not isinstance(data.get(section), dict):
            data[section] = {}
        data = data[section]
    data[name] = value
    origin[key] = override


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key that `model` accepts, sections included."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _unknown(key: str, model: type[BaseModel]) -> str:
    """What to say of a key that `model` lacks: the nearest key of its section, else of any section, else the keys."""
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
    """The first mistake in one line; unknown keys come first, for a misspelt key is also a missing one."""
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


def _describe(detail: Any, model: type[BaseModel]) -> tuple[str, str]:
    """(dotted key, what is wrong) of one pydantic error."""
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


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
