"""No top-level package of ours is called `kernels`: transformers imports Hugging Face's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import find_namespace_packages
from transformers.utils.import_utils import KERNELS_MIN_VERSION

ROOT = Path(__file__).parents[2]

BUILD_LLAMA = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
sizes = {'vocab_size': 32, 'hidden_size': 16, 'intermediate_size': 32}
config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
logits_BTV = LlamaForCausalLM(config)(torch.tensor([[1, 2, 3]])).logits
assert logits_BTV.shape == (1, 3, 32)
import fastrlhf.kernels
print("fastrlhf.kernels", list(fastrlhf.kernels.__path__)[0])
print("kernels", getattr(sys.modules.get("kernels"), "__file__", None))
"""

# What transformers takes from Hugging Face's package while a model is built: names, and one
# decorator.
STAND_IN = f"""
__version__ = "{KERNELS_MIN_VERSION}"

def _same(*_, **__):
    return lambda layer: layer

use_kernel_forward_from_hub = use_kernelized_func = _same

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {{}})
"""


def from_root(code: str, **environment: str) -> dict[str, str]:
    """Run `code` with the repository's root as the first import path, as `python -m` does."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert result.returncode == 0, result.stderr
    return dict(line.split(" ", 1) for line in result.stdout.splitlines())


def stand_in(folder: Path) -> Path:
    """Return a folder for the import path with a `kernels` package as pip would install it."""
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text(STAND_IN)
    metadata = folder / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n"
    )
    return folder


def test_the_link_is_a_link():
    link = ROOT / "fastrlhf" / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == "../kernels"


@pytest.mark.parametrize("folder", ["kernels", "tests/kernels"])
def test_no_package_marker(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def test_llama_builds_from_the_root(tmp_path):
    """Whether Hugging Face's package is installed or not, ours is not the one that is found."""
    found = from_root(BUILD_LLAMA)
    assert Path(found["fastrlhf.kernels"]) == ROOT / "fastrlhf" / "kernels"
    assert not found["kernels"].startswith(str(ROOT / "kernels"))


def test_llama_builds_from_the_root_with_hugging_faces_kernels(tmp_path):
    found = from_root(BUILD_LLAMA, PYTHONPATH=str(stand_in(tmp_path)))
    assert found["kernels"] == str(tmp_path / "kernels" / "__init__.py"), (
        "transformers must get its own"
    )
    assert Path(found["fastrlhf.kernels"]) == ROOT / "fastrlhf" / "kernels"


def test_a_package_marker_would_break_it(tmp_path):
    """The reason for the rule: with a marker, the folder of the same name is found first."""
    (tmp_path / "root" / "kernels").mkdir(parents=True)
    (tmp_path / "root" / "kernels" / "__init__.py").touch()
    (tmp_path / "site").mkdir()
    code = "import kernels; print(kernels.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(stand_in(tmp_path / "site"))}
    for expected in ("root", "site"):
        command = [sys.executable, "-c", code]
        result = subprocess.run(
            command, cwd=tmp_path / "root", env=environment, capture_output=True, text=True
        )
        assert result.stdout.strip() == str(tmp_path / expected / "kernels" / "__init__.py")
        (tmp_path / "root" / "kernels" / "__init__.py").unlink(missing_ok=True)


def test_packages_are_ours_alone():
    packages = find_namespace_packages(str(ROOT), include=["fastrlhf", "fastrlhf.*"])
    assert {"fastrlhf", "fastrlhf.kernels", "fastrlhf.ops", "fastrlhf.data"} <= set(packages)


def test_a_build_holds_the_kernels_and_no_top_level_of_that_name(tmp_path):
    """`build_py` copies the pure-Python part of a wheel."""
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build",
        "--build-base",
        str(tmp_path / "b"),
        "build_py",
    ]
    environment = {**os.environ, "FASTRLHF_SKIP_EXT": "1"}
    subprocess.run(
        [*command, "--build-lib", str(tmp_path / "lib")],
        cwd=ROOT,
        env=environment,
        check=True,
        timeout=1800,
    )
    assert [path.name for path in (tmp_path / "lib").iterdir()] == ["fastrlhf"]
    sources = {path.name for path in (ROOT / "kernels").glob("*.py")}
    assert {
        path.name for path in (tmp_path / "lib" / "fastrlhf" / "kernels").glob("*.py")
    } == sources
    assert (tmp_path / "lib" / "fastrlhf" / "py.typed").is_file()
