"""`python -m accumexp.prove`: a certificate. Is this window the larger batch?

Exit code 0: proved, perhaps up to sources that are named; 1: not proved; 2: wrong usage.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

from ..cli import command, hydra_app
from ..errors import UsageError


def task(cfg: Any) -> None:
    """Called by Hydra. Imports the proof only here, so that `--help` stays fast."""
    from .job import prove_job

    prove_job(cfg)


def main() -> None:
    from ..environment.ranks import exit_immediately, launched_rank, silent_rank_overrides

    if {"-m", "--multirun"} & set(sys.argv[1:]):
        raise UsageError(
            "--multirun: a proof is of one experiment; python -m accumexp.run -m prove=true certifies "
            "the jobs of a sweep"
        )
    rank_info = launched_rank()
    if rank_info is None or rank_info.size == 1:
        hydra_app(task)
        return
    code: object = 0
    with tempfile.TemporaryDirectory(prefix="accumexp-rank-") as folder:
        try:
            if not rank_info.first:
                sys.argv[1:] = [*sys.argv[1:], *silent_rank_overrides(folder)]
            hydra_app(task)
        except SystemExit as end:
            code = end.code
    exit_immediately(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    command(main)
