"""Shard files: tensors of a model in safetensors, indexed by their position in the full model.

Any parallel layout can read what another wrote. Each rank writes one file of the parts it owns. A
part is a flat range of a box, which is a rectangle of a full parameter: weights are complete boxes,
a distributed optimizer's state is the range that its data-parallel rank keeps, so nothing is
gathered or copied between ranks. Each file's metadata holds the index of its boxes. megatron-core
knows the box of each parameter (`sharded_state_dict`). Its own file format is not used because it
contains pickles.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from safetensors import safe_open

from fastrlhf.config import ModelConfig
from fastrlhf.errors import UserError
from fastrlhf.parallel.mesh import Mesh

Tensor = torch.Tensor
Values = Callable[[torch.nn.Parameter], Mapping[str, tuple[Tensor, int]]]
"""Function of a parameter that returns kind -> (flat tensor, index of its first element).

The index is the position in the flattened parameter. Kinds are "weight" or those of optimizer
state.
"""


@dataclass(frozen=True)
class Box:
    """The rectangle at `offset` with `shape` of a parameter whose full shape is `whole`."""

    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def overlap(self, other: Box) -> Box | None:
        """Return the intersection with `other`, or None if it is empty."""
        ends = [
            (max(a, b), min(a + n, b + m))
            for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        ]
        if any(start >= stop for start, stop in ends):
            return None
        return Box(
            self.whole,
            tuple(start for start, _ in ends),
            tuple(stop - start for start, stop in ends),
        )

    def within(self, outer: Box) -> tuple[slice[int, int, int], ...]:
        """Return the index of this box in a tensor that holds the box `outer`."""
        starts = [a - b for a, b in zip(self.offset, outer.offset, strict=True)]
        return tuple(
            slice(start, start + size) for start, size in zip(starts, self.shape, strict=True)
        )


@dataclass(frozen=True)
class ParameterBox:
    """A box of a parameter of the full model that this rank holds."""

    key: str
    """The parameter's name in the full model."""
    box: Box
    is_copy: bool
    """True if another tensor- or pipeline-parallel rank writes the same elements."""
    is_padded: bool
    """True if vocabulary padding makes the first dimension depend on the layout.

    Its size may then differ from the stored one, and missing rows are 0.
    """


class SavedStage(Protocol):
    """A pipeline stage of a model that can be saved; `models.gpt.GPT` implements it."""

    mesh: Mesh
    model_config: ModelConfig
    vocab_size: int
    head_kind: Literal["lm", "scalar"]

    def parameter_boxes(self) -> Iterator[tuple[str, torch.nn.Parameter, list[ParameterBox]]]:
        """Yield each parameter's local name, tensor, and boxes, which the tensor holds in order."""
        ...


@dataclass(frozen=True)
class Part:
    """Elements start .. start + n of a flattened box; `data` [n] is a view of the live tensor."""

    kind: str
    parameter: ParameterBox
    start: int
    data: Tensor


def parts_of(
    stage: SavedStage, values: Values, skip: Callable[[str], bool] = lambda name: False
) -> Iterator[Part]:
    """Yield the parts of `values` of every parameter of a stage.

    Parameters for whose local name `skip` returns True are left out.
    """
    for name, parameter, boxes in stage.parameter_boxes():
        if skip(name):
            continue
        begin = 0
        for parameter_box in boxes:
            end = begin + parameter_box.box.numel
            for kind, (flat, first) in values(parameter).items():
                start, stop = max(begin, first), min(end, first + flat.numel())
                if start < stop:
                    data = flat[start - first : stop - first]
                    yield Part(kind, parameter_box, start - begin, data)
            begin = end


def weights(parameter: torch.nn.Parameter) -> dict[str, tuple[Tensor, int]]:
    """Return the parameter itself in the form of `Values`."""
    return {"weight": (parameter.detach().view(-1), 0)}


def owned(parts: Iterable[Part], mesh: Mesh, *, sharded_over_data: bool) -> Iterator[Part]:
    """Yield the parts that this rank writes.

    Parts that all data-parallel ranks hold are distributed among them. With `sharded_over_data`,
    each data-parallel rank holds different parts and writes them all.
    """
    for number, part in enumerate(parts):
        if not part.parameter.is_copy and (
            sharded_over_data or number % mesh.data_size == mesh.data_rank
        ):
            yield part


