"""`run` for scripts and notebooks: the run of the command, and its typed result. Imports no torch."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ..conf import conf_dir
from ..config.environment_values import environment_values
from ..config.explain import explain
from ..config.loading import from_hydra
from ..config.overrides import interpolations
from ..environment.ranks import RankInfo
from ..errors import TrainingError, UsageError
from ..tracking.run_folder import RunFolder, RunStatus
from .arguments import resumed_folder
from .job import carry_out, run_in_ranks
from .spec import RunSpec, all_overrides, resumed

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        folder: the run's folder, with `config.yaml`, `metrics.jsonl` and `checkpoints`.
        metrics: the values of `final/*`, without the prefix: loss and metrics of the test split, and costs.
        monitored: the newest value of the metric that `monitor` names, None if it was never evaluated.
        run_id: the run in MLflow, None without tracking.
        best_metrics: loss and metrics of the best checkpoint's model on the test split, if there is one.
    """

    folder: Path
    metrics: Mapping[str, float]
    monitored: float | None
    run_id: str | None
    best_metrics: Mapping[str, float] = field(default_factory=dict)

    def load_model(self, best: bool = True) -> nn.Module:
        """The trained model in eval mode, on the CPU.

        Args:
            best: with the weights of the best checkpoint; else of the last one.

        Raises:
            UsageError: if the folder has no checkpoint.
        """
        from ..training.trained_model import load_model

        return load_model(self.folder, best, trust=True)  # this process has built and written it


def run(configuration: Sequence[str] | DictConfig = (), *, folder: str | Path | None = None) -> RunResult:
    """Trains as `python -m accumexp.run` does, in this process (or in ranks that it launches).

    Args:
        configuration: the command's overrides, such as `["accum.steps=4"]`; or a configuration that
            `hydra.compose` made from `accumexp.conf`.
        folder: of the run; by default a new one in `outputs`, or with `resume=` that of the resumed run.

    Returns:
        The result of the finished run.

    Raises:
        UsageError: for bad input; names the key.
        TrainingError: if the run cannot go on.
        KeyboardInterrupt: after Ctrl-C; what was trained is saved.
    """
    if isinstance(configuration, str):
        raise UsageError(f'{configuration}: run() takes a list of overrides, such as ["accum.steps=4"]')
    if not isinstance(configuration, Sequence | DictConfig):
        kind = type(configuration).__name__
        raise UsageError(f"run() takes a list of overrides or a configuration of hydra.compose, not a {kind}")
    overrides = [] if isinstance(configuration, DictConfig) else [str(one) for one in configuration]
    cfg = _without_hydra(configuration) if isinstance(configuration, DictConfig) else _compose(overrides)
    if isinstance(configuration, DictConfig) and cfg.get("resume"):
        raise UsageError(
            f"resume={cfg.resume}: a composed configuration does not tell what it changes of the run's own; "
            f'give run() a list: ["resume={cfg.resume}", "trainer.epochs=40"]'
        )
    run_folder = _folder(cfg, folder)
    if not cfg.get("resume"):
        run_folder.check_unused("folder")
    resume_from = resumed(cfg, overrides)
    config = resume_from.config if resume_from else from_hydra(cfg)
    if config.replicas > 1:
        raise UsageError(f"replicas={config.replicas}: are the jobs of a sweep, use python -m accumexp.run")
    derived = resume_from.interpolations if resume_from else interpolations(cfg)
    spec = RunSpec(
        *(config, run_folder, None, resume_from, f"accumexp.run.run({overrides})"),
        interpolations=derived,
        from_environment=resume_from.from_environment if resume_from else environment_values(cfg),
        overrides=all_overrides(run_folder, overrides, resume_from),
    )
    made_here = not run_folder.path.exists()
    try:
        run_folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"folder={run_folder.path}: cannot be made: {error.strerror}") from error
    try:
        with run_folder.hold_alone("resume" if resume_from else "folder"), _logged(run_folder):
            _carry_out(spec)
    except UsageError:
        if made_here:
            run_folder.remove_unused()
        raise
    except SystemExit as end:
        if end.code == 130:
            raise KeyboardInterrupt from end
        raise
    summary = run_folder.summary()
    if summary is None or summary.status is not RunStatus.FINISHED:
        raise TrainingError(f"{run_folder.path}: the run has not finished")
    return RunResult(run_folder.path, summary.final, summary.monitored, summary.run_id, summary.best)


@contextmanager
def _logged(folder: RunFolder) -> Iterator[None]:
    """Writes what is logged inside into the folder's `run.log`, as the command does."""
    handler = logging.FileHandler(folder.log, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(min(level, logging.INFO))
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
        handler.close()


def _without_hydra(cfg: DictConfig) -> DictConfig:
    """`cfg` without Hydra's own settings, which `hydra.compose(return_hydra_config=True)` leaves in it."""
    if "hydra" not in cfg:
        return cfg
    cfg = copy.deepcopy(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def _carry_out(spec: RunSpec) -> None:
    processes = spec.config.accum.processes or 1
    if processes > 1:
        run_in_ranks(spec, processes, {})
    else:
        carry_out(spec, RankInfo())


def _compose(overrides: Sequence[str]) -> DictConfig:
    """
    Raises:
        UsageError: if the overrides compose no configuration.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from hydra.initialize import get_gh_backup, restore_gh_from_backup

    if flag := next((one for one in overrides if one.startswith(("-", "hydra.", "hydra/", "sweep."))), None):
        raise UsageError(f"{flag}: is of the command python -m accumexp.run; run() takes `folder`")
    # A script may be inside of an `initialize` of its own.
    outer = get_gh_backup()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(conf_dir(), version_base="1.3"):
            return compose("config", list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(explain(error, takes_config_dir=False)) from error
    finally:
        restore_gh_from_backup(outer)


def _folder(cfg: DictConfig, folder: str | Path | None) -> RunFolder:
    resume: Any = OmegaConf.select(cfg, "resume")
    if resume:
        if folder is not None:
            raise UsageError(f"folder={folder}: a resumed run goes on in its own folder, leave it out")
        return RunFolder(resumed_folder(str(resume)))
    now = datetime.now()
    return RunFolder(Path(folder or now.strftime("outputs/%Y-%m-%d/%H-%M-%S-%f")).absolute())
