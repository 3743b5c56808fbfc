"""No rank dies at its exit, whichever way a run of two ranks ends, on a busy machine.

FASTRLHF_EXITS sets the number of runs, for a longer search.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from python_runs import run_python

from configs.debug import make_data

RUNS = int(os.environ.get("FASTRLHF_EXITS", "50"))
STATUSES = {
    "done": [0, 0],
    # Rank 1 fails or is interrupted; rank 0 waits in a collective, and the closed connection ends
    # it.
    "user error": [1, 2],
    "defect": [1, 1],
    "Ctrl-C twice": [1, 130],
    # All ranks save and stop.
    "SIGTERM": [0, 0],
    "Ctrl-C": [130, 130],
}


def test_every_rank_exits_with_its_own_status(tmp_path: Path) -> None:
    """Statuses -6 and 99 would be SIGABRT at exit and a Python thread that has not ended."""
    make_data.main(tmp_path / "data")
    script = Path(__file__).with_name("run_exits.py")
    run_python([str(script), str(tmp_path), str(RUNS)], timeout_s=60 * RUNS)
    exits = json.loads((tmp_path / "exits.json").read_text())
    assert len(exits) == RUNS and {ending for ending, _ in exits} == STATUSES.keys()
    wrong = [
        (number, ending, got)
        for number, (ending, got) in enumerate(exits)
        if got != STATUSES[ending]
    ]
    logs = [
        path.read_text()[-1000:]
        for number, *_ in wrong[:1]
        for path in tmp_path.glob(f"run{number}.*.log")
    ]
    assert not wrong, "\n".join([str(wrong), *logs])
    assert "terminate called" not in "".join(path.read_text() for path in tmp_path.glob("*.log"))
