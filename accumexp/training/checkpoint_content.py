"""What a checkpoint can hold, how large it is, and the message where it cannot be written."""

from __future__ import annotations

import copy
import shutil
from collections import Counter, OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..environment.console import amount
from ..errors import UsageError, first_line

# What `torch.load(weights_only=True)` reads besides tensors and containers. No subclasses: NumPy's floats
# are Python's, too, and are not read.
SAVABLE = (int, float, bool, complex, str, bytes, torch.dtype, torch.device, type(None))


def without_views(content: Any) -> Any:
    """`content` with every view of a larger tensor copied: torch would save the larger tensor's storage."""
    if isinstance(content, torch.Tensor):
        if content.layout is not torch.strided:  # no storage of its own, and no view
            return content
        is_view = content.untyped_storage().nbytes() > content.numel() * content.element_size()
        return content.clone() if is_view else content
    if isinstance(content, dict):
        copied = copy.copy(content)  # the state_dict of a module has attributes too
        copied.update({key: without_views(value) for key, value in content.items()})
        return copied
    if isinstance(content, list | tuple):
        return type(content)(without_views(value) for value in content)
    return content


def check_savable(key: str, state: Any) -> None:
    """Checks that a checkpoint can hold the state of the object that `key` configures.

    Raises:
        UsageError: naming the key and the first part of another type.
    """
    if type(state) in (dict, OrderedDict, Counter):
        for name, value in state.items():
            check_savable(f"{key}: {name}" if ": " not in key else f"{key}.{name}", value)
    elif isinstance(state, list | tuple | set | frozenset):
        for value in state:
            check_savable(key, value)
    elif not isinstance(state, torch.Tensor) and type(state) not in SAVABLE:
        raise UsageError(
            f"{key} in its state_dict is a {type(state).__name__}, which a checkpoint does not hold; make "
            "it of tensors, numbers, text and containers of them"
        )


def needed_bytes(content: Any) -> int:
    """The bytes of the tensors in `content`, about the size of a checkpoint of it."""
    if isinstance(content, torch.Tensor):
        return content.nbytes if content.layout is torch.strided else 0
    if isinstance(content, Mapping):
        return sum(needed_bytes(value) for value in content.values())
    return sum(needed_bytes(value) for value in content) if isinstance(content, list | tuple) else 0


def not_written(path: Path, content: Any, error: Exception, whole: Path | None) -> str:
    """The message for a checkpoint that cannot be written; `whole` is the newest that is whole."""
    cause = error if isinstance(error, OSError) else error.__context__
    reason = getattr(cause, "strerror", None) or first_line(error)
    room = f"{amount(needed_bytes(content))} are needed"
    with suppress(OSError):
        room += f", {amount(shutil.disk_usage(path.parent).free)} are free"
    left = f"the newest that is whole is {whole}" if whole else "there is no earlier one"
    return f"checkpoint {path}: cannot be written: {reason}; {room}; {left}"
