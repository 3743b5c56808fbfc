"""Inputs of text: configurations, overrides, environment variables and logs of an earlier run."""

from __future__ import annotations

import json
import math
import os
import random
import re
from functools import partial
from pathlib import Path
from typing import Any

import annotated_types
import torch
import yaml
from fuzz.mutations import EXTREMES, mutate_file, mutate_text, mutate_tree, tree_text
from fuzz.outcomes import Case, Target
from pydantic import BaseModel

from fastrlhf.config import Config, LogConfig, dump_config, load_config
from fastrlhf.config.environment import ENVIRONMENT, check_launch
from fastrlhf.config.yaml_file import known_keys
from fastrlhf.ops import logprobs
from fastrlhf.training.metrics import MetricsLog, SampleLog

ROOT = Path(__file__).parents[2]
CONFIGS = [yaml.safe_load(path.read_text()) for path in sorted(ROOT.glob("configs/**/*.yaml"))]
KEYS = known_keys(Config)
MODEL_PATHS = [f"{tree['model']['load']}: " for tree in CONFIGS if "load" in tree["model"]]
"""The shape of a model is read from these, so a refusal may be about them."""


def check_bounds(section: BaseModel) -> None:
    """Check every number of a resolved configuration against the bounds that its field declares."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            check_bounds(value)
        if isinstance(value, float):
            assert math.isfinite(value), (name, value)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        for bound in field.metadata:
            if isinstance(bound, annotated_types.Ge):
                assert value >= bound.ge, (name, value)
            if isinstance(bound, annotated_types.Gt):
                assert value > bound.gt, (name, value)
            if isinstance(bound, annotated_types.Le):
                assert value <= bound.le, (name, value)
            if isinstance(bound, annotated_types.Lt):
                assert value < bound.lt, (name, value)


def check_config(tree: Any, path: Path, config: Config) -> None:
    """Check bounds, that the file read back is equal, and each value of `tree` that was given."""
    check_bounds(config)
    again = path.with_name("again.yaml")
    again.write_text(dump_config(config), encoding="utf-8")
    assert load_config(again) == config
    resolved = config.model_dump()
    for section, values in (tree or {}).items():
        for key, value in values.items() if isinstance(values, dict) else ():
            if type(value) is type(got := resolved[section][key]) and not isinstance(value, dict):
                assert got == value, (section, key, got, value)


def make_yaml(rng: random.Random, folder: Path) -> Case:
    """Write a YAML file: a changed tree, changed text, an alias bomb, or no file."""
    path = folder / "run.yaml"
    tree: Any = rng.choice(CONFIGS)
    how = rng.randrange(10)
    if how < 5:
        tree = mutate_tree(tree, rng)
        path.write_text(tree_text(tree), encoding="utf-8")
        return _config_case(path, tree, "tree")
    text = yaml.safe_dump(tree).encode()
    if how < 8:
        for _ in range(rng.choice((1, 1, 2))):
            text = mutate_text(text, rng)
        path.write_bytes(text)
        return _config_case(path, None, "text")
    if how == 8:
        depth, width = rng.choice(((3, 5), (9, 9), (30, 2), (5, 200)))
        bomb = ["a0: &a0 [x]"]
        bomb += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * width)}]" for i in range(1, depth)]
        path.write_text(text.decode() + "\n".join(bomb) + f"\nlog: *a{depth - 1}\n")
        return _config_case(path, None, "aliases")
    path.write_bytes(text)
    kept = mutate_file(path, rng)
    return _config_case(path, tree if kept else None, "file")


def _config_case(path: Path, tree: Any, about: str) -> Case:
    names = [str(path), *MODEL_PATHS]
    return Case(partial(load_config, path), partial(check_config, tree, path), names, about)


def make_override(rng: random.Random, folder: Path) -> Case:
    """Write an intact file and change settings of it on the command line."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(rng.choice(CONFIGS)))
    overrides, given = [], {}
    for _ in range(rng.choice((1, 1, 2))):
        key, value = rng.choice(KEYS), rng.choice(EXTREMES)
        if rng.random() < 0.3:
            value = rng.choice((1, 2, 4, 0.5, True, "a/b", ["a"]))
        text = value if isinstance(value, str) and rng.random() < 0.7 else tree_text(value)
        override = f"{key}={text}"
        if rng.random() < 0.2:
            override = mutate_text(override.encode("utf-8", "replace"), rng).decode(
                "utf-8", "surrogateescape"
            )
        else:
            given[key] = value
        overrides.append(override.replace("\0", ""))  # an argument cannot hold NUL

    def check(config: Config) -> None:
        check_config(None, path, config)
        for key, value in given.items():
            if (
                "." in key
                and type(value) is type(got := config.setting(key))
                and type(value) in (int, float, bool)
            ):
                assert got == value, (key, got, value)

    names = [str(path), "override '"]
    return Case(partial(load_config, path, overrides), check, names, "; ".join(overrides)[:200])


