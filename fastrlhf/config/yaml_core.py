"""Parse YAML text into plain values: scalars of YAML 1.2's core schema, within limits.

PyYAML reads the text into nodes; this module turns them into values. PyYAML's own conversion
follows YAML 1.1, where `1:30` is 90, `010` is 8, `no` is false and `2026-11-30` is a date. Here:

- true and false are booleans, null and ~ are null; yes, no, on and off are text;
- 12, 1_000, 0x1f, 0o17 and 0b11 are integers, 010 is ten; 1.5, 1_000.5, 1.0e-5, .inf and .nan are
  floats; 1e-5, without a dot, is text that a field of numbers reads as a number;
- everything else, dates and times included, is text as written; keys are always text.

Anchors, aliases and merge keys (`<<`) work. Out of scope: all other tags, and several documents.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import yaml

MAX_BYTES = 1 << 20
"""Largest text, and largest size of its values once all aliases are expanded."""
MAX_NODES = 50_000
"""Most values and keys, before and after aliases are expanded: about a second of reading."""
MAX_DEPTH = 32
"""Deepest nesting; a configuration needs 4 levels."""
_MAX_DIGITS = 64
"""Longest integer; longer ones stay text, because Python refuses to print integers of more than
4,300 digits. No setting takes a number of more than 39 digits."""

_INTEGER = re.compile(
    r"[-+]?(?:[0-9][0-9_]*|0x[0-9a-fA-F_]*[0-9a-fA-F]|0o[0-7_]*[0-7]|0b[01_]*[01])"
)
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
EXPONENT_ONLY = re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+")
"""Numbers that this module leaves as text. Written out, they are quoted for other readers."""
_TAG = "tag:yaml.org,2002:"


class YamlError(Exception):
    """A text that is not valid YAML, or with `is_yaml` one that sets a key twice.

    `line` counts from 1; 0 if unknown.
    """

    def __init__(self, problem: str, line: int = 0, *, is_yaml: bool = False) -> None:
        super().__init__(problem)
        self.line = line
        self.problem = problem if is_yaml else f"not valid YAML: {problem}"


def parse(text: str) -> tuple[object, dict[str, int]]:
    """Return the value of a YAML document, and the line (from 1) of each dotted key.

    An empty document is None. Raises YamlError, and nothing else, for a text that is not valid,
    too large or too deep.
    """
    node = _compose(text)
    reader = _Reader()
    return (None if node is None else reader.value(node, ""), reader.lines)


def _compose(text: str) -> yaml.Node | None:
    if len(text) > MAX_BYTES:
        raise YamlError(f"longer than {MAX_BYTES} characters, the largest configuration")
    try:
        loader = _Loader(text)  # checks for control characters
        try:
            node: yaml.Node | None = loader.get_single_node()
            return node
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = error.character if isinstance(error.character, int) else ord(error.character)
        what = f"the character U+{character:04X} is not allowed; write it as an escape in quotes"
        raise YamlError(what, line) from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise YamlError(str(error.problem), line) from None
    except YamlError:
        raise
    except Exception as error:  # PyYAML converts some escapes and directives without checks
        raise YamlError(f"{error}" or type(error).__name__) from None


def _resolvers() -> dict[str | None, list[tuple[str, re.Pattern[str]]]]:
    """Return PyYAML's table: first character -> (tag, pattern) of plain scalars."""
    table: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, pattern, first in (
        ("bool", re.compile("true|True|TRUE|false|False|FALSE"), "tTfF"),
        ("null", re.compile("~|null|Null|NULL|"), ["~", "n", "N", ""]),
        ("int", _INTEGER, "-+0123456789"),
        ("float", _FLOAT, "-+.0123456789"),
        ("merge", re.compile("<<"), "<"),
    ):
        whole = re.compile(rf"(?:{pattern.pattern})\Z")  # PyYAML calls `match`
        for character in first:
            table.setdefault(character, []).append((_TAG + tag, whole))
    return table


