"""The two errors a command reports in one line; anything else is a bug and keeps its traceback."""


class UsageError(Exception):
    """Bad input: names the key or path and what would be right. Commands print it and exit with 2."""


class TrainingError(Exception):
    """A run that cannot go on for a reason the user must decide about. Commands print it and exit with 1."""
