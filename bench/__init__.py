"""Benchmarks: `python -m bench --help`. Rivals are used where they are installed."""
