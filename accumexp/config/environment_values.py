"""Values from the environment, which may be secrets: records keep the expression in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import hide
from .job_folder import PATHS
from .loading import to_plain
from .overrides import names_key
from .trust import ENVIRONMENT

# Where the run reads and writes; a password in an address is refused where the store is opened.
NEEDED = ("data.root", "tracking.uri", "resume")


def environment_values(cfg: DictConfig) -> dict[str, str]:
    """{dotted key: expression} of the values of `cfg` that are text from the environment, and no paths.

    The positions in a list are parts of a key. Numbers, and text that a path is, are recorded as they are.
    """
    raw = OmegaConf.to_container(cfg, resolve=False)
    expressions = {key: text for key, text in _leaves(raw) if isinstance(text, str) and "${" in text}
    chosen: dict[str, str] = {}
    values: set[str] = set()
    while True:
        more = {
            key: text
            for key, text in expressions.items()
            if key not in chosen
            and not _is_path(key)
            and (
                ENVIRONMENT in text
                or any(names_key(text, other) for other in chosen)
                or _holds(cfg, key, values)
            )
        }
        if not more:
            return chosen
        chosen |= more
        values |= {value for key in more if len(value := str(_value(cfg, key))) > 3}


def recorded(config: Any, expressions: Mapping[str, str]) -> dict[str, Any]:
    """`config` as plain dicts, with the `environment_values` as their expressions."""
    return _replaced(to_plain(config), expressions, "")


def environment_overrides(overrides: Sequence[str]) -> dict[str, str]:
    """{key: expression} of the `key=value` overrides whose value is text from the environment."""
    pairs = (one.partition("=") for one in overrides if ENVIRONMENT in one)
    return {key.lstrip("+"): value.strip("'\"") for key, _, value in pairs}


def hide_values(config: Any, expressions: Mapping[str, str]) -> None:
    """Keeps the `environment_values` of `config` out of messages from now on."""
    plain = dict(_leaves(to_plain(config)))
    for key, expression in expressions.items():
        if isinstance(value := plain.get(key), str):
            hide(value, expression)


def _replaced(node: Any, expressions: Mapping[str, str], key: str) -> Any:
    if key in expressions and not isinstance(node, int | float | None):
        return expressions[key]
    if isinstance(node, Mapping):
        return {
            name: _replaced(child, expressions, f"{key}.{name}" if key else str(name))
            for name, child in node.items()
        }
    if isinstance(node, list):
        return [_replaced(child, expressions, f"{key}.{number}") for number, child in enumerate(node)]
    return node


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for name, child in node.items():
            yield from _leaves(child, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for number, child in enumerate(node):
            yield from _leaves(child, f"{key}.{number}")
    else:
        yield key, node


def _is_path(key: str) -> bool:
    return key in NEEDED or key.rpartition(".")[2].lower().endswith(PATHS)


def _value(cfg: DictConfig, key: str) -> Any:
    try:
        return OmegaConf.select(cfg, key)
    except OmegaConfBaseException:  # reported where the whole is resolved
        return None


def _holds(cfg: DictConfig, key: str, values: set[str]) -> bool:
    return bool(values) and isinstance(text := _value(cfg, key), str) and any(one in text for one in values)
