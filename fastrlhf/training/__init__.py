"""Optimizer, checkpoints, metrics and the loop: what every algorithm shares; nothing here knows an algorithm."""

from __future__ import annotations

import fastrlhf.parallel  # noqa: F401  first of all: its filters quiet what megatron warns of when it is imported
