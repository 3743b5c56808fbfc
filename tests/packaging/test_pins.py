"""constraints.txt pins every dependency once per Python version, within pyproject.toml's bounds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line.strip() and not line.startswith("#")
]


def pins(python: str) -> dict[str, Version]:
    """Return the pinned versions for one Python on Linux; a package pinned twice is an error."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
    }
    found: dict[str, Version] = {}
    for pin in PINS:
        if pin.marker is None or pin.marker.evaluate(environment):
            name = canonicalize_name(pin.name)
            assert name not in found, f"{name} is pinned twice for Python {python}"
            [specifier] = pin.specifier
            assert specifier.operator == "==", pin
            found[name] = Version(specifier.version)
    return found


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_every_dependency_is_pinned_within_its_range(python):
    pinned = pins(python)
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} has no pin for Python {python}"
        assert pinned[name] in requirement.specifier, (
            f"{name} {pinned[name]} is outside {requirement}"
        )


def test_torch_is_one_version_without_a_build_tag():
    versions = {pins(python)["torch"] for python in ("3.10", "3.11", "3.12")}
    assert versions == {Version("2.13.0")}, "a tag such as +cpu would shut out the other build"


def test_no_index_and_no_path_is_named():
    for name in ("constraints.txt", "pyproject.toml", "Makefile", ".ci/run", "setup.py"):
        text = (ROOT / name).read_text()
        for word in ("index-url", "find-links", "http://", "file://", " @ "):
            assert word not in text, f"{name}: {word}"


def test_the_wrong_apex_is_never_a_dependency():
    wanted = [
        *PROJECT["dependencies"],
        *(r for extra in PROJECT["optional-dependencies"].values() for r in extra),
    ]
    assert "apex" not in {Requirement(requirement).name for requirement in wanted}
