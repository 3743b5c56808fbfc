"""Reads the tensors of a Hugging Face folder, one slice at a time, and refuses what is not safe or not whole.

Safetensors files (one, or shards with an index) are read in place; a .gguf file is dequantised whole by transformers.
Pickled weights (.bin) are never opened.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from fastrlhf.errors import UserError
from fastrlhf.models.hf.shapes import gguf_arguments

Tensor = torch.Tensor
_FLOATS = {"F64", "F32", "F16", "BF16"}
# Buffers that old versions of transformers wrote: causal masks and rotary frequencies, which are computed.
_BUFFERS = re.compile(r"(^|\.)(attn\.(masked_)?bias|rotary_emb\.inv_freq)$")
_CURE = (
    "pickled weights can run code when they are loaded, so they are not read; convert them where you trust them: "
    "python -c \"import transformers; transformers.AutoModelForCausalLM.from_pretrained('FOLDER')"
    ".save_pretrained('NEW_FOLDER')\""
)


class Tensors(Protocol):
    """Named tensors of one model: their stored shapes, and slices of them on the CPU."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, index: tuple[slice, ...]) -> Tensor: ...


class SafetensorsFolder:
    """The tensors of a folder of safetensors files. Names get the base model's prefix where the file left it out."""

    def __init__(self, path: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[Any, str]] = {}
        for file in _files(path):
            try:
                handle = safe_open(file, framework="pt")
                stored = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
            except SafetensorError as error:
                raise UserError(
                    f"{file}: not a whole safetensors file ({error}); copy it again"
                ) from None
            for name, tensor in stored.items():
                self._add(file, handle, name, tensor)
        self._prefix()

    def _add(self, file: Path, handle: Any, name: str, tensor: Any) -> None:
        if _BUFFERS.search(name):
            return
        if name in self.shapes:
            raise UserError(f"{file}: tensor {name} is in another file of the folder too; keep one")
        if tensor.get_dtype() not in _FLOATS:
            kinds = ", ".join(sorted(_FLOATS))
            raise UserError(
                f"{file}: tensor {name} is {tensor.get_dtype()}; expected one of {kinds} (not quantised)"
            )
        self.shapes[name] = tuple(tensor.get_shape())
        self._places[name] = (handle, name)

    def _prefix(self) -> None:
        """Names of a base model saved by itself (the published GPT-2) lack "transformer." or "model."."""
        for mark, prefix in (("wte.weight", "transformer."), ("embed_tokens.weight", "model.")):
            if mark in self.shapes:
                whole = {
                    name: name if name.startswith(("lm_head.", "score.")) else prefix + name
                    for name in self.shapes
                }
                self.shapes = {whole[name]: shape for name, shape in self.shapes.items()}
                self._places = {whole[name]: place for name, place in self._places.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """The slice `index` of tensor `name`; only its bytes are read."""
        handle, stored = self._places[name]
        return handle.get_slice(stored)[index]


class GGUFTensors:
    """The tensors of a .gguf file, dequantised to fp32 and held in memory whole."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM

        stored = _check_gguf(path)
        folder, gguf = gguf_arguments(path)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
            **gguf,
        )
        model, report = loaded
        if report["missing_keys"]:
            raise UserError(
                f"{path}: tensor {sorted(report['missing_keys'])[0]} is missing from the file"
            )
        self._tensors = model.state_dict()
        if model.config.tie_word_embeddings:
            del self._tensors["lm_head.weight"]
        if stored != len(self._tensors):
            raise UserError(
                f"{path}: {stored} tensors in the file, of which transformers uses {len(self._tensors)}; "
                "use the safetensors version of this model"
            )
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(tensor.shape) for name, tensor in self._tensors.items()
        }

    def read(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """The slice `index` of tensor `name`."""
        return self._tensors[name][index]


def open_tensors(path: str | Path) -> Tensors:
    """The tensors at `path`: a folder of safetensors files, or a .gguf file. Raises `UserError` if they cannot be
    read.
    """
    path = Path(path)
    return GGUFTensors(path) if path.suffix == ".gguf" else SafetensorsFolder(path)


def _files(path: Path) -> list[Path]:
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(
                f"{index}: not a safetensors index ({error!r}); copy it again"
            ) from None
        files = [path / name for name in names]
    elif single.is_file():
        files = [single]
    elif any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        raise UserError(f"{path}: no safetensors, only .bin weights: {_CURE}")
    else:
        raise UserError(
            f"{path}: no weights; expected model.safetensors, or shards with model.safetensors.index.json"
        )
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: missing, but {index.name} names it; copy the whole folder")
    return files


def _check_gguf(path: Path) -> int:
    """Refuses what transformers would skip in silence; returns the number of tensors in the file."""
    lacking = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(
            f"{path}: reading GGUF files needs more packages: pip install {' '.join(lacking)}"
        )
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except ValueError as error:
        raise UserError(f"{path}: not a GGUF file ({error})") from None
    for name, field in reader.fields.items():
        if name.endswith(".rope.scaling.type") and field.contents() != "none":
            raise UserError(
                f"{path}: {name} = {field.contents()} is not supported; expected plain rotary embeddings"
            )
    if any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        raise UserError(
            f"{path}: tensor rope_freqs.weight (scaled rotary embeddings) is not supported"
        )
    return len(reader.tensors)