class _Loader(yaml.SafeLoader):
    """PyYAML's parser with this module's scalars and a limit on nesting."""

    yaml_implicit_resolvers = _resolvers()
    depth = nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        self.depth += 1
        self.nodes += 1
        if self.depth > MAX_DEPTH or self.nodes > MAX_NODES:
            limit = (
                f"nested more than {MAX_DEPTH} levels deep"
                if self.depth > MAX_DEPTH
                else f"more than {MAX_NODES} values"
            )
            raise YamlError(limit, self.peek_event().start_mark.line + 1)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Reader:
    """Converts nodes to values, and counts what aliases multiply."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}
        self.size = self.nodes = 0
        self.open: list[yaml.Node] = []
        """The nodes around the current one."""

    def value(self, node: yaml.Node, key: str) -> object:
        """Return the value of `node`, whose dotted key is `key`."""
        line = node.start_mark.line + 1
        self.size += 1 + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
        self.nodes += 1
        if self.size > MAX_BYTES or self.nodes > MAX_NODES:
            limit = f"{MAX_NODES} values" if self.nodes > MAX_NODES else f"{MAX_BYTES} characters"
            raise YamlError(f"aliases expand to more than {limit}", line)
        if any(node is outer for outer in self.open):
            raise YamlError("an alias refers to a value that contains it", line)
        if len(self.open) >= MAX_DEPTH:
            raise YamlError(f"nested more than {MAX_DEPTH} levels deep", line)
        _check_unicode(node)
        self.open.append(node)
        try:
            if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
                return self._mapping(node, key)
            if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
                return [self.value(item, "") for item in node.value]
            if isinstance(node, yaml.ScalarNode) and (convert := _SCALARS.get(node.tag)):
                return convert(node)
        finally:
            self.open.pop()
        tag = node.tag.replace(_TAG, "!!")
        raise YamlError(f"the tag {tag} is not supported here; remove it", line)

    def _mapping(self, node: yaml.MappingNode, key: str) -> dict[str, object]:
        """Return the mapping; its own keys win over merged ones, earlier merges over later ones."""
        own: dict[str, object] = {}
        merged: dict[str, object] = {}
        seen: dict[str, int] = {}
        prefix = f"{key}." if key else ""
        for key_node, value_node in node.value:
            line, name = key_node.start_mark.line + 1, _name(key_node)
            if name in seen:
                raise YamlError(
                    f"{prefix}{name} is already set on line {seen[name]}; remove one of them",
                    line,
                    is_yaml=True,
                )
            seen[name] = line
            if key_node.tag == f"{_TAG}merge":
                for source in self._merged(value_node, key):
                    merged = source | merged
                continue
            # The top level and its sections are recorded, not what a list or an alias repeats.
            if len(self.open) == 1 or key:
                self.lines.setdefault(prefix + name, line)
            own[name] = self.value(value_node, prefix + name)
        return merged | own

    def _merged(self, node: yaml.Node, key: str) -> Iterator[dict[str, object]]:
        """Yield the mappings that a merge key refers to."""
        for source in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            value = self.value(source, key)
            if not isinstance(value, dict):
                line = node.start_mark.line + 1
                raise YamlError("<< expects a mapping, or a list of mappings", line)
            yield value


def _check_unicode(node: yaml.Node) -> None:
    """Check that no escape makes half of a surrogate pair, which no file or terminal takes."""
    if isinstance(node, yaml.ScalarNode) and re.search("[\ud800-\udfff]", node.value):
        raise YamlError("an escape is half of a surrogate pair", node.start_mark.line + 1)


def _name(node: yaml.Node) -> str:
    """Return the text of a key. Raises YamlError if it is empty or no scalar."""
    line = node.start_mark.line + 1
    if not isinstance(node, yaml.ScalarNode):
        kind = "list" if isinstance(node, yaml.SequenceNode) else "mapping"
        raise YamlError(f"a {kind} is used as a key, expected a name", line)
    _check_unicode(node)
    if node.tag not in _SCALARS:
        raise YamlError(f"the tag {node.tag.replace(_TAG, '!!')} is not supported here", line)
    if not node.value:
        raise YamlError("a key is empty, expected a name", line)
    return str(node.value)


def _scalar(
    kind: str, pattern: str, convert: Callable[[str], object]
) -> Callable[[yaml.ScalarNode], object]:
    """Return a converter of scalar nodes. Explicit tags (`!!int x`) need the pattern's check."""

    def value(node: yaml.ScalarNode) -> object:
        if not re.fullmatch(pattern, node.value):
            raise YamlError(f"{node.value!r:.60} is not {kind}", node.start_mark.line + 1)
        return convert(node.value)

    return value


def _integer(text: str) -> int | str:
    digits = text.replace("_", "")
    if len(digits) > _MAX_DIGITS:
        return text
    sign = -1 if digits.startswith("-") else 1
    digits = digits.lstrip("+-")
    bases = {"0x": 16, "0o": 8, "0b": 2}
    return sign * int(digits, bases.get(digits[:2], 10))


def _float(text: str) -> float:
    return float(re.sub(r"_|(?<![0-9])\.(?=[A-Za-z])", "", text))


_SCALARS: dict[str, Callable[[yaml.ScalarNode], object]] = {
    f"{_TAG}str": lambda node: node.value,
    f"{_TAG}merge": lambda node: node.value,
    f"{_TAG}null": lambda node: None,
    f"{_TAG}bool": _scalar("a boolean", "(?i:true|false)", lambda text: text.lower() == "true"),
    f"{_TAG}int": _scalar("an integer", _INTEGER.pattern, _integer),
    f"{_TAG}float": _scalar(
        "a number", f"{_FLOAT.pattern}|{EXPONENT_ONLY.pattern}|{_INTEGER.pattern}", _float
    ),
}
