"""Runs: the parts built from a configuration (builder.py), the jobs of the commands (jobs.py), and train.py."""
