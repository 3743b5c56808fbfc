"""Tensors of a Hugging Face folder, read one slice at a time from complete and safe files only.

Safetensors files (one, or shards with an index) are read in place; a .gguf file is dequantized in
full by transformers. Pickled weights (.bin) are never opened.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open

from fastrlhf.checkpoint.integrity import is_inside
from fastrlhf.config.field_types import MAX_NAME_BYTES
from fastrlhf.data.files import printable
from fastrlhf.data.foreign_errors import foreign_errors
from fastrlhf.errors import UserError
from fastrlhf.models.hf.shapes import gguf_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tensor = torch.Tensor
_FLOATS = {"F64", "F32", "F16", "BF16"}
# Buffers in files of old versions of transformers: causal masks and rotary frequencies. They are
# computed here.
_BUFFERS = re.compile(r"(^|\.)(attn\.(masked_)?bias|rotary_emb\.inv_freq)$")
_CONVERT_PICKLES = (
    "pickled weights can run code when they are loaded, so they are not read; "
    "if you trust them, convert them: "
    "python -c \"import transformers; transformers.AutoModelForCausalLM.from_pretrained('FOLDER')"
    ".save_pretrained('NEW_FOLDER')\""
)


class Tensors(Protocol):
    """Named tensors of one model: their stored shapes, and slices of them on the CPU."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """Return the slice `index` of tensor `name`."""
        ...


class SafetensorsFolder:
    """The tensors of a folder of safetensors files.

    Names without the base model's prefix get it.
    """

    def __init__(self, path: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._stored: dict[str, tuple[safe_open, str]] = {}
        for file in _files(path):
            try:
                handle = safe_open(file, framework="pt")
                names = list(handle.keys())
                stored = {name: handle.get_slice(name) for name in names}
            except SafetensorError as error:
                raise UserError(
                    f"{file}: not a complete safetensors file ({error}); copy it again"
                ) from None
            for name, tensor in stored.items():
                self._add(file, handle, name, tensor.get_dtype(), tensor.get_shape())
        self._add_prefix()

    def _add(
        self, file: Path, handle: safe_open, name: str, dtype: str, shape: Sequence[int]
    ) -> None:
        if _BUFFERS.search(name):
            return
        if name in self.shapes:
            raise UserError(f"{file}: tensor {name} is in another file of the folder too; keep one")
        if dtype not in _FLOATS:
            kinds = ", ".join(sorted(_FLOATS))
            raise UserError(
                f"{file}: tensor {name} is {dtype}; expected one of {kinds} (not quantized)"
            )
        self.shapes[name] = tuple(shape)
        self._stored[name] = (handle, name)

    def _add_prefix(self) -> None:
        """Add "transformer." or "model." to the names of a base model saved without its head.

        The published GPT-2 is one.
        """
        for mark, prefix in (("wte.weight", "transformer."), ("embed_tokens.weight", "model.")):
            if mark in self.shapes:
                prefixed = {
                    name: name if name.startswith(("lm_head.", "score.")) else prefix + name
                    for name in self.shapes
                }
                self.shapes = {prefixed[name]: shape for name, shape in self.shapes.items()}
                self._stored = {prefixed[name]: stored for name, stored in self._stored.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """Return the slice `index` of tensor `name`; only its bytes are read."""
        handle, stored = self._stored[name]
        return handle.get_slice(stored)[index]


class GGUFTensors:
    """The tensors of a .gguf file, all dequantized to fp32 in memory."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM

        stored = _check_gguf(path)
        folder, gguf = gguf_arguments(path)
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
            **gguf,
        )
        model, report = cast("tuple[PreTrainedModel, dict[str, set[str]]]", loaded)
        if report["missing_keys"]:
            raise UserError(
                f"{path}: tensor {sorted(report['missing_keys'])[0]} is missing from the file"
            )
        self._tensors = model.state_dict()
        if model.config.tie_word_embeddings:
            del self._tensors["lm_head.weight"]
        if stored != len(self._tensors):
            raise UserError(
                f"{path}: {stored} tensors in the file, of which transformers uses "
                f"{len(self._tensors)}; use the safetensors version of this model"
            )
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(tensor.shape) for name, tensor in self._tensors.items()
        }

    def read(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """Return the slice `index` of tensor `name`."""
        return self._tensors[name][index]


def open_tensors(path: str | Path) -> Tensors:
    """Open the tensors at `path`, a folder of safetensors files or a .gguf file.

    Raises UserError if they cannot be read.
    """
    path = Path(path)
    return GGUFTensors(path) if path.suffix == ".gguf" else SafetensorsFolder(path)


def _files(path: Path) -> list[Path]:
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.is_file():
        files = [path / name for name in _indexed_names(index)]
    elif single.is_file():
        files = [single]
    elif any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        raise UserError(f"{path}: no safetensors, only .bin weights: {_CONVERT_PICKLES}")
    else:
        raise UserError(
            f"{path}: no weights; expected model.safetensors, or shards with "
            "model.safetensors.index.json"
        )
    for file in files:
        if not file.is_file():
            raise UserError(
                printable(f"{file}: missing, but {index.name} names it; copy the complete folder")
            )
    return files


def _indexed_names(index: Path) -> list[str]:
    """Return the names of the files that a safetensors index maps tensors to."""

    def damaged(reason: str) -> UserError:
        return UserError(f"{index}: not a safetensors index ({reason}); copy it again")

    with foreign_errors(damaged):
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        for name in names:
            if not isinstance(name, str):
                raise damaged(f"it names the file {name!r:.60}")
            if len(name) > MAX_NAME_BYTES:
                raise damaged(f"it names {name!r:.60}..., too long for a file")
            if not is_inside(name):
                raise damaged(f"it names {name!r:.60}, outside the folder")
    return sorted(names)


def _check_gguf(path: Path) -> int:
    """Reject what transformers would silently skip; return the number of tensors in the file."""
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
                f"{path}: {name} = {field.contents()} is not supported; "
                "expected plain rotary embeddings"
            )
    if any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        raise UserError(
            f"{path}: tensor rope_freqs.weight (scaled rotary embeddings) is not supported"
        )
    return len(reader.tensors)
