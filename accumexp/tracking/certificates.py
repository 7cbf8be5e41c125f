"""Certificates as they are kept: a file in a run's folder, and a tag. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path

CERTIFICATE = "certificate.json"
TAG = "accumexp.certificate"


def proved_in(folder: Path) -> bool:
    """What the certificate in `folder` says."""
    return json.loads((folder / CERTIFICATE).read_text())["verdict"] != "not proved"