_VALUES = [
    "",
    "auto",
    "torch",
    "cpu",
    "triton",
    "cuda",
    "avx2",
    "avx512",
    "default",
    "0",
    "1",
    "64",
    "512",
]
_VALUES += [
    "-1",
    "1e400",
    "nan",
    "inf",
    "1e-5",
    "0x10",
    "\u0661",
    " 1 ",
    "AUTO",
    "9" * 400,
    "a" * 5000,
    "\x1b[31m",
    "\n",
]
_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


def make_environment(rng: random.Random, folder: Path) -> Case:
    """Set variables; the op runs under them."""
    names = [*ENVIRONMENT, "FASTRLHF_BACKENDS", *_RANK]
    chosen = {rng.choice(names): rng.choice(_VALUES) for _ in range(rng.choice((1, 1, 2)))}
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 6, 2])

    def run() -> torch.Tensor:
        check_launch(os.environ)
        return logprobs(logits, labels).logprobs

    def check(found: torch.Tensor) -> None:
        expected = logits.double().log_softmax(-1)[torch.arange(3), labels]
        assert torch.allclose(found.double(), expected, atol=1e-5)

    shown = ", ".join(f"{name}={value!r:.30}" for name, value in chosen.items())
    for name in ("RANK", "LOCAL_RANK"):  # other ranks than 0 print nothing
        if re.fullmatch("[0-9]+", rank := chosen.get(name, "0").strip()) and int(rank):
            chosen.pop(name)
    return Case(run, check, list(chosen) or ["-"], shown, chosen)


def make_log(rng: random.Random, folder: Path) -> Case:
    """Write metrics.jsonl or samples.jsonl of an earlier run and resume it at step 3.

    A log never stops a run, so nothing is refused with status 2: a line is kept, dropped, or moved
    to the file .broken.
    """
    key, name = rng.choice((("step", "metrics.jsonl"), ("iteration", "samples.jsonl")))
    path = folder / name
    rows: list[Any] = [{key: i, "loss": 1.0 / (i + 1), "text": "caf\u00e9"} for i in range(6)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    how = rng.randrange(10)
    if how < 5:
        lines = [tree_text(mutate_tree(row, rng) if rng.random() < 0.5 else row) for row in rows]
        path.write_text("\n".join(lines) + rng.choice(("", "\n")))
    else:
        path.write_bytes(mutate_text(content, rng) if how < 8 else content)
    if how == 9:
        mutate_file(path, rng)
    before = path.read_bytes() if path.is_file() else b""

    def run() -> None:
        if key == "iteration":
            SampleLog(path)(4, [{"prompt": "p"}])
            return
        section = LogConfig(tensorboard=False, progress=False)
        with MetricsLog(
            folder, section, title="t", total_steps=9, start_step=3, is_main=True
        ) as log:
            log.record(4, {"loss": 2.0, "nan": math.nan})

    def check(_: None) -> bool:
        if not path.is_file():
            return True
        after = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert after[-1][key] == 4
        kept = [row for row in map(_plain, before.split(b"\n"), [key] * 10**6) if row is not None]
        expected = [row for row in kept if row[key] <= 3]
        assert repr(after[:-1]) == repr(expected), (after[:-1], expected)
        return path.with_name(f"{name}.broken").exists()

    return Case(run, check, [str(path)], name)


def _plain(line: bytes, key: str) -> dict[str, Any] | None:
    try:
        row = json.loads(
            line.strip(b"\0 \t\r").decode(),
            parse_int=lambda d: int(d) if len(d) < 300 else math.inf,
        )
    except (ValueError, RecursionError):
        return None
    number = row.get(key) if isinstance(row, dict) else None
    plain = isinstance(number, int | float) and not isinstance(number, bool)
    return row if plain and math.isfinite(number) else None  # type: ignore[arg-type,return-value]


TARGETS = [
    Target("yaml", make_yaml),
    Target("overrides", make_override),
    Target("environment", make_environment),
    Target("logs", make_log),
]
