"""`python -m accumexp.run`: compose, train, evaluate, checkpoint, log."""

from __future__ import annotations

import sys
from typing import Any

from .compose import command, hydra_app


def task(cfg: Any) -> float | None:
    """What Hydra calls once a job. Training and its imports start here, not with `--help`."""
    from .job import run_job

    return run_job(cfg)


def main() -> None:
    from .resume import resume_arguments
    from .sweep import closing_sweep
    from .world import silent_arguments, world

    here = world()
    arguments = resume_arguments(sys.argv[1:])
    if here is None or here.first:
        sys.argv[1:] = arguments
        with closing_sweep():
            hydra_app(task)
    else:
        sys.argv[1:] = [*arguments, *silent_arguments()]
        hydra_app(task)


if __name__ == "__main__":
    from accumexp import run  # so that jobs in other processes find `task` by its name

    command(run.main)
