"""Tensors of a model in safetensors files, by their place in the whole model: any layout reads what another wrote.

Every rank writes one file of the parts it owns. A part is a flat range of a box (a rectangle of a whole parameter):
weights are whole boxes, a distributed optimizer's state is the range that its data-parallel rank keeps, so nothing is
gathered or copied between ranks. The index of the boxes is in each file's own metadata. megatron-core says which box a
parameter is (`sharded_state_dict`); its own file format is left out on purpose: it is made of pickles.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import safe_open

from fastrlhf.config import ModelConfig
from fastrlhf.errors import UserError
from fastrlhf.parallel.mesh import Mesh

Tensor = torch.Tensor
Values = Callable[[torch.nn.Parameter], Mapping[str, tuple[Tensor, int]]]
"""What is stored of a parameter: kind -> (flat tensor, its first element's position in the flattened parameter)."""


@dataclass(frozen=True)
class Box:
    """The rectangle at `offset` with `shape` of a parameter whose whole shape is `whole`."""

    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def overlap(self, other: Box) -> Box | None:
        """The rectangle that both cover, as a part of this one; None if there is none."""
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

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Where this box stands in a tensor of the box `outer`."""
        starts = [a - b for a, b in zip(self.offset, outer.offset, strict=True)]
        return tuple(
            slice(start, start + size) for start, size in zip(starts, self.shape, strict=True)
        )


@dataclass(frozen=True)
class ParameterBox:
    """A box of a parameter of the whole model, as one rank holds it."""

    key: str
    """The parameter's name in the whole model."""
    box: Box
    is_copy: bool
    """Another tensor- or pipeline-parallel rank holds the same elements, and writes them."""
    is_padded: bool
    """The first dimension depends on the layout (vocabulary padding): sizes may differ, and missing rows are 0."""


class SavedStage(Protocol):
    """What is saved of a pipeline stage of a model; `models.gpt.GPT` implements it."""

    mesh: Mesh
    model_config: ModelConfig
    vocab_size: int
    head_kind: Literal["lm", "scalar"]

    def parameter_boxes(self) -> Iterator[tuple[str, torch.nn.Parameter, list[ParameterBox]]]:
        """Yield each parameter's local name, its tensor, and the boxes that the tensor holds one after another."""
        ...


@dataclass(frozen=True)
class Part:
    """Elements start .. start + data.numel() of a flattened box; `data` [n] is a view of the live tensor."""

    kind: str
    place: ParameterBox
    start: int
    data: Tensor


def parts_of(
    stage: SavedStage, values: Values, skip: Callable[[str], bool] = lambda name: False
) -> Iterator[Part]:
    """Yield the parts of `values` of every parameter of a stage, except those whose local name `skip` holds for."""
    for name, parameter, places in stage.parameter_boxes():
        if skip(name):
            continue
        begin = 0
        for place in places:
            end = begin + place.box.numel
            for kind, (flat, first) in values(parameter).items():
                start, stop = max(begin, first), min(end, first + flat.numel())
                if start < stop:
                    yield Part(kind, place, start - begin, flat[start - first : stop - first])
            begin = end


def weights(parameter: torch.nn.Parameter) -> dict[str, tuple[Tensor, int]]:
    """The parameter itself, as `parts_of` wants it."""
    return {"weight": (parameter.detach().view(-1), 0)}


def owned(parts: Iterable[Part], mesh: Mesh, *, sharded_over_data: bool) -> Iterator[Part]:
    """Those that this rank writes: what data-parallel ranks all hold is dealt out among them."""
    for number, part in enumerate(parts):
        if not part.place.is_copy and (
            sharded_over_data or number % mesh.data_size == mesh.data_rank
        ):
            yield part


@dataclass(frozen=True)
class ShardFile:
    """What one rank writes of one model: host tensors by name, and the index of their boxes."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def snapshot(parts: Iterable[Part], *, copy: bool) -> ShardFile:
    """The parts on the host; `copy` False may leave views of live tensors, to be written before they change."""
    tensors, index = {}, {}
    for part in parts:
        name = f"{part.kind}/{part.place.key}/{','.join(map(str, part.place.box.offset))}"
        shape = part.place.box.shape if part.data.numel() == part.place.box.numel else (-1,)
        tensors[name] = part.data.to("cpu", copy=copy).view(shape)
        index[name] = [
            part.kind,
            part.place.key,
            part.place.box.whole,
            part.place.box.offset,
            part.place.box.shape,
            part.start,
        ]
    # One entry only: safetensors writes several in any order, and equal checkpoints should be equal files.
    return ShardFile(tensors, {"shards": json.dumps(index)})


@dataclass(frozen=True)
class _Stored:
    """A part in a file."""

    handle: Any
    name: str
    start: int
    numel: int

    def read(self) -> Tensor:
        """Its elements [n], mapped from the file: only what is used is read."""
        return self.handle.get_tensor(self.name).view(-1)


class ShardReader:
    """The stored parts of some files, found by kind and key."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._stored: dict[tuple[str, str], dict[Box, list[_Stored]]] = {}
        self.where = ""
        for file in files:
            self.where = str(file.parent)
            handle = safe_open(file, framework="pt")
            for name, entry in json.loads(handle.metadata()["shards"]).items():
                kind, key, whole, offset, shape, start = entry
                numel = math.prod(handle.get_slice(name).get_shape())
                boxes = self._stored.setdefault((kind, key), {})
                box = Box(tuple(whole), tuple(offset), tuple(shape))
                boxes.setdefault(box, []).append(_Stored(handle, name, start, numel))

    @torch.no_grad()
    def fill(self, part: Part) -> None:
        """Copies the stored elements into `part.data`, whatever boxes they were stored as.

        Raises `UserError` if the files have no such tensor, one of another shape, or only some of its elements.
        """
        boxes = self._stored.get((part.kind, part.place.key))
        if boxes is None:
            raise UserError(
                f"{self.where}: holds no {part.kind} of {part.place.key}; is it a checkpoint of this model?"
            )
        whole = next(iter(boxes)).whole
        fixed = slice(1 if part.place.is_padded else 0, None)
        if whole[fixed] != part.place.box.whole[fixed]:
            raise UserError(
                f"{self.where}: {part.place.key} is {list(whole)} there, but "
                f"{list(part.place.box.whole)} in this model; give the model section the shape that was saved"
            )
        if part.place.box in boxes:
            found = self._fill_range(part, boxes[part.place.box])
            expected = part.data.numel()
        else:
            found = self._fill_from_others(part, boxes)
            saved = part.place.box.overlap(Box(whole, (0,) * len(whole), whole))
            expected = saved.numel if saved is not None else 0
        if found != expected:
            raise UserError(
                f"{self.where}: holds {found} of {expected} elements of the {part.kind} of {part.place.key}"
            )

    def _fill_range(self, part: Part, stored: list[_Stored]) -> int:
        """From the same box, cut into other ranges perhaps."""
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
        """From the boxes of another layout that overlap this one; returns the elements of the box found."""
        whole_box: Tensor | None = None
        found = 0
        for box, stored in boxes.items():
            overlap = part.place.box.overlap(box)
            if overlap is None or sum(piece.numel for piece in stored) != box.numel:
                continue
            pieces = sorted(stored, key=lambda piece: piece.start)
            source = (
                pieces[0].read()
                if len(pieces) == 1
                else torch.cat([piece.read() for piece in pieces])
            )
            if whole_box is None:
                whole_box = torch.zeros(part.place.box.shape, dtype=source.dtype)
            whole_box[overlap.within(part.place.box)] = source.view(box.shape)[overlap.within(box)]
            found += overlap.numel
        if whole_box is None:
            part.data.zero_()
        else:
            part.data.copy_(whole_box.view(-1)[part.start : part.start + part.data.numel()])
        return found
