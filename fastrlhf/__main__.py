"""`python -m fastrlhf`, as torchrun starts it."""

from __future__ import annotations

from fastrlhf.cli import program

if __name__ == "__main__":  # `data tokenize` spawns processes that import this module again
    program()
