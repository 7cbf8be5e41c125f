"""`RunSpec`: everything that a process needs for a run. It can be pickled."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..config.loading import flatten, from_hydra
from ..config.schema import Config
from ..errors import UsageError
from ..sweeps.cores import check_memory, share_cores
from ..sweeps.hydra_sweep import command_line
from ..sweeps.job import SweepJob
from ..tracking.folder import RunFolder
from .resume import Resumed, resume_job, resumed


@dataclass(frozen=True)
class RunSpec:
    """A run, alone or as a job of a sweep.

    Attributes:
        job: the sweep's job, None outside a sweep.
        resume_from: the checkpoint to resume from.
        command: the command line.
        replicas: the configurations of the runs that are trained together, empty for a single run.
    """

    config: Config
    folder: RunFolder
    job: SweepJob | None = None
    resume_from: Resumed | None = None
    command: str = ""
    replicas: list[Config] = field(default_factory=list)

    @classmethod
    def of(cls, cfg: DictConfig, hydra: Any) -> RunSpec:
        """The run that Hydra's composition describes. Raises a `UsageError` that names a wrong key."""
        resume_from = resumed(cfg)
        config = resume_from.config if resume_from else from_hydra(cfg)
        job = SweepJob.of(hydra)
        replicas = _replicas(cfg, config, job, resuming=resume_from is not None)
        if job:
            for run_config in (config, *replicas):
                share_cores(run_config, hydra.launcher, job.batch)
            check_memory(config, hydra.launcher, job.batch)
        command = job.command if job else command_line(sys.argv[1:])
        return cls(config, RunFolder(Path(hydra.runtime.output_dir)), job, resume_from, command, replicas)

    def resumed_at(self, path: Path) -> RunSpec:
        """This run resumed from the checkpoint `path`, with its configuration; the progress bar is kept."""
        resume_from = resume_job(path)
        callbacks = resume_from.config.callbacks
        if "progress" in callbacks and "progress" in self.config.callbacks:
            callbacks["progress"]["show"] = self.config.callbacks["progress"].get("show")
        return replace(self, config=resume_from.config, resume_from=resume_from)


def _replicas(cfg: DictConfig, config: Config, job: SweepJob | None, resuming: bool) -> list[Config]:
    """The configuration of each seed's run; empty for a single run."""
    count = config.replicas
    if count == 1:
        return []
    if resuming:
        raise UsageError(f"replicas={count}: a replica goes on as a run of its own, leave replicas out")
    if job is None:
        raise UsageError(f"replicas={count}: are the jobs of a sweep, add -m")
    configs = []
    for seed in range(config.seed, config.seed + count):
        single = copy.deepcopy(cfg)
        OmegaConf.update(single, "seed", seed)
        OmegaConf.update(single, "replicas", 1)
        configs.append(from_hydra(single))
    first = dict(flatten(configs[0]))
    for other in configs[1:]:
        for key, value in flatten(other):
            if first.get(key) != value and key != "seed" and not key.startswith("tracking."):
                raise UsageError(
                    f"replicas={count}: {key} follows from the seed, and must be the same for all"
                )
    return configs
