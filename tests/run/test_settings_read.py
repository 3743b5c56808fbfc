"""Every setting is read by some code outside config/."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

import fastrlhf
from fastrlhf.config import COMMANDS, Config

ROOT = Path(fastrlhf.__file__).parent
SECTIONS = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}
OWNERS = {model.__name__: name for name, model in SECTIONS.items()}
READ_INSIDE_CONFIG = {
    # Only 1 is accepted: the key reserves the name, and its error names the alternatives.
    "parallel.context": "fastrlhf/config/sections.py",
    # `FAMILIES` fills the fields that the rest of the package reads.
    "model.family": "fastrlhf/config/families.py",
}


class Readers(ast.NodeVisitor):
    """Collects `X.key` where X is known to be a section.

    X is `config.section`, a name or attribute annotated with the section's class, or one that was
    assigned from such an expression in the same file.
    """

    def __init__(self, tree: ast.Module) -> None:
        self.read: set[str] = set()
        self.names: dict[str, set[str]] = {}
        for _ in range(3):  # an assignment may precede the one that it depends on
            for node in ast.walk(tree):
                self._learn(node)
        self.visit(tree)

    def section(self, node: ast.expr | None) -> set[str]:
        if isinstance(node, ast.Attribute) and _last(node.value) in ("config", "settings"):
            return {node.attr} & SECTIONS.keys()
        if isinstance(node, ast.Attribute):
            return self.names.get(node.attr, set())
        if isinstance(node, ast.Name):
            return self.names.get(node.id, set())
        if isinstance(node, ast.BoolOp):  # schedule or self.config.schedule
            return set().union(*map(self.section, node.values))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            return self.section(node.func.value) if node.func.attr == "model_copy" else set()
        return set()

    def _learn(self, node: ast.AST) -> None:
        if isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation is not None:
            name = node.arg if isinstance(node, ast.arg) else _last(node.target)
            words = ast.unparse(node.annotation).replace("|", " ").split()
            self._add(name, {OWNERS[word] for word in words if word in OWNERS})
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=True))
                for left, right in pairs:
                    self._add(_last(left), self.section(right))

    def _add(self, name: str, sections: set[str]) -> None:
        if name and sections:
            self.names.setdefault(name, set()).update(sections)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self.read |= {f"{section}.{node.attr}" for section in self.section(node.value)}
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        function = _last(node.func)
        if function in ("size", "setting", "check_batch"):
            self.read |= {a.value for a in node.args if isinstance(a, ast.Constant)}
        self.generic_visit(node)


def _last(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def keys() -> Iterator[str]:
    for section, model in SECTIONS.items():
        yield from (f"{section}.{name}" for name in model.model_fields)


def read_keys(folder: Path) -> set[str]:
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        if "config" not in path.relative_to(ROOT).parts:
            found |= Readers(ast.parse(path.read_text(encoding="utf-8"))).read
    # Sections' own properties read these for the code that uses them.
    properties = {"ppo.reward_models": "ppo.reward_model"}
    # The rows of config/commands.py name sizes that run/train.py reads through check_batch.
    batches = {key for row in COMMANDS.values() for key in getattr(row, "batch_keys", ())}
    return found | {properties[key] for key in found & properties.keys()} | batches


def test_every_setting_is_read():
    assert set(keys()) - read_keys(ROOT) == READ_INSIDE_CONFIG.keys()


def test_the_reader_tells_sections_apart():
    code = """
def f(config, shape: ModelConfig, seed):
    ppo, data = config.ppo, config.data
    train = config.train
    return ppo.clip, data.valid, train.steps, shape.bias, config.log.samples, seed.gamma
"""
    assert Readers(ast.parse(code)).read == {
        "ppo.clip",
        "data.valid",
        "train.steps",
        "model.bias",
        "log.samples",
    }


def test_unread_keys_exist_and_are_of_the_commands_sections():
    for row in COMMANDS.values():
        for key in row.unread:
            assert key in set(keys()), key
            assert key.split(".")[0] in row.sections, (row.name, key)
        assert len(set(row.unread)) == len(row.unread), row.name
