"""Hydra's job of `prove`: one certificate, made in this process or in ranks of its own."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ..cli import exit_with_error, log_error
from ..config.environment_values import environment_values
from ..config.job_folder import keep_launch_paths, store_of_command
from ..config.loading import from_hydra
from ..config.schema import Config
from ..environment.launch import launch
from ..environment.ranks import RankInfo, launched_rank
from ..errors import UsageError
from ..sweeps.hydra_sweep import command_line
from ..tracking.run_folder import RunFolder


@dataclass(frozen=True)
class ProofSpec:
    """The experiment, folder and command line of a certificate. It can be pickled.

    Attributes:
        verbose: whether all checks are shown.
    """

    config: Config
    folder: RunFolder
    command: str
    expressions: dict[str, str]
    verbose: bool = False


def prove_job(cfg: DictConfig, verbose: bool = False) -> None:
    """Makes the certificate, and ends the process with 1 if the window is not proved."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    keep_launch_paths(cfg, hydra)
    folder = RunFolder(Path(hydra.runtime.output_dir))
    launched = launched_rank()
    rank_info = launched or RankInfo()
    with ExitStack() as stack:
        try:
            if rank_info.first:
                folder.check_unused("hydra.run.dir")
                stack.enter_context(folder.hold_alone("hydra.run.dir"))
            spec = replace(_spec(cfg, folder, Path(hydra.runtime.cwd)), verbose=verbose)
            processes = spec.config.accum.processes or 1
            if launched is None and processes > 1:
                logging_config = OmegaConf.to_container(hydra.job_logging, resolve=True)
                assert isinstance(logging_config, dict)
                launch(prove, spec, processes, {str(key): value for key, value in logging_config.items()})
                proved = folder.proved()
            else:
                proved = prove(spec)
        except Exception as error:
            log_error(error)
            if rank_info.first and isinstance(error, UsageError) and not cfg.resume:
                folder.remove_unused()
            exit_with_error(error, rank_info)
    if not proved:
        sys.exit(1)


def _spec(cfg: DictConfig, folder: RunFolder, launched_from: Path) -> ProofSpec:
    if cfg.resume:
        raise UsageError(f"resume={cfg.resume}: a proof begins at the beginning, leave it out")
    config = from_hydra(cfg)
    config.tracking.uri = config.tracking.uri or store_of_command(launched_from)
    if config.replicas != 1:
        raise UsageError(f"replicas={config.replicas}: a certificate is of one run, leave replicas out")
    return ProofSpec(config, folder, command_line(sys.argv[1:], "prove"), environment_values(cfg))


def prove(spec: ProofSpec) -> bool:
    """Makes the certificate in this process. Its imports are not needed by one that only launches ranks."""
    from .session import make_certificate

    rank_info = launched_rank() or RankInfo()
    return make_certificate(spec.config, spec.folder, rank_info, spec.command, spec.expressions, spec.verbose)
