"""Commands other than training: each parses nothing, and is one function called by cli.py."""
