"""`python -m accumexp.plan`: the frontier. How large a micro-batch fits, and what does each cost?

Takes the overrides of `run`. Exit code 0, or 2 for wrong usage.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..cli import WANTS_TRACEBACK, command, hydra_app
from ..errors import UsageError, print_error
from ..tracking.run_folder import RunFolder


def task(cfg: Any) -> None:
    """What Hydra calls; measuring and its imports start here, not with `--help`."""
    from hydra.core.hydra_config import HydraConfig

    from ..config.job_folder import keep_launch_paths
    from ..config.loading import from_hydra
    from ..config.sizes import AUTO

    hydra = HydraConfig.get()
    keep_launch_paths(cfg, hydra)
    folder = Path(hydra.runtime.output_dir)
    try:
        refuse_what_has_no_plan(cfg)
        if cfg.accum.steps is None and cfg.accum.micro_batch_size is None:
            cfg.accum.steps = AUTO  # every point derives its settings from its own micro-batch
        config = from_hydra(cfg)
        from .frontier import plan

        plan(config, folder)
    except UsageError as error:
        RunFolder(folder).remove_unused()
        if WANTS_TRACEBACK:
            raise
        sys.exit(print_error(error))  # raised, it would get Hydra's own line too


def refuse_what_has_no_plan(cfg: Any) -> None:
    """
    Raises:
        UsageError: naming the key.
    """
    if cfg.resume:
        raise UsageError(f"resume={cfg.resume}: a plan begins at the beginning, leave it out")
    if str(getattr(cfg.accum.strategy, "name", cfg.accum.strategy)) == "fsdp":
        raise UsageError("accum=fsdp: a model in shards cannot be tried in one process, nor planned")
    if str(getattr(cfg.accum.reduction, "name", cfg.accum.reduction)) == "sum":
        raise UsageError("accum.reduction=sum: an update that grows with the micro-batches has no plan")
    if cfg.trainer.graph:
        raise UsageError("trainer.graph=true: a recorded window keeps memory that cannot be tried beforehand")
    if cfg.replicas != 1:
        raise UsageError(f"replicas={cfg.replicas}: a plan is of one run, leave it out")


def main() -> None:
    from ..environment.ranks import launched_rank

    if {"-m", "--multirun"} & set(sys.argv[1:]):
        raise UsageError("--multirun: a plan is of one experiment, leave it out")
    rank_info = launched_rank()
    if rank_info is not None and rank_info.size > 1:
        raise UsageError(
            f"WORLD_SIZE={rank_info.size}: a plan tries one rank's part in one process, "
            "start it without torchrun"
        )
    hydra_app(task)


if __name__ == "__main__":
    command(main)
