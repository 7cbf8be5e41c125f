"""The addresses of stores: those that cannot be used are refused before anything is opened."""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from collections.abc import Collection
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from ..config.trust import Trust
from ..errors import UsageError

# The variable of MLflow by which a user gives a store.
URI = "MLFLOW_TRACKING_URI"
# Names of parameters in an address whose value is a secret.
SECRET = re.compile(r"pass|pwd|token|secret|(api|access)_?key|credential", re.IGNORECASE)


def check_address(uri: str, key: str) -> None:
    """Refuses addresses that hold a secret, that name no file, and databases that need a server."""
    parts = urlsplit(uri)
    if parts.password is not None:
        place = "MLFLOW_TRACKING_PASSWORD" if uri.startswith("http") else "~/.pgpass or PGPASSWORD"
        shown = uri.replace(f":{parts.password}@", ":...@")
        raise UsageError(
            f"{key}={shown}: a password here would be written into every run; put it into {place}"
        )
    if secret := next((name for name, _ in parse_qsl(parts.query) if SECRET.search(name)), None):
        shown = f"{uri.partition('?')[0]}?{secret}=..."
        raise UsageError(
            f"{key}={shown}: a secret here would be written into every run; put it into "
            "MLFLOW_TRACKING_TOKEN, or ~/.pgpass"
        )
    if parts.scheme == "sqlite" and (not parts.path.strip("/") or Path(parts.path[1:]).is_dir()):
        raise UsageError(f"{key}={uri}: names no file to keep runs in; give sqlite:///mlflow.db")
    if parts.scheme.startswith(("mysql", "mssql")):
        raise UsageError(
            f"{key}={uri}: not a database that runs open themselves; start `mlflow server "
            f"--backend-store-uri {uri}` and give its http address"
        )


def check_server(uri: str, key: str) -> None:
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5):
            pass
    except urllib.error.HTTPError:
        pass  # a server answers; the first call shows whether it is MLflow
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UsageError(
            f"{key}={uri}: no server answers ({reason}); start it with `mlflow server`, or "
            f"leave {key} out for a local store"
        ) from error


def check_credentials(uri: str, source: str, given: Collection[str] = (), trust: Trust | None = None) -> None:
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
