"""`RunSpec`: everything that a process needs for a run, new or resumed. It can be pickled."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..config.environment_values import environment_overrides, environment_values, hide_values, recorded
from ..config.job_folder import store_of_command
from ..config.loading import flatten, from_hydra, to_plain, typed
from ..config.overrides import interpolations, keys_of
from ..config.schema import Config
from ..config.trust import Trust, impure_values, inert, is_given, target_paths
from ..errors import UsageError
from ..sweeps.hydra_sweep import command_line, typed_overrides
from ..sweeps.job import SweepJob
from ..sweeps.job_resources import check_memory, share_cores
from ..tracking.addresses import check_credentials
from ..tracking.run_folder import RunFolder
from .resume_checks import changes, check_changes

log = logging.getLogger(__name__)
NO_TRUST = Trust()


@dataclass(frozen=True)
class Resumed:
    """A run to resume: its configuration and checkpoint, and the overrides of the resuming command."""

    config: Config
    content: dict[str, Any]
    path: Path
    overrides: Sequence[str]

    @classmethod
    def read(
        cls, path: Path, config: Config | None = None, overrides: Sequence[str] = (), trust: Trust = NO_TRUST
    ) -> Resumed:
        """Reads the checkpoint `path`; without `config`, the configuration is the checkpoint's.

        Raises:
            UsageError: if the checkpoint is damaged, or names what `trust` does not allow.
        """
        from ..training.checkpoint import load
        from ..training.checkpoint_parts import check_parts, configuration

        content = load(path)
        if config is None:
            config = configuration(content, path, trust=trust)
        else:
            check_parts(content, path)
        return cls(config, content, path, overrides)

    @property
    def changes(self) -> dict[str, Any]:
        """The settings that differ from the checkpoint's, by dotted key."""
        return changes(*self.compared()) if self.overrides else {}

    def compared(self) -> tuple[Config, Config]:
        """The configuration before and after the overrides, as recorded."""
        after = recorded(self.config, self.from_environment)
        return typed(inert(self.content["config"])), typed(inert(after))

    @property
    def from_environment(self) -> dict[str, str]:
        """The expressions of values from the environment: the checkpoint's, and those of the overrides."""
        given = keys_of(self.overrides)
        kept = {key: v for key, v in impure_values(self.content["config"]) if not is_given(key, given)}
        return {**kept, **environment_overrides(self.overrides)}

    @property
    def interpolations(self) -> dict[str, str]:
        """The expressions of the configuration's values that are derived from others."""
        derived = self.content.get("interpolations", {})
        return {key: value for key, value in derived.items() if key not in keys_of(self.overrides)}

    @property
    def update(self) -> int:
        return self.content["progress"]["update"]

    @property
    def ended_by(self) -> str | None:
        """Why a callback ended the run early; None with overrides, which may ask for more updates."""
        return None if self.overrides else self.content.get("ended_by")

    def tags(self) -> dict[str, str]:
        return {f"accumexp.resumed.{self.update}": " ".join(self.overrides) or "unchanged"}

    def __reduce__(self) -> Any:
        # Another process reads the checkpoint again instead of receiving its tensors.
        return Resumed.read, (self.path, self.config, self.overrides)


