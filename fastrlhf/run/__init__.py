"""Runs: the parts of a run (builder.py), the jobs of the commands (jobs.py), and train.py."""
