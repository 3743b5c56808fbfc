"""Commands other than training; cli.py parses the arguments and calls one function of each."""