@dataclass(frozen=True)
class RunSpec:
    """A run, alone or as a job of a sweep.

    Attributes:
        job: the sweep's job, None outside a sweep.
        resume_from: the checkpoint to resume from.
        command: the command line.
        replicas: the configurations of the runs that are trained together, empty for a single run.
        interpolations: the expressions of the configuration's values that are derived from others.
        from_environment: those of the values that records keep the expression of.
        overrides: of a run outside a sweep, as `all_overrides` returns them.
    """

    config: Config
    folder: RunFolder
    job: SweepJob | None = None
    resume_from: Resumed | None = None
    command: str = ""
    replicas: list[Config] = field(default_factory=list)
    interpolations: dict[str, str] = field(default_factory=dict)
    from_environment: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, cfg: DictConfig, hydra: Any, job: SweepJob | None) -> RunSpec:
        """The run, of a sweep's `job`, that Hydra composed. Raises a `UsageError` that names a wrong key."""
        task, _ = typed_overrides(hydra)
        resume_from = resumed(cfg, task)
        config = resume_from.config if resume_from else from_hydra(cfg)
        replicas = _replicas(cfg, config, job, resuming=resume_from is not None)
        for run_config in (config, *replicas):
            if job:
                job.same_store(run_config.tracking)
            store = run_config.tracking.uri or store_of_command(Path(hydra.runtime.cwd))
            run_config.tracking.uri = store
        if job:
            for run_config in (config, *replicas):
                share_cores(run_config, hydra.launcher, job.batch)
            check_memory(config, hydra.launcher, job.batch)
        command = job.command if job else command_line(sys.argv[1:])
        folder = RunFolder(Path(hydra.runtime.output_dir))
        derived = resume_from.interpolations if resume_from else interpolations(cfg)
        secret = resume_from.from_environment if resume_from else environment_values(cfg)
        hide_values(config, secret)
        overrides = [] if job else all_overrides(folder, task, resume_from)
        return cls(config, folder, job, resume_from, command, replicas, derived, secret, overrides)

    def resumed_at(self, path: Path) -> RunSpec:
        """This run resumed from the checkpoint `path`, with its configuration; the progress bar is kept."""
        resume_from = Resumed.read(path, trust=self.own_trust)
        callbacks = resume_from.config.callbacks
        if "progress" in callbacks and "progress" in self.config.callbacks:
            callbacks["progress"]["show"] = self.config.callbacks["progress"].get("show")
        derived = resume_from.interpolations
        return replace(
            self,
            config=resume_from.config,
            resume_from=resume_from,
            interpolations=derived,
            from_environment=resume_from.from_environment,
        )

    @property
    def own_trust(self) -> Trust:
        """The trust in a checkpoint of this run: it may name what the command itself has composed."""
        configs = [to_plain(config) for config in (self.config, *self.replicas)]
        targets = frozenset[str]().union(*map(target_paths, configs))
        return Trust(targets=targets, expressions=frozenset(self.from_environment.items()))


def all_overrides(folder: RunFolder, overrides: Sequence[str], resume_from: Resumed | None) -> list[str]:
    """The overrides of a run outside a sweep; of a resumed one after those of the earlier commands."""
    if not resume_from:
        return list(overrides)
    earlier = folder.summary()
    changing = [one for one in overrides if not one.lstrip("+").startswith(("resume=", "trust="))]
    return [*(earlier.overrides if earlier else []), *changing]


def resumed(cfg: DictConfig, overrides: Sequence[str]) -> Resumed | None:
    """The run that `cfg.resume` names, with the command's `overrides`; None if it names nothing.

    An override by the expression that the checkpoint has at its key is no change, but allows it.

    If the newest checkpoint is damaged, the run is resumed from the one before, with a warning.

    Raises:
        UsageError: if there is no readable checkpoint, the run is finished, or an override would change
            updates that are already logged or cannot be used.
    """
    if not cfg.resume:
        return None
    from ..tracking.metrics_file import last_update
    from ..training.checkpoint import find, load, saved_updates
    from ..training.checkpoint_parts import check_parts, configuration

    where = Path(str(cfg.resume))
    path = newest = find(where)
    older = [other for other in saved_updates(path.parent) if other < path] if where.is_dir() else []
    while True:
        try:
            content = load(path)
            check_parts(content, path)
            break
        except UsageError:
            if not older:
                check_parts(load(newest), newest)  # raises its own error
            path = older.pop()
    if path != newest:
        log.warning("checkpoint %s is damaged, going on from %s", newest, path)
    expressions = frozenset(impure_values(content["config"]))
    overrides = [one for one in overrides if keys_of([one]).isdisjoint(("resume", "trust"))]
    allowed = frozenset(environment_overrides(overrides).items()) & expressions
    overrides = [one for one in overrides if not allowed & environment_overrides([one]).items()]
    trust = replace(Trust.given(_plain(cfg.get("trust"))), expressions=allowed)
    config = configuration(content, path, overrides, trust)
    check_credentials(content["run"].get("uri", ""), f"checkpoint {path}", keys_of(overrides), trust)
    updates = content["progress"]["update"]
    folder = RunFolder.of_checkpoint(path)
    if overrides and last_update(folder.metrics) > updates:
        raise UsageError(
            f"resume={where}: updates after {updates} are logged already, so {overrides[0]} would make "
            "their points false; resume without changes first"
        )
    if overrides:
        before, after = Resumed(config, content, path, overrides).compared()
        check_changes(before, after, content["progress"], bool(content.get("run")))
    summary = folder.summary()
    if not overrides and summary and summary.finished:
        raise UsageError(f"resume={where}: the run is finished; more of it with trainer.epochs=<more>")
    return Resumed(config, content, path, overrides)


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=False) if OmegaConf.is_config(value) else value


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
