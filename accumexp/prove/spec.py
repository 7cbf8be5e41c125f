"""`ProofSpec`: all that a process needs to make a certificate. It can be pickled."""

from __future__ import annotations

from dataclasses import dataclass

from ..config.schema import Config
from ..tracking.folder import RunFolder


@dataclass(frozen=True)
class ProofSpec:
    """A certificate to make: of which experiment, in which folder, by which command line."""

    config: Config
    folder: RunFolder
    command: str = ""
