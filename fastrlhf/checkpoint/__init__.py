"""Checkpoints: model folders, shard files by global position, hashes, and folders that appear only when complete."""

from __future__ import annotations
