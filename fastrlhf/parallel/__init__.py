"""Process groups, pipeline schedule and CPU support: the only package that reads megatron's global parallel state."""