@dataclass(frozen=True)
class ShardFile:
    """Content of a shard file: host tensors by name, and the index of their boxes."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def snapshot(parts: Iterable[Part], *, copy: bool) -> ShardFile:
    """Return the parts on the host as the content of a shard file.

    `copy` False may leave views of live tensors, to be written before they change.
    """
    tensors, index = {}, {}
    for part in parts:
        name = f"{part.kind}/{part.parameter.key}/{','.join(map(str, part.parameter.box.offset))}"
        shape = part.parameter.box.shape if part.data.numel() == part.parameter.box.numel else (-1,)
        tensors[name] = part.data.to("cpu", copy=copy).view(shape)
        index[name] = [
            part.kind,
            part.parameter.key,
            part.parameter.box.whole,
            part.parameter.box.offset,
            part.parameter.box.shape,
            part.start,
        ]
    # A single entry: safetensors writes several in any order, and equal checkpoints should be equal
    # files.
    return ShardFile(tensors, {"shards": json.dumps(index)})


class _TensorFile(Protocol):
    """An open safetensors file."""

    def get_tensor(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class _Stored:
    """A part in a file."""

    handle: _TensorFile
    name: str
    start: int
    numel: int

    def read(self) -> Tensor:
        """Return its elements [n], mapped from the file: only accessed pages are read."""
        return self.handle.get_tensor(self.name).view(-1)


class ShardReader:
    """Reads parts from a set of shard files, which it indexes by kind and key."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self._stored: dict[tuple[str, str], dict[Box, list[_Stored]]] = {}
        self.folder = str(folder)
        for file in names:
            handle = safe_open(folder / file, framework="pt")
            for name, entry in json.loads(handle.metadata()["shards"]).items():
                kind, key, whole, offset, shape, start = entry
                numel = math.prod(handle.get_slice(name).get_shape())
                boxes = self._stored.setdefault((kind, key), {})
                box = Box(tuple(whole), tuple(offset), tuple(shape))
                boxes.setdefault(box, []).append(_Stored(handle, name, start, numel))

    @torch.no_grad()
    def fill(self, part: Part) -> None:
        """Copy the stored elements into `part.data`, whichever boxes they were stored as.

        Raises UserError if the files have no such tensor, one of another shape, or only some of its
        elements.
        """
        boxes = self._stored.get((part.kind, part.parameter.key))
        if boxes is None:
            raise UserError(
                f"{self.folder}: holds no {part.kind} of {part.parameter.key}; is it a checkpoint of this model?"
            )
        whole = next(iter(boxes)).whole
        fixed = slice(1 if part.parameter.is_padded else 0, None)
        if whole[fixed] != part.parameter.box.whole[fixed]:
            raise UserError(
                f"{self.folder}: {part.parameter.key} is {list(whole)} there, but "
                f"{list(part.parameter.box.whole)} in this model; give the model section the shape that was saved"
            )
        if part.parameter.box in boxes:
            found = self._fill_range(part, boxes[part.parameter.box])
            expected = part.data.numel()
        else:
            found = self._fill_from_others(part, boxes)
            saved = part.parameter.box.overlap(Box(whole, (0,) * len(whole), whole))
            expected = saved.numel if saved is not None else 0
        if found != expected:
            raise UserError(
                f"{self.folder}: holds {found} of {expected} elements of the {part.kind} of {part.parameter.key}"
            )

    def _fill_range(self, part: Part, stored: list[_Stored]) -> int:
        """Fill `part` from ranges of the same box; return the number of elements found."""
        found = 0
        for piece in stored:
            start, stop = (
                max(piece.start, part.start),
                min(piece.start + piece.numel, part.start + part.data.numel()),
            )
            if start < stop:
                data = piece.read()[start - piece.start : stop - piece.start]
                part.data[start - part.start : stop - part.start].copy_(data)
                found += stop - start
        return found

    def _fill_from_others(self, part: Part, boxes: Mapping[Box, list[_Stored]]) -> int:
        """Fill `part` from boxes of another layout; return how much of its box was found."""
        whole_box: Tensor | None = None
        found = 0
        for box, stored in boxes.items():
            overlap = part.parameter.box.overlap(box)
            if overlap is None or sum(piece.numel for piece in stored) != box.numel:
                continue
            pieces = sorted(stored, key=lambda piece: piece.start)
            source = (
                pieces[0].read()
                if len(pieces) == 1
                else torch.cat([piece.read() for piece in pieces])
            )
            if whole_box is None:
                whole_box = torch.zeros(part.parameter.box.shape, dtype=source.dtype)
            whole_box[overlap.within(part.parameter.box)] = source.view(box.shape)[
                overlap.within(box)
            ]
            found += overlap.numel
        if whole_box is None:
            part.data.zero_()
        else:
            part.data.copy_(whole_box.view(-1)[part.start : part.start + part.data.numel()])
        return found
