"""The parts of a checkpoint and their types, and the configuration in it."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf.errors import OmegaConfBaseException

from ..config.instantiate import with_present_targets
from ..config.loading import to_plain
from ..config.overrides import keys_of, with_overrides
from ..config.schema import Config
from ..config.trust import Trust, check_interpolations, check_targets, impure, impure_values, target_nodes
from ..errors import UsageError, first_line
from .components import build_model
from .known_targets import refusal_of_targets
from .progress import Progress

NO_TRUST = Trust()
# A configuration is nested a few levels deep.
DEEPEST = 50


def check_parts(content: Mapping[str, Any], path: Path) -> None:
    """Checks that the checkpoint `content`, read from `path`, has every part that a run writes, of its type.

    Raises:
        UsageError: naming the part.
    """

    def refuse(part: str, what: str, value: Any = None) -> None:
        given = f", not a {type(value).__name__}" if value is not None else ""
        raise UsageError(f"checkpoint {path}: its {part} {what}{given}; take another from its folder")

    for part in ("config", "progress", "model", "optimizer", "scheduler", "callbacks", "random"):
        if part not in content:
            refuse(part, "is missing")
        if not isinstance(content[part], Mapping):
            refuse(part, "is to be a dict", content[part])
    for part in ("interpolations", "loss_scale", "shortage", "evaluated", "run"):
        if not isinstance(content.get(part, {}), Mapping):
            refuse(part, "is to be a dict", content[part] or "")
    if "evaluated" not in content or "run" not in content:
        refuse("evaluated" if "evaluated" not in content else "run", "is missing")
    for part in ("ended_by", "shards"):
        if not isinstance(content.get(part), str | None):
            refuse(part, "is to be text", content[part])
    for name, value in content["model"].items():
        if not isinstance(name, str):
            refuse("model", "has a name that is no text", name)
        if not isinstance(value, torch.Tensor) and not name.endswith("_extra_state"):
            refuse(f"model: {name}", "is to be a tensor", value)
    for name, value in content["evaluated"].items():
        if not isinstance(name, str) or not isinstance(value, int | float) or isinstance(value, bool):
            refuse("evaluated", "is to hold numbers by name", value)
    for part in ("run", "interpolations"):
        for name, value in content.get(part, {}).items():
            if not isinstance(name, str) or not isinstance(value, str):
                refuse(part, "is to hold text by name", value)
    if content["run"] and not {"uri", "experiment_id", "run_id"} <= content["run"].keys():
        refuse("run", "names no run")
    if content["optimizer"] and not (
        isinstance(content["optimizer"].get("state"), Mapping)
        and isinstance(content["optimizer"].get("param_groups"), list)
        and all(isinstance(group, Mapping) for group in content["optimizer"]["param_groups"])
    ):
        refuse("optimizer", "has no state and groups")
    for name, value in content["callbacks"].items():
        if not isinstance(value, Mapping):
            refuse(f"callbacks: {name}", "is to be a dict", value)
    others = content.get("random_others", [])
    if not isinstance(others, list) or not all(isinstance(state, Mapping) for state in others):
        refuse("random_others", "is to be a list of dicts", others)
    _check_progress(content["progress"], path)
    _check_depth(content["config"], path)


def _check_progress(progress: Mapping[Any, Any], path: Path) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(Progress)}
    for name in ("update", "epoch", "epoch_update"):
        if name not in progress:
            raise UsageError(f"checkpoint {path}: its progress has no {name}")
    for name, value in progress.items():
        kind = float | int if isinstance(defaults.get(name), float) else int
        whole = isinstance(value, kind) and not isinstance(value, bool)
        if name not in defaults or not whole or not 0 <= value < 2**62 or not math.isfinite(value):
            what = f"{name}={str(value)[:40]}, which no run has"
            raise UsageError(f"checkpoint {path}: its progress has {what}")


def _check_depth(config: Any, path: Path) -> None:
    level: list[Any] = [config]
    for _ in range(DEEPEST):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, Mapping) else node)
            if isinstance(child, Mapping | list | tuple)
        ]
        if not level:
            return
        if len(level) > 10_000:
            break
    raise UsageError(f"checkpoint {path}: its config is nested too deep or too large")


def configuration(
    content: Mapping[str, Any], path: Path, overrides: Sequence[str] = (), trust: Trust = NO_TRUST
) -> Config:
    """The configuration of the checkpoint `content`, read from `path`, with the user's `overrides`.

    It names only classes and functions that the project knows or that `trust` allows, and nothing of it was
    read from the environment or from files: what the user gives as an override is the user's own.

    Raises:
        UsageError: if a part is missing or of a wrong type; for a value or target that the user has to
            allow, with what to add.
    """
    check_parts(content, path)
    source, given = f"checkpoint {path}", keys_of(overrides)
    check_interpolations(content["config"], source, given, trust)
    derived = content.get("interpolations", {})
    if not trust.everything:
        derived = {key: value for key, value in derived.items() if not impure(value)}
    try:
        config = with_overrides(content["config"], overrides, derived)
    except (OmegaConfBaseException, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        reason = f"its config cannot be read: {first_line(error)}"
        raise UsageError(f"{source}: {reason}; take another from its folder") from error
    plain = to_plain(config)
    # An escaped interpolation is text here, and would be resolved where its node is built.
    check_interpolations(plain, source, given, Trust(trust.everything, in_python=trust.in_python))
    check_targets(plain, source, given, trust, refusal_of_targets(plain))
    if not (trust.everything or trust.packages):
        _check_model_size(config, content["model"], source)
    return config


def _check_model_size(config: Config, saved: Mapping[str, torch.Tensor], source: str) -> None:
    """Refuses a model far larger than the checkpoint's, which building it would allocate."""
    if not saved:  # in shards
        return
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = build_model(config).state_dict()
    except Exception:  # building it says why
        return
    numbers, held = (sum(value.numel() for value in values) for values in (state.values(), saved.values()))
    if numbers > 4 * held + 2**20:
        raise UsageError(f"{source}: holds {held} numbers of a model, and its config is of one of {numbers}")


def needed_trust(plain: Mapping[str, Any]) -> str:
    """What `resume=` needs besides, for a checkpoint of the configuration `plain`; empty for nothing."""
    again = "".join(f" ++{key}='{value}'" for key, value in impure_values(plain))
    refusal_of, nodes = refusal_of_targets(plain), target_nodes(with_present_targets(plain))
    refusals = [refusal_of(key, str(target), NO_TRUST) for key, target in nodes]
    packages = {refusal.package for refusal in refusals if refusal}
    if None in packages:
        return " trust=true"
    return again + (f" trust=[{','.join(sorted(filter(None, packages)))}]" if packages else "")
