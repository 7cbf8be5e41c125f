"""Overrides of a stored configuration: a checkpoint's, or the `report.*` settings of a sweep."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..environment.ranks import launched_rank
from ..errors import UsageError, unknown_key
from .loading import flatten, from_hydra
from .ranges import check_ranges
from .schema import Config, ReportConfig

_MISSING = object()


def interpolations(cfg: DictConfig) -> dict[str, str]:
    """{dotted key: expression} of every value that is derived from others, such as `${data.root}`."""
    raw = OmegaConf.to_container(cfg, resolve=False)
    return {key: value for key, value in flatten(raw) if isinstance(value, str) and "${" in value}


def with_overrides(
    plain: dict[str, Any], overrides: Sequence[str], derived: Mapping[str, str] | None = None
) -> Config:
    """A checkpoint's configuration with `key=value` overrides of single values, not of config groups.

    Args:
        derived: the `interpolations` of its composition; those of an overridden key follow it.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    cfg = OmegaConf.create(plain)
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise UsageError(" ".join(str(error).split())) from error
    for override in parsed:
        key = override.key_or_group
        exists = OmegaConf.select(cfg, key, default=_MISSING) is not _MISSING
        is_group = isinstance(plain.get(key), dict)
        adds = override.is_add() or override.is_force_add()
        if override.type is None or is_group or not (exists or adds):
            raise UsageError(
                f"{override.input_line}: only values of the run's own configuration can be changed, "
                "such as trainer.epochs=40; begin a new run with it"
            )
        if override.is_delete() or override.is_sweep_override():
            raise UsageError(f"{override.input_line}: a single value is needed")
        parts = key.split(".")
        for depth in range(1, len(parts)):
            if OmegaConf.is_list(OmegaConf.select(cfg, whole := ".".join(parts[:depth]))):
                raise UsageError(f"{override.input_line}: is inside of a list, give {whole}=[...]")
        OmegaConf.update(cfg, key, override.value(), force_add=True)
    given = {override.key_or_group for override in parsed}
    _follow(cfg, given, derived or {})
    _clear_derived_sizes(cfg, given)
    return from_hydra(cfg)


def keys_of(overrides: Iterable[str]) -> set[str]:
    """The keys of `key=value` overrides."""
    return {override.partition("=")[0].lstrip("+~") for override in overrides}


def _follow(cfg: DictConfig, given: set[str], derived: Mapping[str, str]) -> None:
    """Puts the expressions back that depend on a given key, for `cfg` to resolve again."""
    changed = set(given)
    while following := {
        key: expression
        for key, expression in derived.items()
        if key not in changed and any(names_key(expression, other) for other in changed)
    }:
        for key, expression in following.items():
            OmegaConf.update(cfg, key, expression)
        changed |= following.keys()


def names_key(expression: str, key: str) -> bool:
    """Whether an interpolation reads `key`: `${key}`, or as an argument of a resolver."""
    return re.search(rf"[{{:,]{re.escape(key)}[}},]", expression) is not None


def _clear_derived_sizes(cfg: DictConfig, given: set[str]) -> None:
    """Sets to null what is not in `given` and follows from it: a checkpoint holds ranks and all sizes."""
    names = ("steps", "micro_batch_size", "processes", "strategy")
    steps, micro, ranks, strategy = (f"accum.{name}" for name in names)
    if ranks not in given and (strategy in given or launched_rank() is not None):
        OmegaConf.update(cfg, ranks, None)
        given = given | {ranks}
    if strategy in given and "accum.reduce_every_micro_batch" not in given:
        OmegaConf.update(cfg, "accum.reduce_every_micro_batch", False)  # only fsdp has it
    if micro in given and steps not in given:
        OmegaConf.update(cfg, steps, None)
    elif micro not in given and given & {steps, ranks, "data.batch_size"}:
        OmegaConf.update(cfg, micro, None)


def report_from(params: Mapping[str, str], changes: Mapping[str, str]) -> ReportConfig:
    """The report settings of a run, replaced by those in `changes`. Raises a `UsageError` for a bad change.

    Args:
        params: the run's configuration, dotted keys, values as text. Unknown keys are ignored.
        changes: keys `report.*`, values as text.
    """
    names = [field.name for field in dataclasses.fields(ReportConfig)]
    texts = {name: params[f"report.{name}"] for name in names if f"report.{name}" in params}
    for key, value in changes.items():
        if key.removeprefix("report.") not in names:
            raise UsageError(unknown_key(key, sorted(names)))
        texts[key.removeprefix("report.")] = value
    cfg = OmegaConf.structured(ReportConfig)
    for key, value in texts.items():
        try:
            OmegaConf.update(cfg, key, None if value in ("None", "null", "") else value)
        except OmegaConfBaseException as error:
            raise UsageError(f"report.{key}={value}: {str(error.msg or error).splitlines()[0]}") from error
    report = OmegaConf.to_object(cfg)
    assert isinstance(report, ReportConfig)
    check_ranges(report, "report.")
    return report
