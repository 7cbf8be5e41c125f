"""What a run is to be: all that a process needs to carry it out, in a form that can be handed to another."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .config import Config, from_hydra, to_plain
from .cores import share_cores
from .places import command_line
from .resume import Resumed, going_on, resumed
from .sweep import SweepJob

CONFIG = "config.yaml"


@dataclass(frozen=True)
class Order:
    """A run, in `folder`, alone or as a job of a sweep.

    Attributes:
        back: the checkpoint it goes on from, or None.
        command: the command line that asked for it.
        logging: Hydra's logging of the job, as `logging.config.dictConfig` takes it.
        prove: a certificate is asked for, and no training.
    """

    config: Config
    folder: Path
    job: SweepJob | None
    back: Resumed | None
    command: str
    logging: dict[str, Any] = field(default_factory=dict)
    prove: bool = False

    @classmethod
    def of(cls, cfg: DictConfig, hydra: Any, prove: bool = False) -> Order:
        """The order that Hydra's composition means.

        Raises:
            UsageError: naming the key that is wrong.
        """
        back = resumed(cfg)
        config = back.config if back else from_hydra(cfg)
        job = SweepJob.of(hydra)
        if job:
            share_cores(config, hydra.launcher, job.batch)
        command = job.command if job else command_line(sys.argv[1:], "prove" if prove else "run")
        logging = OmegaConf.to_container(hydra.job_logging, resolve=True)
        assert isinstance(logging, dict)
        folder = Path(hydra.runtime.output_dir)
        settings = {str(key): value for key, value in logging.items()}
        return cls(config, folder, job, back, command, settings, prove)

    def going_on(self, path: Path) -> Order:
        """This order from checkpoint `path` on, to the same bits: with the configuration of then.

        Whether a bar is shown is no part of it and follows from this launch.
        """
        back = going_on(path)
        if {"progress"} <= back.config.callbacks.keys() & self.config.callbacks.keys():
            back.config.callbacks["progress"]["show"] = self.config.callbacks["progress"].get("show")
        return replace(self, config=back.config, back=back)

    def write(self, path: Path) -> None:
        job = None if self.job is None else {**asdict(self.job), "folder": str(self.job.folder)}
        back = None if self.back is None else {"path": str(self.back.path), "overrides": self.back.overrides}
        plain = {
            "config": to_plain(self.config),
            "folder": str(self.folder),
            "job": job,
            "back": back,
            "command": self.command,
            "logging": self.logging,
            "prove": self.prove,
        }
        path.write_text(json.dumps(plain))

    @classmethod
    def read(cls, path: Path) -> Order:
        from .checkpoint import load

        plain = json.loads(path.read_text())
        config = from_hydra(plain["config"])
        job, back = plain["job"], plain["back"]
        return cls(
            config,
            Path(plain["folder"]),
            job and SweepJob(**{**job, "folder": Path(job["folder"])}),
            back and Resumed(config, load(Path(back["path"])), Path(back["path"]), back["overrides"]),
            plain["command"],
            plain["logging"],
            plain["prove"],
        )
