"""Shared fixtures: a mesh of one rank, launches of several ranks, and bounds on rounding."""

from __future__ import annotations

import gc
import importlib.util
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

# Set before the large imports: garbage collections would take a quarter of their time.
gc.set_threshold(50_000, 20, 100)

import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from python_runs import run_python  # noqa: E402

from fastrlhf.config import ModelConfig  # noqa: E402

if TYPE_CHECKING:
    from fastrlhf.parallel.mesh import Mesh

# A busy machine makes single examples slow; the duration of one says nothing about the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """Initialize a mesh of one rank, shared by the tests of a file."""
    # Imported here because the tests of `ops` run without megatron.
    from fastrlhf.config import ParallelConfig
    from fastrlhf.parallel import mesh as meshes

    yield meshes.initialize(ParallelConfig(), seed=7)
    meshes.finalize()


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., None]:
    """Return `torchrun(script, *arguments)`, which runs a script on four ranks of one thread each.

    If the script fails, the assertion shows the end of its stderr.
    """

    def run(script: Path, *arguments: object, ranks: int = 4) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        _run(launcher, script, *arguments)

    return run


@pytest.fixture(scope="session")
def four_ranks() -> Callable[..., None]:
    """Return `four_ranks(script, *arguments)`: as `torchrun`, but forks the ranks; 4x faster."""
    return partial(_run, [str(Path(__file__).with_name("ranks.py"))])


def _run(launcher: list[str], script: Path, *arguments: object) -> None:
    run_python([*launcher, str(script), *map(str, arguments)])


@pytest.fixture(scope="session")
def imported() -> Callable[[Path], ModuleType]:
    """Return `imported(script)`, which imports a script file as a module of this process."""

    def load(script: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(script.stem, script)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def rounding() -> Callable[..., float]:
    """Return `rounding(model, length, *sums, backward=False)`, a relative bound for fp32."""
    return _rounding


def _rounding(model: ModelConfig, length: int, *sums: int, backward: bool = False) -> float:
    """Bound the relative difference of two fp32 evaluations of a transformer.

    The instruction set, the BLAS library, the batch and the parallel layout choose the order in
    which a sum of n products is taken. Each of its n roundings errs by at most u = eps / 2 of a
    partial sum, which is a standard deviation of at most u / sqrt(3). Independent errors add in
    squares, so n of them deviate by u sqrt(n / 3) relative to the partial sums (Higham and Mary,
    SIAM J. Sci. Comput. 41(5), 2019: by sqrt(n), not n). The partial sums are no larger than the
    result if the terms are positive, and typically if both signs occur (Higham and Mary, SIAM J.
    Sci. Comput. 42(5), 2020). A result that cancels to far less than its terms has no such bound:
    compare it on their scale.

    N roundings lie on the path to one result. In each layer: two norms, the query/key/value and the
    first feed-forward product (hidden_size each), the attention's scores (head_dim), softmax and
    weighted sum (`length`, the longest sequence) and output product (num_heads * head_dim), the
    second feed-forward product (ffn_size). After the layers: a norm and the head (hidden_size
    each), and the `sums` that the caller takes over the model's outputs. The `backward` pass goes
    through every product twice more: 3 N in all.

    Two evaluations differ by sqrt(2) standard deviations of one. Six are allowed, as thousands of
    numbers are compared: 6 sqrt(2) u sqrt(N / 3) = eps sqrt(6 N).
    """
    projected = model.num_heads * model.head_dim
    layer = 4 * model.hidden_size + projected + model.head_dim + 2 * length + model.ffn_size
    steps = model.num_layers * layer + 2 * model.hidden_size + sum(sums)
    return torch.finfo(torch.float32).eps * math.sqrt(6 * steps * (3 if backward else 1))
