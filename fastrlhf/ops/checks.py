"""Argument checks shared by the ops: shapes, dtypes and devices, never values on a GPU.

Reading a value would wait for the GPU.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)
LONGEST = 60
"""Characters of a value in a message."""


def describe(value: object) -> str:
    """Describe a value on one short line.

    A tensor by dtype, shape and device, another array by type, dtype and shape, the rest by repr.
    """
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}"
    kind = f"{type(value).__module__.split('.')[0]}.{type(value).__qualname__}"
    if hasattr(value, "dtype") and hasattr(value, "shape") and len(value.shape) > 0:
        return f"{kind} of {value.dtype}{list(value.shape)}"
    if isinstance(value, list | tuple | dict | set):
        return f"a {type(value).__name__} of {len(value)}"
    words = " ".join(repr(value).split())
    return words if len(words) <= LONGEST else f"{kind} {words[:LONGEST]}…"


def require(holds: bool, argument: str, got: object, expected: str) -> None:
    """Raise ValueError with the argument, its value and what was expected, unless `holds`."""
    if not holds:
        raise ValueError(f"{argument}: got {describe(got)}, expected {expected}")


def floating(argument: str, x: object) -> None:
    fits = isinstance(x, Tensor) and x.dtype in FLOATS
    require(fits, argument, x, "a float32, bfloat16, float16 or float64 tensor")


def like(
    argument: str, x: object, shape: torch.Size, device: torch.device, kind: str = "float"
) -> None:
    """Check that `x` is a tensor of `shape` on `device`; `kind`: "float", "integer" or "bool"."""
    dtypes = {"float": FLOATS, "integer": INTEGERS, "bool": (torch.bool,)}[kind]
    words = {"float": "a float", "integer": "an integer", "bool": "a bool"}[kind]
    fits = isinstance(x, Tensor) and x.dtype in dtypes and x.shape == shape and x.device == device
    cure = ""
    if kind == "bool" and isinstance(x, Tensor) and x.dtype != torch.bool and x.shape == shape:
        cure = f": pass {argument}.bool()"
    require(fits, argument, x, f"{words} tensor of shape {list(shape)} on {device}{cure}")


def number(x: object) -> bool:
    """Return whether x is a number (numpy's included) or a 0-dim tensor."""
    if isinstance(x, Tensor):
        return x.dim() == 0 and not x.is_complex() and x.dtype != torch.bool
    return isinstance(x, Real)


def readable(x: object) -> bool:
    """Return whether the value of a number can be read now: not a GPU's, nor a traced tensor's."""
    if not isinstance(x, Tensor):
        return True
    return not torch.compiler.is_compiling() and type(x) is Tensor and x.device.type == "cpu"


def scalar(argument: str, x: float | Tensor, low: float, high: float, expected: str) -> None:
    """Check that x is a number or a 0-dim tensor and, where readable, low <= x <= high."""
    within = number(x) and (not readable(x) or low <= x <= high)
    require(bool(within), argument, x, expected)


def positive(argument: str, x: float | Tensor) -> None:
    within = number(x) and (not readable(x) or 0 < x < math.inf)
    require(bool(within), argument, x, "a number above 0, not infinite")


def finite(argument: str, x: float | Tensor) -> None:
    within = number(x) and (not readable(x) or -math.inf < x < math.inf)
    require(bool(within), argument, x, "a finite number")


def not_negative(argument: str, x: float | Tensor) -> None:
    within = number(x) and (not readable(x) or 0 <= x < math.inf)
    require(bool(within), argument, x, "a finite number, 0 or more")


def fraction(argument: str, x: float | Tensor) -> None:
    scalar(argument, x, 0.0, 1.0, "a number from 0 to 1")


def choice(argument: str, x: object, options: tuple[object, ...]) -> None:
    require(x in options, argument, x, "one of " + ", ".join(repr(o) for o in options))


def denominator(x: float | Tensor | None, device: torch.device) -> None:
    """Check that x is a float above 0, a 0-dim tensor (not read here), or None."""
    if isinstance(x, Tensor):
        fits = x.dim() == 0 and x.device == device
        require(fits, "denominator", x, f"a float or a 0-dim tensor on {device}")
    elif x is not None:
        positive("denominator", x)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return float64 for float64 (for gradcheck), float32 for every other dtype."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
