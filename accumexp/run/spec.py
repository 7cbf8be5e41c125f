"""`RunSpec`: all that a process needs to carry out a run. It can be pickled."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..config.job_folder import store_of_command
from ..config.loading import flatten, from_hydra
from ..config.overrides import interpolations
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
        job: the sweep's job, None for a run of its own.
        resume_from: the checkpoint to go on from, or None.
        command: the command line.
        replicas: the configurations of the runs that are trained together, empty for a single run.
        interpolations: the expressions of the configuration's values that are derived from others.
    """

    config: Config
    folder: RunFolder
    job: SweepJob | None = None
    resume_from: Resumed | None = None
    command: str = ""
    replicas: list[Config] = field(default_factory=list)
    interpolations: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, cfg: DictConfig, hydra: Any) -> RunSpec:
        """The run that Hydra's composition describes.

        Raises:
            UsageError: naming the key that is wrong.
        """
        resume_from = resumed(cfg, [o for o in hydra.overrides.task if not o.startswith("resume=")])
        config = resume_from.config if resume_from else from_hydra(cfg)
        job = SweepJob.of(hydra)
        replicas = _replicas(cfg, config, job, resuming=resume_from is not None)
        for one in (config, *replicas):
            if job:
                job.same_store(one.tracking)
            one.tracking.uri = one.tracking.uri or store_of_command(Path(hydra.runtime.cwd))
        if job:
            for one in (config, *replicas):
                share_cores(one, hydra.launcher, job.batch)
            check_memory(config, hydra.launcher, job.batch)
        command = job.command if job else command_line(sys.argv[1:])
        folder = RunFolder(Path(hydra.runtime.output_dir))
        derived = resume_from.interpolations if resume_from else interpolations(cfg)
        return cls(config, folder, job, resume_from, command, replicas, derived)

    def resumed_at(self, path: Path) -> RunSpec:
        """This run from the checkpoint `path` on, with the checkpoint's configuration.

        Whether a progress bar is shown does not belong to the run and is taken from this command.
        """
        resume_from = resume_job(path)
        if {"progress"} <= resume_from.config.callbacks.keys() & self.config.callbacks.keys():
            show = self.config.callbacks["progress"].get("show")
            resume_from.config.callbacks["progress"]["show"] = show
        derived = resume_from.interpolations
        return replace(self, config=resume_from.config, resume_from=resume_from, interpolations=derived)


def _replicas(cfg: DictConfig, config: Config, job: SweepJob | None, resuming: bool) -> list[Config]:
    """The configuration of each seed's run, as it would be alone; empty for a single run."""
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
