"""Paths of a job that Hydra runs in its own folder (`hydra.job.chdir=true`). Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, flag_override

from .loading import flatten

SQLITE = "sqlite:///"
# Arguments of a data set that name a file or folder end so.
PATHS = ("path", "folder", "root", "dir", "directory", "file")


def keep_launch_paths(cfg: DictConfig, hydra: Any) -> None:
    """Makes the paths of `cfg` absolute that are relative to the folder of the command.

    Does nothing for a job in that folder. A store that was not given stays the one in that folder.
    """
    launched_from = Path(hydra.runtime.cwd)
    if launched_from == Path.cwd():
        return
    with flag_override(cfg, "struct", False):
        for key in ("data.root", "resume"):
            if path := OmegaConf.select(cfg, key):
                OmegaConf.update(cfg, key, str(launched_from / path))
        for key, path in flatten(OmegaConf.to_container(cfg.data)):
            is_path = isinstance(path, str) and key.lower().endswith(PATHS) and "${" not in path
            if is_path and (launched_from / path).exists():
                OmegaConf.update(cfg, f"data.{key}", str(launched_from / path))
        uri = OmegaConf.select(cfg, "tracking.uri")
        if uri and uri.startswith(SQLITE):
            OmegaConf.update(cfg, "tracking.uri", absolute_store(uri, launched_from))


def absolute_store(uri: str, folder: Path) -> str:
    """`uri` with the path of a local database made absolute, from `folder`."""
    return f"{SQLITE}{(folder / uri.removeprefix(SQLITE)).absolute()}" if uri.startswith(SQLITE) else uri


def store_of_command(launched_from: Path) -> str | None:
    """The address of a command's store that names none, for a job in another folder; None in the same."""
    if launched_from == Path.cwd():
        return None
    return absolute_store(os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db", launched_from)
