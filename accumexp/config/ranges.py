"""The range of every number in the configuration, declared with its field. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError

# The largest number that torch and the tracking databases hold.
LARGEST = 2**63 - 1


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have; infinities and nan are outside of every range.

    Attributes:
        above, below: the ends that are outside.
        at_least, at_most: the ends that are inside.
        whole: whether a fraction is outside.
    """

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    whole: bool = False

    def refusal(self, value: float) -> str | None:
        """What `value` must be, or None if it is in the range."""
        if isinstance(value, float) and not math.isfinite(value):
            return "a finite number"
        if self.whole and value != int(value):
            return "a whole number"
        if self.above is not None and not value > self.above:
            return f"above {self.above:g}"
        if self.at_least is not None and value < self.at_least:
            return f"at least {self.at_least:g}"
        if self.below is not None and not value < self.below:
            return f"below {self.below:g}"
        if self.at_most is not None and value > self.at_most:
            return f"at most {self.at_most}"
        return None


def number(default: Any, **limits: Any) -> Any:
    """A dataclass field with `default`, within the `Range` of `limits`."""
    return field(default=default, metadata={"range": Range(**limits)})


def count(default: Any, at_least: int = 1, at_most: int = 2**31 - 1) -> Any:
    """A dataclass field that counts something."""
    return number(default, at_least=at_least, at_most=at_most)


def ranges(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, Range]]:
    """(dotted key, value, range) of every number that the dataclass `node` declares."""
    for item in dataclasses.fields(node):
        value, key = getattr(node, item.name), f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            yield from ranges(value, f"{key}.")
        elif "range" in item.metadata:
            yield key, value, item.metadata["range"]


def check_ranges(node: Any, prefix: str = "") -> None:
    """
    Raises:
        UsageError: naming the first key whose number is out of range.
    """
    for key, value, allowed in ranges(node, prefix):
        refusal = allowed.refusal(value) if isinstance(value, int | float) else None
        if refusal:
            raise UsageError(f"{key}={value}: {refusal}")


def require(name: str, value: float | None, **limits: Any) -> None:
    """
    Raises:
        ValueError: naming `name`, if `value` is a number outside the `Range` of `limits`.
    """
    refusal = None if value is None else Range(**limits).refusal(value)
    if refusal:
        raise ValueError(f"{name}={value}: {refusal}")


def check_numbers(node: Any, key: str) -> None:
    """
    Raises:
        UsageError: naming the first number in a `_target_` node that is nan or has more than 64 bits.
    """
    if isinstance(node, Mapping):
        for name, value in node.items():
            check_numbers(value, f"{key}.{name}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            check_numbers(value, f"{key}.{index}")
    elif isinstance(node, float) and math.isnan(node):
        raise UsageError(f"{key}=nan: is no number, give one")
    elif isinstance(node, int) and abs(node) > LARGEST:
        raise UsageError(f"{key}={node}: at most {LARGEST}")


# What torch accepts of its optimizers' settings although no training goes well with it.
USUAL = {
    "lr": Range(at_least=0),
    "momentum": Range(at_least=0, below=1),
    "dampening": Range(at_least=0, at_most=1),
    "weight_decay": Range(at_least=0),
    "alpha": Range(at_least=0, below=1),
    "gamma": Range(above=0),
    "step_size": Range(at_least=1, whole=True),
}


def unusual_settings(node: Mapping[str, Any], prefix: str) -> list[str]:
    """A line for every number in a `_target_` node that is not finite or outside its usual range."""
    lines = []
    for name, value in node.items():
        if isinstance(value, Mapping):
            lines += unusual_settings(value, f"{prefix}.{name}")
        elif isinstance(value, list):
            for number, entry in enumerate(value):
                if isinstance(entry, Mapping):
                    lines += unusual_settings(entry, f"{prefix}.{name}.{number}")
        elif isinstance(value, int | float):
            reason = USUAL.get(str(name), Range()).refusal(value)
            if reason:
                lines.append(f"{prefix}.{name}={value}: usual is {reason}")
    return lines
