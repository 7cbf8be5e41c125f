"""What a run is to be: all that a process needs to carry it out, in a form that can be handed to another."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..config.loading import flatten, from_hydra, to_plain
from ..config.schema import Config
from ..errors import UsageError
from ..sweeps.cores import check_memory, share_cores
from ..sweeps.job_folders import command_line
from ..sweeps.sweep import SweepJob
from .resume import Resumed, going_on, resumed

CONFIG = "config.yaml"


@dataclass(frozen=True)
class RunSpec:
    """A run, in `folder`, alone or as a job of a sweep.

    Attributes:
        back: the checkpoint it goes on from, or None.
        command: the command line that asked for it.
        logging: Hydra's logging of the job, as `logging.config.dictConfig` takes it.
        prove: a certificate is asked for, and no training.
        replicas: the configurations of the runs that are trained together, where there are several.
    """

    config: Config
    folder: Path
    job: SweepJob | None
    resume_from: Resumed | None
    command: str
    logging: dict[str, Any] = field(default_factory=dict)
    prove: bool = False
    replicas: list[Config] = field(default_factory=list)

    @classmethod
    def of(cls, cfg: DictConfig, hydra: Any, prove: bool = False) -> RunSpec:
        """The order that Hydra's composition means.

        Raises:
            UsageError: naming the key that is wrong.
        """
        resume_from = resumed(cfg)
        config = resume_from.config if resume_from else from_hydra(cfg)
        job = SweepJob.of(hydra)
        replicas = _replicas(cfg, config, job, "resume" if resume_from else "prove" if prove else "")
        if job:
            for one in (config, *replicas):
                share_cores(one, hydra.launcher, job.batch)
            check_memory(config, hydra.launcher, job.batch)
        command = job.command if job else command_line(sys.argv[1:], "prove" if prove else "run")
        logging = OmegaConf.to_container(hydra.job_logging, resolve=True)
        assert isinstance(logging, dict)
        folder = Path(hydra.runtime.output_dir)
        settings = {str(key): value for key, value in logging.items()}
        return cls(config, folder, job, resume_from, command, settings, prove, replicas)

    def going_on(self, path: Path) -> RunSpec:
        """This order from checkpoint `path` on, to the same bits: with the configuration of then.

        Whether a bar is shown is no part of it and follows from this launch.
        """
        resume_from = going_on(path)
        if {"progress"} <= resume_from.config.callbacks.keys() & self.config.callbacks.keys():
            resume_from.config.callbacks["progress"]["show"] = self.config.callbacks["progress"].get("show")
        return replace(self, config=resume_from.config, resume_from=resume_from)

    def write(self, path: Path) -> None:
        job = None if self.job is None else {**asdict(self.job), "folder": str(self.job.folder)}
        resume_from = (
            None
            if self.resume_from is None
            else {"path": str(self.resume_from.path), "overrides": self.resume_from.overrides}
        )
        plain = {
            "config": to_plain(self.config),
            "folder": str(self.folder),
            "job": job,
            "back": resume_from,
            "command": self.command,
            "logging": self.logging,
            "prove": self.prove,
        }
        path.write_text(json.dumps(plain))

    @classmethod
    def read(cls, path: Path) -> RunSpec:
        from ..training.checkpoint import load

        plain = json.loads(path.read_text())
        config = from_hydra(plain["config"])
        job, resume_from = plain["job"], plain["back"]
        return cls(
            config,
            Path(plain["folder"]),
            job and SweepJob(**{**job, "folder": Path(job["folder"])}),
            resume_from
            and Resumed(
                config, load(Path(resume_from["path"])), Path(resume_from["path"]), resume_from["overrides"]
            ),
            plain["command"],
            plain["logging"],
            plain["prove"],
        )


def _replicas(cfg: DictConfig, config: Config, job: SweepJob | None, instead: str) -> list[Config]:
    """What each seed's run would be alone; none where `config` is a single run.

    Args:
        instead: what else the command asks for, "resume" or "prove", which is for one run.
    """
    count = config.replicas
    if count == 1:
        return []
    if instead == "resume":
        raise UsageError(f"replicas={count}: a replica goes on as a run of its own, leave replicas out")
    if instead == "prove":
        raise UsageError(f"replicas={count}: a certificate is of one run, leave replicas out")
    if job is None:
        raise UsageError(f"replicas={count}: are the jobs of a sweep, add -m")
    found = []
    for seed in range(config.seed, config.seed + count):
        own = copy.deepcopy(cfg)
        OmegaConf.update(own, "seed", seed)
        OmegaConf.update(own, "replicas", 1)
        found.append(from_hydra(own))
    alike = dict(flatten(found[0]))
    for other in found[1:]:
        for key, value in flatten(other):
            if alike.get(key) != value and key != "seed" and not key.startswith("tracking."):
                raise UsageError(
                    f"replicas={count}: {key} follows from the seed, and must be the same for all"
                )
    return found
