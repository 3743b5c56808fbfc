"""Optimizer, metrics and training loop, which all algorithms share and which know none of them."""

from __future__ import annotations

import fastrlhf.parallel  # noqa: F401  first: it filters the warnings of megatron's import
