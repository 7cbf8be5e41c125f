"""The trainers that can be audited: the project's adapters, and a function of the user's own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Protocol, cast

from ..errors import UsageError, first_line

ADAPTERS = f"{__package__}.adapters"


class Adapter(Protocol):
    """A module of `accumexp.audit.adapters`."""

    PACKAGE: str
    SETTINGS: tuple[str, ...]
    fit: Callable[..., None]


def trainer_names() -> list[str]:
    """The names of all adapters, whether their packages are installed or not."""
    return sorted(module.name for module in iter_modules([str(Path(__file__).parent / "adapters")]))


def adapter_of(name: str) -> Adapter:
    """Imports the adapter `name`.

    Raises:
        UsageError: if there is none, or if its package is not installed or cannot be imported.
    """
    if name not in trainer_names():
        names = ", ".join(trainer_names())
        raise UsageError(f"{name}: no trainer of this name; there are {names}, all, and module:function")
    try:
        return cast(Adapter, import_module(f"{ADAPTERS}.{name}"))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("accumexp"):
            raise
        raise UsageError(f"{name}: needs the package {error.name}; pip install {package_of(name)}") from None
    except Exception as error:  # packages fail in many ways where they do not work
        raise UsageError(
            f"{name}: {package_of(name)} cannot be imported here: {first_line(error)}"
        ) from error


def package_of(name: str) -> str:
    """The distribution of a trainer, read from its adapter without importing it."""
    source = (Path(__file__).parent / "adapters" / f"{name}.py").read_text(encoding="utf-8")
    line = next(line for line in source.splitlines() if line.startswith("PACKAGE = "))
    return line.split('"')[1]


def version_of(package: str) -> str:
    """The installed version of a distribution; "" if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def fit_of(path: str) -> Callable[..., Any]:
    """The function of `path`, "module:function", found from the current folder or the import path.

    Raises:
        UsageError: if there is no such module or function.
    """
    module_name, _, function_name = path.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        there = find_spec(module_name) is not None
    except (ModuleNotFoundError, ValueError):
        there = False
    if not there:
        raise UsageError(f"{path}: no module {module_name} in this folder or on the import path")
    fit = getattr(import_module(module_name), function_name, None)
    if not callable(fit):
        raise UsageError(f"{path}: {module_name} has no function {function_name or '(none is named)'}")
    return fit
