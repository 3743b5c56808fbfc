"""The start of a command on several ranks: they agree on what they run, then join their groups.

Out of scope: what a command checks for itself, on one rank or many.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

import fastrlhf
from fastrlhf.config import COMMANDS, Config
from fastrlhf.data.fingerprint import fingerprint, fingerprints, weights_fingerprint
from fastrlhf.errors import UserError
from fastrlhf.models.loading import find_model
from fastrlhf.parallel import mesh as meshes
from fastrlhf.parallel import rendezvous
from fastrlhf.parallel.agreement import Folder, check_facts, check_shared
from fastrlhf.parallel.mesh import Mesh

logger = logging.getLogger(__name__)
_PACKAGES = ("megatron-core", "numpy", "tokenizers", "transformers")
_DATA_KEYS = (
    "data.tokenizer",
    "data.train",
    "data.valid",
    "data.demonstrations",
    "data.prompts",
    "data.prompt_prefix",
    "data.pretrain",
    "eval.baseline_prefix",
)
_MODEL_KEYS = (
    "model.load",
    "model.hf",
    "ppo.reward_model",
    "ppo.value_model",
    "ppo.reference_model",
    "eval.baseline",
    "eval.reward_model",
)
_FUNCTION_KEYS = ("ppo.reward_function", "eval.judge")
_OF_ONE_NODE = {
    "FASTRLHF_SKIP_EXT",
    "FASTRLHF_FORCE_CUDA",
    "NCCL_DEBUG_FILE",
    "NCCL_HOSTID",
    "NCCL_IB_HCA",
    "NCCL_SOCKET_IFNAME",
    "NCCL_TOPO_FILE",
    "NCCL_TOPO_DUMP_FILE",
    "NCCL_GRAPH_DUMP_FILE",
    "NCCL_RAS_ADDR",
}
"""Variables that may differ: names of a node's devices and files, and those of an installation."""


def start(command: str, config: Config) -> Mesh:
    """Check that all ranks run the same `command` on the same inputs, and join the process groups.

    Compared are the configuration, versions, variables, data files, tokenizer and models.
    output_dir must be one folder for all ranks; data.cache may be one of each node. Raises the same
    UserError on every rank.
    """
    timeout_s = config.parallel.startup_timeout_s
    session = rendezvous.begin_run(timeout_s)
    if session.world_size > 1:
        is_first_of_node = os.environ.get("LOCAL_RANK", "0") == "0"
        of_node = node_facts(command, config) if is_first_of_node else {}
        check_facts(session, facts(command, config), of_node, timeout_s)
        folders = [Folder("output_dir", Path(config.output_dir))]
        if config.data.cache is not None and _reads(command, "data.cache"):
            folders.append(Folder("data.cache", Path(config.data.cache), per_node=True))
        for folder in check_shared(session, folders, timeout_s):
            logger.info(
                "note: %s %s is not shared; each node tokenizes for itself", folder.key, folder.path
            )
    return meshes.initialize(config.parallel, config.train.seed)


def facts(command: str, config: Config) -> dict[str, str]:
    """Return what must be equal on all ranks and is cheap to know: settings, versions, variables."""
    known = {"command": command}
    for section, settings in config.model_dump(mode="json").items():
        values = settings if isinstance(settings, dict) else {}
        known |= {f"{section}.{key}": _text(value) for key, value in values.items()}
    known["output_dir"] = config.output_dir
    known |= {f"version of {name}": _version(name) for name in _PACKAGES}
    known["version of torch"] = torch.__version__
    known["version of fastrlhf"] = fastrlhf.__version__
    known["version of Python"] = ".".join(map(str, sys.version_info[:2]))
    known["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    known |= {
        f"variable {name}": value
        for name, value in os.environ.items()
        if name.startswith(("FASTRLHF_", "NCCL_")) and name not in _OF_ONE_NODE
    }
    return known


def node_facts(command: str, config: Config) -> dict[str, str]:
    """Return what must be equal on all nodes: contents of data files, tokenizer, models and code."""
    named = {(key, path) for key in _DATA_KEYS for path in _paths(command, config, key)}
    prints = fingerprints({Path(path) for _, path in named})
    known = {f"contents of {key} {path}": prints[Path(path)] for key, path in named}
    for key in _MODEL_KEYS:
        for path in _paths(command, config, key):
            known[f"contents of {key} {path}"] = _model(path)
    for key in _FUNCTION_KEYS:
        for spec in _paths(command, config, key):
            known[f"contents of {key} {spec}"] = _module(spec.partition(":")[0])
    root = Path(fastrlhf.__file__).parent
    sources = [str(fingerprint(path)) for path in sorted(root.rglob("*.py"))]
    known["sources of fastrlhf"] = f"{len(sources)} files, hash {_hash(sources)}"
    return known


def _hash(parts: list[str]) -> str:
    import hashlib

    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def _reads(command: str, key: str) -> bool:
    row = COMMANDS[command]
    return key.split(".")[0] in row.sections and key not in row.unread


def _paths(command: str, config: Config, key: str) -> list[str]:
    """Return the values of a setting that holds a path, paths, or path -> weight."""
    value = config.setting(key) if _reads(command, key) else None
    if value is None:
        return []
    return [value] if isinstance(value, str) else [str(path) for path in _each(value)]


def _each(value: object) -> Iterable[object]:
    assert isinstance(value, (list, dict))
    return value


def _model(path: str) -> str:
    try:
        folder = find_model(path).path
    except UserError as error:  # the command's own check says what to do
        return str(error)
    return weights_fingerprint(folder) if folder.is_dir() else fingerprint(folder)


def _module(name: str) -> str:
    """Return the fingerprint of a module's file, found as the import of it would."""
    stem = name.replace(".", os.sep)
    for base in (*sys.path, os.getcwd()):
        for path in (Path(base, stem, "__init__.py"), Path(base, f"{stem}.py")):
            if path.is_file():
                return fingerprint(path)
    return "no file"


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
