"""Two torchrun agents: what one node does differently is refused, and lost ranks are named.

The agents have network namespaces of their own where the machine allows it, and always different
working folders. node.py has the cases.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from configs.debug import make_data

HERE = Path(__file__).parent
LIMIT_S = 1500
CONFIG = """\
model: {family: gpt, num_layers: 1, hidden_size: 16, num_heads: 4, ffn_size: 32,
  max_positions: 64, dtype: fp32}
parallel: {startup_timeout_s: 1200, timeout_s: 1200}
data: {tokenizer: DATA/tokenizer, train: DATA/text.jsonl, prompts: DATA/prompts.jsonl,
  sequence_length: 16, max_prompt_tokens: 32}
optimizer: {lr: 1.0e-3}
train: {steps: 2, global_batch_size: 4}
ppo: {batch_size: 4, minibatch_size: 4, gamma_ptx: 0.0, reward_function: "none:none"}
generation: {max_new_tokens: 4, slots: 2}
log: {progress: false, tensorboard: false}
output_dir: replaced
"""


@cache
def has_namespaces() -> bool:
    """Return whether this machine lets a test make network namespaces and connect them."""
    if not (shutil.which("unshare") and shutil.which("ip")):
        return False
    check = ["unshare", "-Urnu", "bash", str(HERE / "two_nodes.sh"), "/", "/", "true"]
    return subprocess.run(check, capture_output=True, timeout=120).returncode == 0


def write_inputs(folder: Path) -> None:
    """Write data, configurations, and the working folders of two nodes, which differ."""
    make_data.main(folder)
    for command in ("pretrain", "ppo"):
        (folder / f"{command}.yaml").write_text(CONFIG.replace("DATA", str(folder)))
    text = (folder / "text.jsonl").read_text().splitlines(keepends=True)
    for node in range(2):
        own = folder / f"work{node}"
        own.mkdir()
        (own / "own.jsonl").write_text("".join(text[node:] + text[:node]))  # of the same size
        shutil.copytree(folder / "tokenizer", own / "tokenizer")
        (own / "endless.py").write_text(
            "import os\n\ndef score(prompts, responses):\n    hangs = os.environ['RANK'] == '3'\n"
            "    while hangs:\n        pass\n    return [0.0] * len(responses)\n"
        )
    path = folder / "work1" / "tokenizer" / "tokenizer_config.json"
    path.write_text(path.read_text() + " ")


def torchrun(folder: Path, *arguments: str) -> list[str]:
    """Return the command of a node's agent; the shell of the node expands its variables."""
    options = (
        f"{sys.executable} -m torch.distributed.run --nnodes 2 --nproc-per-node 1"
        " --rdzv-backend c10d --rdzv-endpoint $FIRST:$PORT --rdzv-conf is_host=$((1 - NODE)),keep_alive_interval=2"
        " --local-addr $ADDRESS"
    )
    return [
        "bash",
        "-c",
        f'exec {options} "$@" >> {folder}/agent$NODE.log 2>&1',
        "agent",
        *arguments,
    ]


