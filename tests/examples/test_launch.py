"""examples/launch/: the Slurm script with stubs of srun and scontrol, and the other launchers."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from fastrlhf.config import load_config, require

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "examples" / "launch"
CONFIG = "configs/debug/sft.yaml"
SRUN = """\
#!/bin/bash
printf '%s\\0' "$@" > srun.arguments
env > srun.environment
for argument; do case $argument in --output=*) log=${argument#--output=} ;; esac; done
trap 'echo "stopped by SIGTERM after step 3 of 9: saved" >> "$log"; exit 1' TERM
touch srun.started
case $ENDING in
    limit) echo "stopped by its time limit (train.max_seconds) after step 3 of 9: saved" > "$log" ;;
    finished) echo "runs/report.html: sft finished after step 9" > "$log" ;;
    mistake) echo "error: unknown key" > "$log"; exit 2 ;;
    signal) while true; do sleep 0.05; done ;;
esac
"""
SCONTROL = """\
#!/bin/bash
if [ "$1" = show ]; then printf 'node3\\nnode4\\n'; else echo "$@" >> scontrol.calls; fi
"""


class Job:
    """A start of the sbatch script with stubs of Slurm's commands in `folder`."""

    def __init__(self, folder: Path, ending: str, **variables: str) -> None:
        self.folder = folder
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        slurm = {
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NAME": "fastrlhf",
            "SLURM_NNODES": "2",
            "SLURM_JOB_NODELIST": "node[3-4]",
            "SLURM_GPUS_ON_NODE": "4",
            "SLURM_JOB_END_TIME": str(int(time.time()) + 7200),
            "ENDING": ending,
        }
        path = f"{folder}:{os.environ['PATH']}"
        self.process = subprocess.Popen(
            ["bash", str(LAUNCH / "slurm.sbatch"), "sft", CONFIG, "train.steps=9"],
            cwd=folder,
            env={**os.environ, **slurm, **variables, "PATH": path},
        )

    def end(self) -> int:
        return self.process.wait(timeout=300)

    @property
    def requeued(self) -> list[str]:
        calls = self.folder / "scontrol.calls"
        return calls.read_text().splitlines() if calls.is_file() else []


@pytest.mark.parametrize(
    ("ending", "restarts", "status", "requeued"),
    [
        ("limit", "0", 0, ["requeue 123456"]),
        ("limit", "50", 0, []),
        ("finished", "1", 0, []),
        ("mistake", "0", 2, []),
    ],
)
def test_a_slurm_job_is_requeued_until_its_run_is_finished(
    tmp_path: Path, ending: str, restarts: str, status: int, requeued: list[str]
) -> None:
    job = Job(tmp_path, ending, SLURM_RESTART_COUNT=restarts)
    assert job.end() == status
    assert job.requeued == requeued


def test_slurms_signal_becomes_a_sigterm_for_the_ranks(tmp_path: Path) -> None:
    job = Job(tmp_path, "signal")
    end = time.monotonic() + 300
    while not (tmp_path / "srun.started").exists():
        assert time.monotonic() < end and job.process.poll() is None
        time.sleep(0.05)
    job.process.send_signal(signal.SIGUSR1)
    assert job.end() == 0 and job.requeued == ["requeue 123456"]


def test_slurm_starts_one_torchrun_per_node_with_a_valid_command(tmp_path: Path) -> None:
    assert Job(tmp_path, "finished").end() == 0
    words = (tmp_path / "srun.arguments").read_text().split("\0")[:-1]
    torchrun = words.index("torchrun")
    options, command = words[torchrun:], words[words.index("fastrlhf") + 1 :]
    pairs = dict(zip(options[1::2], options[2::2], strict=False))
    assert pairs["--nnodes"] == "2" and pairs["--nproc-per-node"] == "4"
    assert pairs["--rdzv-endpoint"].startswith("node3:") and pairs["--rdzv-id"] == "123456.0"
    assert command[:2] == ["sft", CONFIG]
    config = load_config(ROOT / CONFIG, command[2:])
    require(config, "sft")
    assert config.train.max_seconds == pytest.approx(7200 - 1200, abs=60)
    variables = (tmp_path / "srun.environment").read_text()
    assert "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True" in variables


def test_plain_torchrun_names_what_is_not_set(tmp_path: Path) -> None:
    stub = tmp_path / "torchrun"
    stub.write_text('#!/bin/bash\nprintf "%q " "$@"\n')
    stub.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HEAD": "node0"}
    command = ["bash", str(LAUNCH / "torchrun.sh"), "sft", CONFIG]
    refused = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert refused.returncode != 0 and "NNODES: the number of nodes" in refused.stderr
    environment["NNODES"] = "3"
    words = shlex.split(subprocess.check_output(command, env=environment, text=True))
    assert words[words.index("--nnodes") + 1] == "3" and words[-3:] == ["fastrlhf", "sft", CONFIG]


def test_the_pytorchjob_is_the_same_on_master_and_workers() -> None:
    job = yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())["spec"]
    master, worker = (job["pytorchReplicaSpecs"][name] for name in ("Master", "Worker"))
    assert master["replicas"] == 1 and worker["replicas"] == 3
    assert master["template"] == worker["template"]
    (container,) = master["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert str(limits["nvidia.com/gpu"]) == job["nprocPerNode"]
    grace = master["template"]["spec"]["terminationGracePeriodSeconds"]
    option = next(word for word in container["command"] if word.startswith("--shutdown-timeout="))
    assert int(option.partition("=")[2]) < grace
