"""The types of settings: every number has an upper bound, every path can be a path.

The bounds are generous: far above what any run has used, and low enough that no value overflows
where it is used (int32 counts, int64 seeds, fp32 factors, names of files).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

MAX_COUNT = 2**31 - 1
MAX_SEED = 2**63 - 1
MAX_FACTOR = 3.4e38
"""Just below the largest fp32 number."""
MAX_NAME_BYTES = 255
"""Longest name of a file or folder on Linux's file systems."""
MAX_PATH_BYTES = 3800
"""Linux takes 4,095 bytes; a run writes files some levels below its folder."""


def _not_bool(value: object) -> object:
    """Refuse a boolean where a number is expected.

    pydantic would read `train.steps: true` as one step.
    """
    if isinstance(value, bool):
        raise PydanticCustomError("number", "Input should be a number")
    return value


def _check_path(path: str) -> str:
    """Check that the system can take `path` as one; whether it exists is checked by its reader."""
    size = len(path.encode("utf-8"))
    longest = max((len(name.encode("utf-8")) for name in path.split("/")), default=0)
    if not path:
        problem = 'a path; "." is the current folder'
    elif "\0" in path:
        problem = "a path without NUL characters"
    elif longest > MAX_NAME_BYTES:
        problem = f"a path with names of at most {MAX_NAME_BYTES} bytes, one has {longest}"
    elif size > MAX_PATH_BYTES:
        problem = f"a path of at most {MAX_PATH_BYTES} bytes, it has {size}"
    else:
        return path
    raise PydanticCustomError("path", "{problem}", {"problem": problem})


def _one_is_a_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


NotBool = BeforeValidator(_not_bool)

Positive = Annotated[int, NotBool, Field(gt=0, le=MAX_COUNT)]
Count = Annotated[int, NotBool, Field(ge=0, le=MAX_COUNT)]
Seed = Annotated[int, NotBool, Field(ge=0, le=MAX_SEED)]
Ranks = Annotated[int, NotBool, Field(gt=0, le=2**20)]
"""Processes that share a model."""
Layers = Annotated[int, NotBool, Field(gt=0, le=2**14)]
Width = Annotated[int, NotBool, Field(gt=0, le=2**22)]
"""Size of one dimension of a weight. The largest models have 2^14 to 2^17."""
Rows = Annotated[int, NotBool, Field(gt=0, le=2**27)]
"""Rows of an embedding: tokens of the vocabulary, positions."""
Copies = Annotated[int, NotBool, Field(gt=0, le=10_000)]
"""Responses to one prompt."""
Slots = Annotated[int, NotBool, Field(gt=0, le=2**20)]

Fraction = Annotated[float, NotBool, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, NotBool, Field(ge=0.0, lt=1.0)]
Above0 = Annotated[float, NotBool, Field(gt=0.0, le=MAX_FACTOR)]
AtLeast0 = Annotated[float, NotBool, Field(ge=0.0, le=MAX_FACTOR)]
Number = Annotated[float, NotBool, Field(ge=-MAX_FACTOR, le=MAX_FACTOR)]
Epochs = Annotated[float, NotBool, Field(gt=0.0, le=1e6)]
Megabytes = Annotated[float, NotBool, Field(gt=0.0, le=1e9)]
Seconds = Annotated[float, NotBool, Field(gt=0.0, le=1e9)]

FilePath = Annotated[str, AfterValidator(_check_path)]
FilePaths = Annotated[list[FilePath], BeforeValidator(_one_is_a_list)]
"""A list of paths; a single path becomes a list of one."""
FilePathOrPaths = Annotated[
    # As in `Blend`, the tags are numbers.
    Annotated[FilePath, Tag("0")] | Annotated[list[FilePath], Tag("1")],
    Discriminator(lambda value: "1" if isinstance(value, list) else "0"),
]
Strings = Annotated[list[str], BeforeValidator(_one_is_a_list)]
"""A list of strings; a single string becomes a list of one."""
StopStrings = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_one_is_a_list)]
"""An empty stop string would end every response at once."""
Blend = Annotated[
    # Numeric tags are stripped from error locations, like list indices (see `_key` in
    # yaml_file.py).
    Annotated[list[FilePath], Tag("0")] | Annotated[dict[FilePath, Above0], Tag("1")],
    Discriminator(lambda value: "1" if isinstance(value, dict) else "0"),
    BeforeValidator(_one_is_a_list),
]
"""Paths, or path -> weight."""
