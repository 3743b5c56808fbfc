"""Environment variables: wrong values and unknown names, and tasks that torchrun did not start."""

from __future__ import annotations

import pytest

from fastrlhf.config.environment import ENVIRONMENT, check_launch, check_variables
from fastrlhf.errors import UserError


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("FASTRLHF_BACKEND", "gpu", "expected one of auto, triton, cuda, cpu, torch"),
        ("FASTRLHF_BACKEND", "CPU", "expected one of auto"),
        ("FASTRLHF_CPU_ISA", "mmx", "expected one of default, avx2, avx512"),
        *(
            ("FASTRLHF_LINEAR_BUDGET_MB", value, "expected a number of MiB above 0")
            for value in ("0", "-1", "nan", "inf", "12MB", "1e400")
        ),
        *(
            ("FASTRLHF_POOL_MB", value, "expected a whole number of MiB")
            for value in ("-1", "1.5", "12MB", "9" * 30, " ")
        ),
    ],
)
def test_wrong_values_are_one_line(name, value, expected):
    with pytest.raises(UserError) as raised:
        check_variables({name: value})
    line = str(raised.value)
    assert line.startswith(f"{name} is {value!r}") and expected in line and "\n" not in line


def test_right_values_pass():
    right = {
        "FASTRLHF_BACKEND": "torch",
        "FASTRLHF_CPU_ISA": "avx2",
        "FASTRLHF_LINEAR_BUDGET_MB": "0.5",
        "FASTRLHF_POOL_MB": "0",
    }
    assert check_variables(right) == []
    assert check_variables(dict.fromkeys(ENVIRONMENT, "")) == []


def test_a_misspelt_name_is_noted():
    [line] = check_variables({"FASTRLHF_BAKCEND": "cpu", "PATH": "/bin"})
    expected = "FASTRLHF_BAKCEND is not a variable of fastrlhf; did you mean FASTRLHF_BACKEND?"
    assert line == f"note: {expected}"


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({"SLURM_NTASKS": "2"}, "srun"),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "4"}, "srun"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun"),
        ({"PMI_SIZE": "2"}, "mpiexec"),
    ],
)
def test_tasks_without_torchrun_are_refused(environment, launcher):
    with pytest.raises(
        UserError, match=rf"^{launcher} started . tasks .* RANK is not\): .*torchrun"
    ):
        check_launch(environment)
    check_launch(environment | {"RANK": "0"})


@pytest.mark.parametrize(
    "environment",
    [{}, {"SLURM_NTASKS": "1"}, {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, {"RANK": "1"}],
)
def test_single_processes_start(environment):
    check_launch(environment)


def test_ranks_are_numbers():
    with pytest.raises(UserError, match="WORLD_SIZE is 'two', expected a number; start with torch"):
        check_launch({"RANK": "0", "WORLD_SIZE": "two"})
