"""`python -m accumexp.run`: compose, train, evaluate, checkpoint, log."""

from __future__ import annotations

import sys
import tempfile
from contextlib import nullcontext
from typing import Any

from ..cli import hydra_app


def task(cfg: Any) -> float | None:
    """Called by Hydra once per job. Imports the training only here, so that `--help` stays fast."""
    from .job import run_job

    return run_job(cfg)


def main() -> None:
    """Runs Hydra with each line of arguments. In one of torchrun's ranks it also ends the process."""
    from ..environment.ranks import RankInfo, exit_immediately, launched_rank, silent_rank_overrides
    from .arguments import command_lines
    from .sweep_end import closing_sweep

    arguments = sys.argv[1:]
    lines, report_settings = command_lines(arguments)
    rank_info = launched_rank() or RankInfo()
    code: object = 0
    with tempfile.TemporaryDirectory(prefix="accumexp-rank-") as folder:
        if not rank_info.first:
            lines = [[*line, *silent_rank_overrides(folder)] for line in lines]
        try:
            with closing_sweep(arguments, report_settings) if rank_info.first else nullcontext():
                for line in lines:
                    sys.argv[1:] = line
                    hydra_app(task)
        except SystemExit as end:
            if rank_info.size == 1:
                raise
            code = end.code
    if rank_info.size > 1:
        exit_immediately(code if isinstance(code, int) else 1)
