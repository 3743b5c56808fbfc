"""`python -m fastrlhf`, as torchrun starts it."""

from __future__ import annotations

from fastrlhf.cli import main

if __name__ == "__main__":  # the checkpoint writer spawns processes that import this module again
    main()
