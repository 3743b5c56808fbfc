"""A PPO run of two ranks whose rank 1 kills itself once, in step 4.

torchrun --max-restarts 1 --nproc-per-node 2 run_elastic.py FOLDER, after run_faults.py FOLDER.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from run_faults import make_config

from fastrlhf.algorithms.ppo import PPO
from fastrlhf.parallel.exit import clean_exit
from fastrlhf.run import train

if __name__ == "__main__":
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        learn = PPO.learn

        def learn_until_step_4(self: PPO, *arguments: Any) -> Any:
            if self.iteration == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return learn(self, *arguments)

        PPO.learn = learn_until_step_4  # type: ignore[method-assign]
    with clean_exit():
        train.train("ppo", make_config(Path(sys.argv[1]), "dp2", "dp2.elastic"))
