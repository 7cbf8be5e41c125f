"""What a configuration that was read from a file may do. Imports no torch.

A user's own configuration, composed from the command line, may name any class and use any resolver. That of
a checkpoint may be another's: it is data, until the user says otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from .instantiate import with_present_targets

PACKAGE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
# After `${`: the name of a key, or of a resolver if a colon follows.
INTERPOLATION = re.compile(r"\$\{(?:\s*([\w.\[\]-]*)\s*([:}]))?")
# Resolvers of `accumexp.conf` and Hydra that compute with their arguments, or the time.
PURE = {"now", "oc.select", "product", "scaled_rate", "micro_batch_size", "slug"}
ENVIRONMENT = "oc.env"


@dataclass(frozen=True)
class Trust:
    """What the user allows to a configuration from a file, besides the classes that the project knows.

    Attributes:
        everything: any target and any resolver, as in the user's own configuration.
        packages: dotted names of packages whose classes and functions may be named.
        targets: paths that the command's own configuration names as well.
        expressions: (dotted key, interpolation) of values that the command's own configuration has as well.
        in_python: it was given to a function, not on a command line; messages then have Python's form too.
    """

    everything: bool = False
    packages: frozenset[str] = frozenset()
    targets: frozenset[str] = frozenset()
    expressions: frozenset[tuple[str, str]] = frozenset()
    in_python: bool = False

    @classmethod
    def given(cls, value: Any) -> Trust:
        """The trust that `trust=<value>` gives: true, false, a package or a list of packages.

        Raises:
            UsageError: for anything else.
        """
        if isinstance(value, str):
            value = {"true": True, "false": False, "null": None}.get(value.strip().lower(), value)
        if value is None or isinstance(value, bool):
            return cls(everything=bool(value))
        names = re.split(r"[\s,]+", value.strip("[] ")) if isinstance(value, str) else list(value)
        names = [name.strip("'\"") if isinstance(name, str) else name for name in names if name != ""]
        for name in names:
            if not isinstance(name, str) or not PACKAGE.fullmatch(name):
                raise UsageError(
                    f"trust={value}: {name} is no package; give trust=true, or packages as in "
                    "trust=[my_package]"
                )
        return cls(packages=frozenset(names))

    def allows_package(self, name: str) -> bool:
        """Whether the module or path `name` is in a package that the user allows."""
        return any(name == package or name.startswith(f"{package}.") for package in self.packages)

    def remedy(self, packages: Collection[str] = ()) -> str:
        """The argument that allows `packages`, without any the one that allows everything."""
        text = f"trust=[{','.join(packages)}]" if packages else "trust=true"
        if self.in_python:
            text += f" (in Python trust={json.dumps(packages) if packages else True})"
        return text


@dataclass(frozen=True)
class Refusal:
    """Why a target may not be built, and the package that the user can allow, None if there is none."""

    reason: str
    package: str | None = None


def target_nodes(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, `_target_`) of every node in `node` that names one, at any depth."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield key, node["_target_"]
        children = node.items()
    elif isinstance(node, list | tuple):
        children = enumerate(node)
    else:
        return
    for name, child in children:
        yield from target_nodes(child, f"{key}.{name}" if key else str(name))


def target_paths(plain: Any) -> frozenset[str]:
    """The paths that `plain` names, as they are now and as they were written."""
    nodes = [*target_nodes(plain), *target_nodes(with_present_targets(plain))]
    return frozenset(target for _, target in nodes if isinstance(target, str))


def check_targets(
    plain: Mapping[str, Any],
    source: str,
    given: Collection[str],
    trust: Trust,
    refusal_of: Callable[[str, str, Trust], Refusal | None],
) -> None:
    """Refuses the targets of `plain` that may not be built; nothing is built here.

    Args:
        source: the file that `plain` was read from, for the error.
        given: keys that are the user's own.
        refusal_of: why a target at a key may not be built, or None.

    Raises:
        UsageError: naming the first one, and what to add to allow all of them.
    """
    if trust.everything:
        return
    refusals: list[tuple[str, Refusal]] = []
    for key, target in target_nodes(with_present_targets(plain)):
        if is_given(f"{key}._target_", given) or isinstance(target, str) and target in trust.targets:
            continue
        if not isinstance(target, str):
            raise UsageError(f"{key}._target_={target}: in {source} is no path of a class")
        if refusal := refusal_of(key, target, trust):
            refusals.append((f"{key}._target_={target}", refusal))
    if not refusals:
        return
    packages = {refusal.package for _, refusal in refusals}
    named = sorted({*trust.packages, *(package for package in packages if package)})
    remedy = f"{trust.remedy()}, which lets it run any code" if None in packages else trust.remedy(named)
    # What no package can be allowed for is named first.
    line, refusal = min(refusals, key=lambda one: one[1].package is not None)
    raise UsageError(f"{line}: {source} names it, and {refusal.reason}; if you trust that file, add {remedy}")


def is_given(key: str, given: Collection[str]) -> bool:
    """Whether the user has given `key` or a node that it lies in."""
    return any(key == other or key.startswith(f"{other}.") for other in given)


def impure(text: Any) -> bool:
    """Whether `text` has an interpolation that does more than to read other keys and to compute."""
    if not isinstance(text, str):
        return False
    interpolations = INTERPOLATION.finditer(text)
    return any(one[2] is None or one[2] == ":" and one[1] not in PURE for one in interpolations)


def impure_values(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, expression) of every value in `node` that is `impure`."""
    if isinstance(node, Mapping):
        for name, child in node.items():
            yield from impure_values(child, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list | tuple):
        for number, child in enumerate(node):
            yield from impure_values(child, f"{key}.{number}")
    elif impure(node):
        yield key, node


def check_interpolations(plain: Mapping[str, Any], source: str, given: Collection[str], trust: Trust) -> None:
    """Refuses values of `plain` whose interpolations read the environment or files, or do anything else.

    Raises:
        UsageError: naming the first one, and how to give all of them.
    """
    if trust.everything:
        return
    values = {
        key: value
        for key, value in impure_values(plain)
        if not is_given(key, given) and (key, value) not in trust.expressions
    }
    if not values:
        return
    again = " ".join(f"++{key}='{value}'" for key, value in values.items())
    key, value = next(iter(values.items()))
    what = "reads the environment" if ENVIRONMENT in value else "does more than to read other keys"
    raise UsageError(
        f"{key}={value}: {what}, which the configuration of {source} may not; if that is meant, give "
        f"{again} or {trust.remedy()}"
    )


def inert(node: Any) -> Any:
    """`node` with its impure interpolations escaped, so that they stay the text that they are."""
    if isinstance(node, Mapping):
        return {key: inert(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [inert(value) for value in node]
    return re.sub(r"\\*\$\{", r"\\${", node) if impure(node) else node
