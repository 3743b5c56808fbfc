"""Names of checkpoint folders. Whatever has another name belongs to the user and is never touched."""

from __future__ import annotations

import re
from pathlib import Path

PARTIAL, REMOVED = ".partial", ".removed"
TOKENIZER = "tokenizer"
"""Folder of a checkpoint's or model folder's own copy of its tokenizer."""
_STEP = re.compile(r"step_(\d{8})")


def step_name(step: int) -> str:
    """Return the name of the checkpoint of `step`."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Return the step of a checkpoint's folder."""
    match = _STEP.match(path.name)
    assert match is not None
    return int(match[1])


def step_folders(folder: Path, suffix: str = "") -> list[Path]:
    """Return the folders named step_XXXXXXXX (eight digits) plus `suffix`, in order of the steps."""
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.name.endswith(suffix)
        and _STEP.fullmatch(path.name.removesuffix(suffix))
        and path.is_dir()
    )
