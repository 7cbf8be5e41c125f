"""`python -m accumexp.run`: compose, train, evaluate, checkpoint, log."""

from __future__ import annotations

import sys
import tempfile
from typing import Any

from .compose import command, hydra_app


def task(cfg: Any) -> float | None:
    """What Hydra calls once a job. Training and its imports start here, not with `--help`."""
    from .job import run_job

    return run_job(cfg)


def main() -> None:
    from .closing import closing_sweep
    from .resume import resume_arguments
    from .world import world

    asked = sys.argv[1:]
    sys.argv[1:] = resume_arguments(asked)
    here = world()
    if here is None or here.size == 1:
        with closing_sweep(asked):
            hydra_app(task)
    else:
        run_as_rank(asked, first=here.first)


def run_as_rank(asked: list[str], first: bool) -> None:
    """`main` in a rank that torchrun started; ends the process."""
    from .closing import closing_sweep
    from .world import end_now, silent_arguments

    code: object = 0
    with tempfile.TemporaryDirectory(prefix="accumexp-rank-") as folder:
        try:
            if first:
                with closing_sweep(asked):
                    hydra_app(task)
            else:
                sys.argv += silent_arguments(folder)
                hydra_app(task)
        except SystemExit as end:
            code = end.code
    end_now(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    from accumexp import run  # so that jobs in other processes find `task` by its name

    command(run.main)
