"""The errors that a command reports in one line. Any other exception is a bug and keeps its traceback."""

from __future__ import annotations

import re
import sys


class UsageError(Exception):
    """Bad input: names the key or path and what would be right. Commands print it and exit with 2."""


class TrainingError(Exception):
    """A run that cannot go on for a reason the user must decide about. Commands print it and exit with 1."""


# Values that came from the environment, and what is shown in their place.
_hidden: dict[str, str] = {}
SHORTEST_HIDDEN = 4  # a shorter value is part of many words


def hide(value: str, shown: str) -> None:
    """Makes `masked` replace `value` by `shown` from now on."""
    if len(value) >= SHORTEST_HIDDEN:
        _hidden[value] = shown


def masked(text: str) -> str:
    """`text` without the values that `hide` was given."""
    for value in sorted(_hidden, key=len, reverse=True):
        text = text.replace(value, _hidden[value])
    return text


def markdown_text(text: str) -> str:
    """`text` as markdown shows it, in one line: names and errors may hold any of its signs."""
    return re.sub(r"([\\`*_{}\[\]()<>#+|~!])", r"\\\1", " ".join(text.split()))


def unknown_key(key: str, choices: list[str]) -> str:
    """The message for a key that does not exist: the closest of `choices`, or all of them."""
    import difflib

    prefix, _, last = key.rpartition(".")
    near = difflib.get_close_matches(last, choices, 1)
    if near:
        return f"{key}: no such key, did you mean {prefix + '.' if prefix else ''}{near[0]}?"
    listed = f", {prefix or 'the configuration'} has {', '.join(sorted(choices))}" if choices else ""
    return f"{key}: no such key{listed}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, 300 characters at most, or the name of its type."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line[:300] for line in lines if line), type(error).__name__)


def compiler_error(error: Exception) -> TrainingError | None:
    """The one-line error for a failure of torch.compile, or None for any other error."""
    if not any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__):
        return None
    reason = first_line(error)
    return TrainingError(f"trainer.compile=true: the model cannot be compiled: {reason}; leave it out")


def print_error(error: Exception, prefix: str = "") -> int:
    """Prints the error on stderr and returns the command's exit code for it: 2 or 1."""
    print(f"{prefix}error: {masked(str(error))}", file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1
