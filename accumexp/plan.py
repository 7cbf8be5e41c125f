"""`python -m accumexp.plan`: the frontier. How large a micro-batch fits, and what does each cost?

Takes the overrides of `run`. Exit code 0, or 2 for wrong usage.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .compose import WANTS_TRACEBACK, command, fail, hydra_app
from .errors import UsageError


def task(cfg: Any) -> None:
    """What Hydra calls; measuring and its imports start here, not with `--help`."""
    from hydra.core.hydra_config import HydraConfig

    from .config import from_hydra
    from .sizes import AUTO

    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        if cfg.resume:
            raise UsageError(f"resume={cfg.resume}: a plan begins at the beginning, leave it out")
        if cfg.accum.steps is None and cfg.accum.micro_batch_size is None:
            cfg.accum.steps = AUTO  # what follows from the micro-batch then follows from each point's own
        config = from_hydra(cfg)
        from .frontier import plan

        plan(config, folder)
    except UsageError as error:
        from .job import remove_unused

        remove_unused(folder)
        if WANTS_TRACEBACK:
            raise
        sys.exit(fail(error))  # raised, it would get Hydra's own line too


def main() -> None:
    from .world import world

    if {"-m", "--multirun"} & set(sys.argv[1:]):
        raise UsageError("--multirun: a plan is of one experiment, leave it out")
    here = world()
    if here is not None and here.size > 1:
        raise UsageError(
            f"WORLD_SIZE={here.size}: a plan tries one rank's part in one process, start it without torchrun"
        )
    hydra_app(task)


if __name__ == "__main__":
    command(main)
