"""Activation profiles on the command line: recorded from texts, looked at, merged, compared."""
