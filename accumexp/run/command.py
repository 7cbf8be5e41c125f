"""`python -m accumexp.run`: compose, train, evaluate, checkpoint, log."""

from __future__ import annotations

import sys
import tempfile
from typing import Any

from ..cli import hydra_app


def task(cfg: Any) -> float | None:
    """The function Hydra calls once a job. `--help` imports nothing of the training."""
    from .job import run_job

    return run_job(cfg)


def main() -> None:
    from ..environment.ranks import launched_rank
    from .arguments import command_lines
    from .sweep_end import closing_sweep

    arguments = sys.argv[1:]
    lines, report_settings = command_lines(arguments)
    rank_info = launched_rank()
    if rank_info is None or rank_info.size == 1:
        with closing_sweep(arguments, report_settings):
            run_lines(lines)
    else:
        run_as_rank(arguments, lines, report_settings, first=rank_info.first)


def run_lines(lines: list[list[str]]) -> None:
    """Runs Hydra with the arguments of each line."""
    for line in lines:
        sys.argv[1:] = line
        hydra_app(task)


def run_as_rank(
    arguments: list[str], lines: list[list[str]], report_settings: dict[str, str], first: bool
) -> None:
    """`main` in a rank that torchrun started; ends the process."""
    from ..environment.ranks import exit_immediately, silent_rank_overrides
    from .sweep_end import closing_sweep

    code: object = 0
    with tempfile.TemporaryDirectory(prefix="accumexp-rank-") as folder:
        try:
            if first:
                with closing_sweep(arguments, report_settings):
                    run_lines(lines)
            else:
                run_lines([[*line, *silent_rank_overrides(folder)] for line in lines])
        except SystemExit as end:
            code = end.code
    exit_immediately(code if isinstance(code, int) else 1)
