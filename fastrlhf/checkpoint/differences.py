"""Differences between a run and the checkpoint that it resumes, for the log."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

import yaml

import fastrlhf


def package_versions() -> dict[str, str]:
    """Return the versions that a checkpoint records."""
    packages = ("torch", "megatron-core", "safetensors")
    return {
        "fastrlhf": fastrlhf.__version__,
        **{name: importlib.metadata.version(name) for name in packages},
    }


def differences(path: Path, versions_before: Mapping[str, str], config_text: str) -> list[str]:
    """Return settings and versions that have changed since the checkpoint, one line each."""
    now = _flat(yaml.safe_load(config_text))
    try:
        before = _flat(yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError):
        before = now  # only logged: an unreadable copy must not stop a resume
    lines = [
        f"{key} {now.get(key)} (was {before.get(key)})"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    versions = package_versions()
    lines += [
        f"{name} {versions.get(name, 'not recorded')} (was {old} in {path / 'state.json'})"
        for name, old in versions_before.items()
        if versions.get(name) != old
    ]
    return lines


def _flat(tree: object, prefix: str = "") -> dict[str, object]:
    """Return the leaves of nested dictionaries by dotted key."""
    if not isinstance(tree, dict):
        return {prefix: tree} if prefix else {}
    return {
        key: value
        for name, child in tree.items()
        for key, value in _flat(child, f"{prefix}.{name}".strip(".")).items()
    }
