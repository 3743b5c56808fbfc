"""Benchmarks: `python -m bench --help`. Rivals are measured where they are installed."""
