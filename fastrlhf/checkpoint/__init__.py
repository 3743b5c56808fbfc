"""Checkpoints: model folders, shard files by global position, hashes, and atomic folders."""

from __future__ import annotations
