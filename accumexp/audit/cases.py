"""The cases of a command line: its trainer in each of its settings, composed by Hydra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..config.explain import explain
from ..errors import UsageError
from .cells import CONF, Case
from .settings import Setting
from .trainers import adapter_of

CHOICE = "setting="


def cases_of(trainer: str, arguments: Sequence[str]) -> list[Case]:
    """The cases of a trainer: the settings that `setting=` names, or all that its adapter can do.

    Args:
        arguments: key=value.

    Raises:
        UsageError: for a key, value or setting that there is not, or that the trainer cannot do.
    """
    chosen = [argument.removeprefix(CHOICE) for argument in arguments if argument.startswith(CHOICE)]
    others = [argument for argument in arguments if not argument.startswith(CHOICE)]
    if ":" in trainer:
        if key := next((argument for argument in arguments if argument.startswith("setting")), None):
            raise UsageError(f"{key}: settings are of the project's trainers; {trainer} has none")
        config = composed(others)
        return [Case(trainer, None, config["steps"], config["micro"])]
    possible = adapter_of(trainer).SETTINGS
    names = chosen[-1].split(",") if chosen else possible
    return [_case(trainer, name, others, possible) for name in names]


def _case(trainer: str, name: str, overrides: Sequence[str], possible: Sequence[str]) -> Case:
    config = composed([f"setting={name}", *overrides])
    if name not in possible:
        raise UsageError(f"setting={name}: {trainer} cannot do it; it can do {', '.join(possible)}")
    return Case(trainer, Setting(**config["setting"]), config["steps"], config["micro"])


def composed(overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration of a case: `accumexp/audit/conf/`, of the types of `Setting`.

    Raises:
        UsageError: for a key or value that there is not.
    """
    schema = OmegaConf.structured(Setting)
    OmegaConf.set_readonly(schema, False)  # of the frozen class
    ConfigStore.instance().store("schema", schema, group="setting")
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = OmegaConf.to_container(compose("config", overrides=list(overrides)), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(explain(error, takes_config_dir=False)) from error
    assert isinstance(config, dict)
    for key in ("steps", "micro"):
        if not isinstance(config[key], int) or config[key] < 1:
            raise UsageError(f"{key}={config[key]}: a whole number of at least 1")
    return {str(key): value for key, value in config.items()}
