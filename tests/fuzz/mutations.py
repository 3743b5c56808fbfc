"""Structured mutations of inputs: of trees of values, of text, of bytes and of files."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EXTREMES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3.5, -0.0, 1e308, -1e308, 5e-324),
    *(float("inf"), float("-inf"), float("nan")),
    *(2**31, 2**31 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400, 10**5000),
    *("", " ", "a", "\0", "caf\u00e9", "\ud800", "\u2028", "\x1b[31m", "\ufeff", "\u202e", "\r\n"),
    *("true", "null", "NaN", "1e5", "0x10", "010", "1:30", "2026-13-45", "1_000", "9" * 5000),
    *("a" * 300, "b" * 70_000, "a/" * 2000, "{{ x }}", "%s%n", "$(x)"),
    *("../x", "../../../../etc/passwd", "/etc/passwd", "/dev/null", "/proc/self/mem", "a\0b"),
    *("float16", "float99", "bfloat16", "gpt2", "llama", "lm", "scalar"),
    *([], {}, [[]], [{}], [None], [0], ["a"], [1, "a", None], {"a": 1}, {"": {}}, {"a": {"b": []}}),
]


def nested(depth: int, rng: random.Random) -> Any:
    """Return lists or mappings nested `depth` levels deep."""
    value: Any = 0
    for _ in range(depth):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key or index) of every value inside `tree`."""
    keys = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(keys):
        yield tree, key
        if isinstance(value, dict | list):
            yield from places(value)


def mutate_tree(tree: Any, rng: random.Random, extremes: list[Any] | None = None) -> Any:
    """Return a copy of `tree` with one to three structured changes."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = list(places(tree)) if isinstance(tree, dict | list) else []
        if not found:
            return tree
        place, key = rng.choice(found)
        match rng.randrange(8):
            case 0 | 1 | 2 | 3:
                place[key] = copy.deepcopy(rng.choice(extremes or EXTREMES))
            case 4:
                del place[key]
            case 5:
                place[key] = rng.choice(([place[key]], {"a": place[key]}, _text(place[key])))
            case 6:
                other, name = rng.choice(found)
                if name in other if isinstance(other, dict) else name < len(other):
                    place[key] = copy.deepcopy(other[name])
            case 7:
                _change_key(place, key, rng)
    return tree


def _text(value: Any) -> str:
    long = isinstance(value, int) and abs(value) > 10**300  # Python refuses to print it
    return "9" * 5000 if long else str(value)


def _change_key(place: Any, key: Any, rng: random.Random) -> None:
    if isinstance(place, list):
        place.insert(key, copy.deepcopy(place[key]))
    elif rng.random() < 0.5:
        place[rng.choice((f"{key}x", key[1:], key.upper(), "\0", "", "a.b", "\u00e9"))] = place[key]
    else:
        place[key] = nested(rng.choice((3, 40, 200)), rng)


def tree_text(tree: Any) -> str:
    """Return JSON; surrogates are escapes, integers may have any length."""
    return _unlimited(tree)


def _unlimited(tree: Any) -> str:
    big: dict[str, str] = {}

    def swap(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: swap(item) for name, item in value.items()}
        if isinstance(value, list):
            return [swap(item) for item in value]
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**300:
            mark = f"@{len(big)}@"
            big[f'"{mark}"'] = "1" + "0" * (5000 if value > 10**4000 else 400)
            return mark
        return value

    text = json.dumps(swap(tree))
    for mark, digits in big.items():
        text = text.replace(mark, digits)
    return text


def mutate_text(content: bytes, rng: random.Random) -> bytes:
    """Return text with one change of its characters, lines or encoding."""
    lines = content.splitlines(keepends=True) or [b""]
    at = rng.randrange(len(content) + 1)
    line = rng.randrange(len(lines))
    match rng.randrange(14):
        case 0:
            return content[:at]
        case 1:
            return (
                content[:at] + bytes([rng.choice((0, 7, 27, 127, 0xC0, 0xE9, 0xFF))]) + content[at:]
            )
        case 2:
            return b"\xef\xbb\xbf" + content
        case 3:
            return content.decode("utf-8", "replace").encode(
                rng.choice(("utf-16", "utf-16-le", "utf-32"))
            )
        case 4:
            return b"".join([*lines[:line], lines[line], *lines[line:]])
        case 5:
            return b"".join(lines[:line] + lines[line + 1 :])
        case 6:
            return content.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\n\n", b"\xe2\x80\xa8")))
        case 7:
            depth = rng.choice((50, 1000, 100_000))
            opened = rng.choice((b"[", b'{"a":', b"- ", b"&a [*a,"))
            return content[:at] + opened * depth + content[at:]
        case 8:
            return (
                content[:at]
                + rng.choice(
                    (
                        b"\t",
                        b"'",
                        b'"',
                        b":",
                        b"{",
                        b"}",
                        b",",
                        b"*a",
                        b"&a ",
                        b"!!x ",
                        b"<<: ",
                        b"%",
                    )
                )
                + content[at:]
            )
        case 9:
            return b""
        case 10:
            return bytes(rng.randrange(256) for _ in range(200))
        case 11:
            return content[:at] + content[at + rng.randrange(1, 40) :]
        case 12:
            return content * 2
        case _:
            return (
                content[:at]
                + rng.choice(("\u202e", "\u0301", "\U0001f600", "\ufffe")).encode()
                + content[at:]
            )


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return bytes with one change: flips, cuts, zeros, extreme integers, repetition."""
    data = bytearray(content)
    at = rng.randrange(len(data) + 1)
    head = rng.randrange(min(len(data), 200) + 1)  # headers hold the structure
    match rng.randrange(8):
        case 0:
            return bytes(data[:at])
        case 1 | 2:
            for _ in range(rng.randrange(1, 6)):
                if data:
                    data[min(rng.choice((at, head)), len(data) - 1)] ^= 1 << rng.randrange(8)
        case 3:
            extreme = rng.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1))
            data[head : head + 8] = extreme.to_bytes(8, "little")
        case 4:
            data[at : at + 64] = bytes(64)
        case 5:
            data += data[: rng.randrange(1, 100)]
        case 6:
            del data[head : head + rng.randrange(1, 10)]
        case 7:
            data = bytearray(rng.choice((b"", b"\0" * 100, content[::-1], b"{}", b"PK\x03\x04")))
    return bytes(data)


def mutate_file(path: Path, rng: random.Random) -> bool:
    """Replace a file by something that is none, or by a link; return whether its content is kept."""
    content = path.read_bytes()
    path.unlink()
    match rng.randrange(7):
        case 0:
            path.mkdir()
        case 1:
            path.symlink_to(path.name)
        case 2:
            path.symlink_to("missing")
        case 3:
            path.symlink_to("/dev/null")
        case 4:
            path.symlink_to("..")
        case 5:
            elsewhere = path.with_name(f"{path.name}.elsewhere")
            elsewhere.write_bytes(content)
            path.symlink_to(elsewhere.name)
            return True
        case 6:
            pass
    return False


def copy_folder(source: Path, target: Path) -> Path:
    """Return `target`, a new copy of the folder `source`."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    elif target.is_symlink() or target.exists():
        os.unlink(target)
    return shutil.copytree(source, target)
