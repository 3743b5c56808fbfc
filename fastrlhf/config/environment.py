"""Environment variables: what fastrlhf reads, and the checks of a command before it starts.

Ops raise RuntimeError or ValueError for a wrong value when they read it. The command line refuses it
first.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping

from fastrlhf.errors import UserError

ENVIRONMENT = {
    "FASTRLHF_BACKEND": (
        "auto | triton | cpu | torch | cuda",
        "Implementation that every op uses, whatever its `backend=` says. Unset: as it says.",
    ),
    "FASTRLHF_CPU_ISA": (
        "default | avx2 | avx512",
        (
            "Instruction set of the C++ CPU kernels, if the processor has it. Unset: the widest it"
            " has."
        ),
    ),
    "FASTRLHF_LINEAR_BUDGET_MB": (
        "number of MiB",
        (
            "Memory for the logits of `linear_*` ops: kept whole below it, in chunks of it above."
            " Unset: a quarter of a GPU's free memory, 1 GiB on a CPU."
        ),
    ),
    "FASTRLHF_POOL_MB": (
        "number of MiB",
        (
            "Memory of freed outputs that the CPU kernels keep for reuse by later calls; 0: none."
            " Unset: 512."
        ),
    ),
    "FASTRLHF_SKIP_EXT": ("1", "At installation: do not build the C++ and CUDA extensions."),
    "FASTRLHF_FORCE_CUDA": (
        "1",
        "At installation: build the CUDA extension without a GPU present.",
    ),
}
"""Environment variables -> (values, meaning)."""

_CHOICES = {
    "FASTRLHF_BACKEND": ("auto", "triton", "cuda", "cpu", "torch"),
    "FASTRLHF_CPU_ISA": ("default", "avx2", "avx512"),
}
_LAUNCHERS = {
    "SLURM_NTASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
}
"""Number of tasks that a launcher other than torchrun started -> the launcher."""
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")


def check_variables(environment: Mapping[str, str]) -> list[str]:
    """Check the values of FASTRLHF_* variables; return a line for each name that is not one.

    Raises UserError with one line for the first wrong value. An empty value is an unset variable.
    Whether this machine can run a backend or an instruction set is checked by the op that needs it.
    """
    for name, choices in _CHOICES.items():
        value = environment.get(name, "")
        if value and value not in choices:
            raise UserError(f"{name} is {value!r:.60}, expected one of {', '.join(choices)}")
    budget = environment.get("FASTRLHF_LINEAR_BUDGET_MB", "")
    if budget and not 0 < _number(budget) < math.inf:
        raise UserError(
            f"FASTRLHF_LINEAR_BUDGET_MB is {budget!r:.60}, expected a number of MiB above 0, such"
            " as 512"
        )
    pool = environment.get("FASTRLHF_POOL_MB", "")
    if pool and not re.fullmatch("[0-9]{1,12}", pool):
        raise UserError(
            f"FASTRLHF_POOL_MB is {pool!r:.60}, expected a whole number of MiB, 0 to keep nothing"
        )
    unknown = [n for n in environment if n.startswith("FASTRLHF_") and n not in ENVIRONMENT]
    return [_unknown_variable(name) for name in sorted(unknown)]


def check_launch(environment: Mapping[str, str]) -> None:
    """Check that several processes know of each other, and that torchrun's numbers are numbers.

    Tasks that srun or mpirun starts without torchrun would each train a model of their own in the
    same folder. Raises UserError with one line.
    """
    for name in _RANK_VARIABLES:
        value = environment.get(name)
        if value is not None and not re.fullmatch("[0-9]{1,9}", value.strip()):
            raise UserError(f"{name} is {value!r:.60}, expected a number; start with torchrun")
    if "RANK" in environment:
        return
    for name, launcher in _LAUNCHERS.items():
        tasks = environment.get(name, "")
        if name == "SLURM_NTASKS":  # a step may have fewer tasks than the job
            tasks = environment.get("SLURM_STEP_NUM_TASKS", tasks)
        if tasks.isdecimal() and int(tasks[:9]) > 1:
            one = "srun --ntasks-per-node=1 torchrun" if launcher == "srun" else "torchrun"
            raise UserError(
                f"{launcher} started {tasks} tasks that do not know of each other ({name} is set,"
                f" RANK is not): start one torchrun per node, {one} --nnodes NODES --nproc-per-node"
                f" GPUS -m fastrlhf ...; for a single process unset {name}"
            )


def user_message(error: Exception) -> str | None:
    """Return the text of a UserError, the first line of an op's error about a FASTRLHF_* variable.

    None for other errors.
    """
    if isinstance(error, UserError):
        return str(error)
    line = str(error).partition("\n")[0]
    return line if re.match(r"FASTRLHF_[A-Z_]+\b", line) else None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _unknown_variable(name: str) -> str:
    near = difflib.get_close_matches(name, ENVIRONMENT, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"note: {name} is not a variable of fastrlhf{hint}"