def environment(**variables: str) -> dict[str, str]:
    path = os.pathsep.join(
        filter(None, [str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH")])
    )
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables}


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def start_agent(folder: Path, node: int, port: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Start the agent of a node without a network namespace of its own."""
    own = {"NODE": str(node), "FIRST": "127.0.0.1", "ADDRESS": "127.0.0.1", "PORT": port}
    own["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = (
        "1"  # else no new agent can join (docs/multi_node.md)
    )
    return subprocess.Popen(
        torchrun(folder, *arguments),
        cwd=folder / f"work{node}",
        env=environment(**own),
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Run all cases of node.py on two nodes; return their folder and node0's and node1's results."""
    folder = tmp_path_factory.mktemp("nodes")
    write_inputs(folder)
    script = str(HERE / "node.py")
    if has_namespaces():
        both = ["unshare", "-Urnu", "bash", str(HERE / "two_nodes.sh")]
        both += [str(folder / "work0"), str(folder / "work1")]
        command = [*both, *torchrun(folder, script, str(folder))]
        agents = [subprocess.Popen(command, env=environment(PORT="29400"))]
    else:
        port = free_port()
        agents = [start_agent(folder, node, port, script, str(folder)) for node in range(2)]
    for agent in agents:
        status = agent.wait(timeout=LIMIT_S)
        log = (folder / "agent0.log").read_text() + (folder / "agent1.log").read_text()
        assert status == 0, log[-4000:]
    return folder, {str(n): json.loads((folder / f"node{n}.json").read_text()) for n in range(2)}


class Outcome:
    """How a case ended: per rank its status, seconds and output."""

    def __init__(self, nodes: tuple[Path, dict[str, Any]], case: str) -> None:
        folder, results = nodes
        self.hosts = [results[str(n)]["host"] for n in range(2)]
        ended = {**results["0"]["ended"][case], **results["1"]["ended"][case]}
        self.statuses = [ended[str(rank)][0] for rank in range(4)]
        self.seconds = [ended[str(rank)][1] for rank in range(4)]
        self.logs = [(folder / f"{case}.{rank}.log").read_text() for rank in range(4)]

    def errors(self, rank: int) -> list[str]:
        return [line for line in self.logs[rank].splitlines() if line.startswith("error: ")]


def test_nodes_have_namespaces(nodes: tuple[Path, dict[str, Any]]) -> None:
    if not has_namespaces():
        pytest.skip("this machine has no network namespaces for tests: both nodes are on localhost")
    assert Outcome(nodes, "lr").hosts == ["node0", "node1"]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("lr", "ranks 2-3 (host {1}) differ: optimizer.lr is 0.002 there, 0.001 on ranks 0-1"),
        (
            "seed",
            "ranks 2-3 (host {1}) differ: train.seed is 77 there, 1234 on ranks 0-1 (host {0})",
        ),
        ("data", "rank 2 (host {1}) differs: contents of data.train own.jsonl is "),
        ("tokenizer", "rank 2 (host {1}) differs: contents of data.tokenizer tokenizer is "),
        ("version", "rank 3 (host {1}) differs: version of torch is 2.0.0 there, "),
        ("variable", "rank 2 (host {1}) differs: variable NCCL_ALGO is Ring there, not set on"),
        (
            "output_dir",
            "output_dir own is not shared: ranks 2-3 (host {1}) cannot read what rank 0",
        ),
        ("mistake", " on host {1}: override 'optimizer.lr=fast': "),
        ("mistake on node 0", " on host {0}: override 'optimizer.lr=fast': "),
    ],
)
def test_ranks_that_differ_are_refused_before_any_work(
    nodes: tuple[Path, dict[str, Any]], case: str, expected: str
) -> None:
    """Each node shows the same line once: the first rank of a node prints it."""
    outcome = Outcome(nodes, case)
    assert outcome.statuses == [2, 2, 2, 2], outcome.logs
    for rank in (0, 2):
        (line,) = outcome.errors(rank)
        is_own = case.startswith("mistake") and (rank == 2) == (case == "mistake")
        text = (
            "error: override 'optimizer.lr=fast': " if is_own else expected.format(*outcome.hosts)
        )
        assert text in line, line
    assert not list((nodes[0] / "out" / case).glob("*")) and not list(nodes[0].rglob(".shared_*"))


def test_a_model_is_split_over_both_nodes_and_resumes_with_another_layout(
    nodes: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """TP=4 for two steps, then DP=4 for two more, against one process; the cache is per node."""
    from fastrlhf.config import load_config
    from fastrlhf.parallel import mesh as meshes
    from fastrlhf.run.train import train

    folder = nodes[0]
    for case in ("tensor", "resumed"):
        outcome = Outcome(nodes, case)
        assert outcome.statuses == [0, 0, 0, 0], outcome.logs
    assert "data.cache cache is not shared; each node tokenizes" in Outcome(nodes, "tensor").logs[0]
    assert all(list((folder / f"work{node}" / "cache").glob("*.bin")) for node in range(2))
    assert "after step 2 of 4" in Outcome(nodes, "resumed").logs[0]
    train(
        "pretrain",
        load_config(folder / "pretrain.yaml", [f"output_dir={tmp_path}", "train.steps=4"]),
    )
    meshes.finalize()
    ours, one = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (folder / "out" / "tensor", tmp_path)
    )
    # The schedule of the first two steps ends at step 2, so only their first step has the same rate.
    assert [row["step"] for row in ours] == [1, 2, 3, 4]
    assert ours[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-5)
    assert ours[3]["loss"] < ours[0]["loss"]


