"""Instantiation of `_target_` nodes, with one-line errors."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping
from typing import Any

from ..errors import UsageError
from .target_errors import missing_part, unknown_argument

# Classes and modules named in checkpoints and configurations of earlier versions.
MOVED_CLASSES = {
    "accumexp.losses.Regression": "accumexp.training.losses.Regression",
    "accumexp.callbacks.LossMonitor": "accumexp.training.progress_display.LossMonitor",
    "accumexp.training.callbacks.LossMonitor": "accumexp.training.progress_display.LossMonitor",
    "accumexp.display.Progress": "accumexp.training.progress_display.ProgressBar",
    "accumexp.training.progress_display.Progress": "accumexp.training.progress_display.ProgressBar",
}
MOVED_MODULES = {
    "accumexp.callbacks": "accumexp.training.callbacks",
    "accumexp.checkpoint": "accumexp.training.checkpoint",
    "accumexp.display": "accumexp.training.progress_display",
    "accumexp.metrics": "accumexp.training.metrics",
    "accumexp.noise": "accumexp.training.noise_scale",
    "accumexp.optim": "accumexp.training.schedules",
    "accumexp.sample_noise": "accumexp.training.sample_noise_scale",
}


def with_present_targets(node: Any) -> Any:
    """`node` with every `_target_` that has moved replaced by its present path."""
    if isinstance(node, Mapping):
        moved_node = {key: with_present_targets(value) for key, value in node.items()}
        target = str(node.get("_target_", ""))
        module, _, name = target.rpartition(".")
        if target in MOVED_CLASSES:
            moved_node["_target_"] = MOVED_CLASSES[target]
        elif module in MOVED_MODULES:
            moved_node["_target_"] = f"{MOVED_MODULES[module]}.{name}"
        return moved_node
    if isinstance(node, list | tuple):
        return [with_present_targets(value) for value in node]
    return node


def build(node: Mapping[str, Any], key: str, *args: Any, **offered: Any) -> Any:
    """Instantiates `node`, whose `_target_` names a class or function of any installed package.

    Args:
        key: the node's dotted key, for the error.
        args: passed first.
        offered: passed as keywords where the target takes parameters of these names.

    Raises:
        UsageError: if the target cannot be imported, or refuses its arguments.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import get_object, instantiate

    if not isinstance(node, Mapping) or "_target_" not in node:
        raise UsageError(f"{key}: names no class, give {key}._target_=package.Class")
    node = with_present_targets(node)
    target = str(node["_target_"])
    hydra_log = logging.getLogger("hydra.utils")
    was_disabled, hydra_log.disabled = hydra_log.disabled, True  # Hydra also prints the error it raises
    try:
        function = get_object(target)
    except Exception as error:
        raise UsageError(f"{key}._target_={target}: {missing_part(target) or _reason(error)}") from error
    finally:
        hydra_log.disabled = was_disabled
    if not callable(function):
        raise UsageError(f"{key}._target_={target}: a class or function is needed")
    try:
        names = inspect.signature(function).parameters
    except (TypeError, ValueError):
        names = {}
    for name, value in node.items():
        _check_number(key, name, value, names.get(name), target)
    extra = {name: value for name, value in offered.items() if name in names and name not in node}
    try:
        return instantiate(dict(node), *args, **extra, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, UsageError):
            raise UsageError(f"{key}: {cause}") from cause
        if inner := re.match(r"Error locating target '([^']+)'", str(error)):
            reason = missing_part(inner[1]) or _reason(cause)
            raise UsageError(f"{key} ({target}): {inner[1]}: {reason}") from cause
        reason = unknown_argument(cause, key, node, function, len(args)) or _reason(cause)
        # A message such as "norm=layer: ..." that begins with an argument of the node names the key itself.
        if reason.partition("=")[0] in node:
            raise UsageError(f"{key}.{reason}") from cause
        raise UsageError(f"{key} ({target}): {reason}") from cause


def _check_number(key: str, name: str, value: Any, parameter: inspect.Parameter | None, target: str) -> None:
    """Refuses text or true and false for a number of torch's or the project's, which may fail only later."""
    if parameter is None or not target.startswith(("torch.", "accumexp.")):
        return
    default = parameter.default
    is_number = isinstance(default, int | float) and not isinstance(default, bool)
    if is_number and isinstance(value, str | bool) and "str" not in str(parameter.annotation).lower():
        raise UsageError(f"{key}.{name}={value}: a number is needed")


def lacks_argument(node: Mapping[str, Any]) -> bool:
    """Whether the function that `node` names has a required parameter that the node does not give."""
    from hydra.utils import get_object

    if "_target_" not in node or "_partial_" in node or node.get("_args_"):
        return False
    try:
        parameters = inspect.signature(get_object(with_present_targets(node)["_target_"])).parameters.values()
    except Exception:  # `build` says why
        return False
    return any(
        parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and parameter.name not in node
        for parameter in parameters
    )


def _reason(error: BaseException) -> str:
    """The first line of an error, with the following ones while a line ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    end = next((k for k, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    return " ".join(lines[: end + 1])
