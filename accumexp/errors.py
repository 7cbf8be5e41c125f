"""What a command reports in one line: two kinds of error. Anything else is a bug and keeps its traceback."""

from __future__ import annotations

import sys


class UsageError(Exception):
    """Bad input: names the key or path and what would be right. Commands print it and exit with 2."""


class TrainingError(Exception):
    """A run that cannot go on for a reason the user must decide about. Commands print it and exit with 1."""


def unknown_key(key: str, choices: list[str]) -> str:
    """The line for a key that does not exist, with its nearest neighbour or its siblings."""
    import difflib

    prefix, _, last = key.rpartition(".")
    near = difflib.get_close_matches(last, choices, 1)
    if near:
        return f"{key}: no such key, did you mean {prefix + '.' if prefix else ''}{near[0]}?"
    known = f", {prefix or 'the configuration'} has {', '.join(sorted(choices))}" if choices else ""
    return f"{key}: no such key{known}"


def of_the_compiler(error: Exception) -> TrainingError | None:
    """The line for an error of torch.compile, or None for any other."""
    if not any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__):
        return None
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return TrainingError(f"trainer.compile=true: the model cannot be compiled: {reason}; leave it out")


def fail(error: Exception, speaker: str = "") -> int:
    """Prints the error's line and gives the exit code it stands for."""
    print(f"{speaker}error: {error}", file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1
