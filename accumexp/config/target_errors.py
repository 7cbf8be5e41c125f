"""Why a `_target_` cannot be built: the part of its path or the argument that is wrong, and the nearest."""

from __future__ import annotations

import difflib
import inspect
import pkgutil
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

MOST_LISTED = 12


def missing_part(target: str) -> str | None:
    """The part of the path `target` that there is not, and the remedy; None if it fails for another reason.

    Imports the modules of the path, as building the target does.
    """
    top, *rest = target.split(".")
    if not rest:
        return f"names no module, give package.module.{top}"
    try:
        parent: Any = import_module(top)
    except ModuleNotFoundError as error:
        if error.name != top:
            return None
        return f"there is no package {top}; run in the folder that holds it (with python -m), or install it"
    except Exception:
        return None
    path = top
    for name in rest:
        inner = f"{path}.{name}"
        if not hasattr(parent, name) and isinstance(parent, ModuleType):
            try:
                import_module(inner)
            except ModuleNotFoundError as error:
                if error.name != inner:  # of something that the module imports
                    return None
            except Exception:
                return None
        if not hasattr(parent, name):
            return f"{path} has no {name}{_alternatives(parent, path, name)}"
        parent, path = getattr(parent, name), inner
    return None


def _alternatives(parent: Any, path: str, name: str) -> str:
    """The name in `parent`, the module or class `path`, that is nearest to `name`, or all of its own."""
    public = {key: getattr(parent, key, None) for key in dir(parent) if not key.startswith("_")}
    modules = [one.name for one in pkgutil.iter_modules(getattr(parent, "__path__", ()))]
    if near := difflib.get_close_matches(name, [*public, *modules], 1):
        return f", did you mean {path}.{near[0]}?"
    defined_here = [key for key, value in public.items() if getattr(value, "__module__", None) == path]
    names = sorted({*defined_here, *modules})
    return f", it has {', '.join(names)}" if 0 < len(names) <= MOST_LISTED else ""


def unknown_argument(
    error: BaseException, key: str, node: Mapping[str, Any], function: Callable[..., Any], given: int = 0
) -> str | None:
    """The line for an argument of `node` that `function` does not take; None if `error` is another.

    Args:
        key: the node's dotted key.
        given: the number of arguments that are passed by position.
    """
    refused = re.search(r"got an unexpected keyword argument '(\w+)'", str(error))
    if not isinstance(error, TypeError) or refused is None or refused[1] not in node:
        return None
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return None
    taken = [one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    taken = taken[given:]
    name = refused[1]
    if name in taken:  # refused by a call further inside
        return None
    near = difflib.get_close_matches(name, taken, 1)
    remedy = f"did you mean {key}.{near[0]}?" if near else f"~{key}.{name} leaves it out"
    return f"takes no argument {name}, it takes {', '.join(taken) or 'none'}; {remedy}"
