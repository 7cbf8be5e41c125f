"""YAML and text files of a run's or a sweep's folder, which may be damaged or another's."""

from __future__ import annotations

from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import UsageError, first_line

LARGEST = 2**24  # bytes of a configuration


def read_yaml(path: Path) -> DictConfig:
    """The mapping in the file `path`; its interpolations are not resolved.

    Raises:
        UsageError: if it is no such file. One with aliases neither, which a few lines make large with.
    """
    try:
        text = read_text(path, LARGEST)
        if "*" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise UsageError(f"{path}: is damaged: it has aliases, which no run writes")
        written = OmegaConf.create(text)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError, AssertionError) as error:
        raise UsageError(f"{path}: is damaged: {first_line(error)}") from error
    if not isinstance(written, DictConfig):
        raise UsageError(f"{path}: is damaged: it holds no mapping")
    return written


def read_text(path: Path, largest: int | None = None) -> str:
    """The text of a regular file; opening a pipe would wait for a writer.

    Raises:
        UsageError: if it is no file, larger than `largest` bytes, or cannot be read.
    """
    if not path.is_file():
        raise UsageError(f"{path}: {'is no file' if path.exists() else 'no such file'}")
    try:
        if largest is not None and path.stat().st_size > largest:
            raise UsageError(f"{path}: is damaged: of {path.stat().st_size} bytes")
        return path.read_text()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is damaged: it is no text") from error
