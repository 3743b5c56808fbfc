"""Optimizer, checkpoints, metrics and the loop: what every algorithm shares; nothing here knows an algorithm."""
