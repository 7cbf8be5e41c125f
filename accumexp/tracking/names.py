"""Names of metrics, params and tags as MLflow takes them."""

from __future__ import annotations

import logging
import re

log = logging.getLogger(__name__)
# mlflow.utils.validation: characters, and the length of a key.
FORBIDDEN = re.compile(r"[^/\w.\- :]")
LONGEST = 250


def legal_name(name: str) -> str:
    """`name` with what MLflow refuses replaced: characters by `_`, empty and relative parts of a path."""
    parts = FORBIDDEN.sub("_", name).split("/")
    kept = "/".join("_" if part in ("", ".", "..") else part for part in parts)
    return kept[:LONGEST]


class LegalNames:
    """The legal name of every key of a run, different ones for different keys; each change is logged once."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def __call__(self, key: str) -> str:
        if key not in self._names:
            self._names[key] = self._new(key)
        return self._names[key]

    def _new(self, key: str) -> str:
        name = legal_name(key)
        taken, number = set(self._names.values()), 2
        while name in taken:
            name, number = f"{legal_name(key)[: LONGEST - 4]}_{number}", number + 1
        if name != key:
            log.warning("tracking: %s is recorded as %s, MLflow takes no such name", key, name)
        return name