@pytest.mark.parametrize(
    ("case", "rank", "expected"),
    [
        ("stopped", 3, r"no heartbeat: rank 3 on host {1}, last seen \d+ s ago in phase '"),
        ("killed", 2, r"no heartbeat: rank 2 on host {1}, last seen \d+ s ago in phase '"),
    ],
)
def test_a_lost_rank_is_named_with_its_host_and_phase(
    nodes: tuple[Path, dict[str, Any]], case: str, rank: int, expected: str
) -> None:
    outcome = Outcome(nodes, case)
    assert outcome.statuses[rank] == -signal.SIGKILL
    assert all(status == 1 for r, status in enumerate(outcome.statuses) if r != rank), outcome.logs
    pattern = expected.replace("{1}", outcome.hosts[1])
    for other in {0, 1, 2, 3} - {rank}:
        lines = [line for line in outcome.errors(other) if "no heartbeat" in line]
        assert len(lines) == 1 and re.search(pattern, lines[0]), outcome.logs[other]
        assert "; rank" not in lines[0], lines  # no other rank is accused


def test_an_endless_reward_function_is_named_with_rank_and_host(
    nodes: tuple[Path, dict[str, Any]],
) -> None:
    outcome = Outcome(nodes, "endless")
    assert outcome.statuses == [2, 2, 2, 2], outcome.logs
    (line,) = outcome.errors(0)
    assert (
        f"rank 3 on host {outcome.hosts[1]}: ppo.reward_function endless:score took longer" in line
    )
    assert "endless.py:" in line


def test_a_full_disk_of_one_node_is_named(nodes: tuple[Path, dict[str, Any]]) -> None:
    outcome = Outcome(nodes, "disk")
    assert outcome.statuses == [2, 2, 2, 2], outcome.logs
    (line,) = outcome.errors(0)
    assert f"rank 2 on host {outcome.hosts[1]}: No space left on device" in line
    assert not list((nodes[0] / "out" / "disk" / "checkpoints").glob("step_*"))


def until(happened: Callable[[], bool], agents: list[subprocess.Popen[bytes]], what: str) -> None:
    """Wait for an event; fail if it does not happen, or an agent ends first."""
    end = time.monotonic() + LIMIT_S
    while not happened():
        assert time.monotonic() < end, what
        assert all(agent.poll() is None for agent in agents), what
        time.sleep(0.1)


def test_a_killed_agent_is_named_and_its_successor_resumes_the_run(tmp_path: Path) -> None:
    """Without its agent, a rank ends itself; then the other agent restarts with a new one."""
    write_inputs(tmp_path)
    port, out, logs = free_port(), tmp_path / "out", [tmp_path / f"agent{n}.log" for n in range(2)]
    options = ["--max-restarts", "3", "-m", "fastrlhf", "pretrain", str(tmp_path / "pretrain.yaml")]
    options += [f"output_dir={out}", "train.steps=1000000", "checkpoint.interval=1"]
    agents = [start_agent(tmp_path, node, port, *options) for node in range(2)]
    try:
        latest = out / "checkpoints" / "latest"
        until(latest.is_file, agents, "no checkpoint")
        agents[1].kill()
        agents[1].wait()

        def text(node: int) -> str:
            return logs[node].read_text()

        died = rf"rank \d on host {re.escape(socket.gethostname())}: its torchrun agent \(process"
        died += rf" {agents[1].pid}\) has died"
        until(lambda: re.search(died, text(1)) is not None, agents[:1], "the rank has not ended")
        until(
            lambda: re.search(died, text(0)) is not None, agents[:1], "the other does not say why"
        )
        agents[1] = start_agent(tmp_path, 1, port, *options)
        resumed = re.compile(rf"resuming {re.escape(str(out))} after step \d+ of 1000000")
        until(lambda: resumed.search(text(0) + text(1)) is not None, agents, "no restart")
        before = latest.read_text()
        until(lambda: latest.read_text() > before, agents, "no step after the restart")
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
            agent.wait()
