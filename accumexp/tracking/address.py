"""Addresses of tracking servers that are read from files, to which credentials may not be sent unasked."""

from __future__ import annotations

import os
from collections.abc import Collection

from ..config.trust import Trust
from ..errors import UsageError
from .store import SECRET, URI


def check_address(uri: str, source: str, given: Collection[str] = (), trust: Trust | None = None) -> None:
    """Refuses to go on with a server that `source` names, where the environment has credentials for one.

    MLflow sends MLFLOW_TRACKING_TOKEN and the like to whatever server it talks to.

    Args:
        given: the keys that the user has given.

    Raises:
        UsageError: naming the server, the variable and the remedy.
    """
    same = uri.rstrip("/") == os.environ.get(URI, "").rstrip("/")
    if not uri or uri.startswith("sqlite:") or same or "tracking.uri" in given or trust and trust.everything:
        return
    prefixes = ("MLFLOW_TRACKING_", "DATABRICKS_") if uri.startswith("http") else ("PG", "DATABRICKS_")
    credentials = [name for name in os.environ if name.startswith(prefixes) and SECRET.search(name)]
    if credentials:
        raise UsageError(
            f"tracking.uri={uri}: {source} names it, and {sorted(credentials)[0]} would be sent there; if "
            f"you trust it, give tracking.uri={uri} or {URI}={uri}"
        )
