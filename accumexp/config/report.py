"""What a sweep's report compares, and how strictly: `report.*`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import UsageError, unknown_key


@dataclass
class ReportConfig:
    """What the report of a sweep compares, and how strictly. Best fixed before the sweep runs."""

    # Page, pictures and CSV at the end of every sweep; without, the tables in the terminal alone.
    write: bool = True
    # A key of final/*. Null: accuracy where the runs have it, else loss.
    metric: str | None = None
    # The largest difference that does not matter, in points (hundredths) of accuracy or in the metric's unit.
    # Null: half a point of an accuracy; of another metric nobody but you knows, and none is equivalent.
    margin: float | None = None
    # Of all intervals; all claims of a kind (equivalent, different) together err with a chance of
    # 1 - confidence at most.
    confidence: float = 0.95
    # With which the number of seeds that would settle an undecided comparison is planned.
    power: float = 0.8


def check_report(report: ReportConfig) -> ReportConfig:
    """`report`, or a `UsageError` that names the key."""
    if report.margin is not None and not report.margin > 0:
        raise UsageError(f"report.margin={report.margin}: a difference above 0")
    for key, value in (("confidence", report.confidence), ("power", report.power)):
        if not 0.5 <= value < 1:
            raise UsageError(f"report.{key}={value}: from 0.5 to below 1")
    return report


def report_from(params: Mapping[str, str], changes: Mapping[str, str]) -> ReportConfig:
    """The report that a run's `params` ask for (dotted keys, values as text), with `changes` on top.

    Raises:
        UsageError: naming the key, for an unknown one or a bad value.
    """
    known = {field.name for field in dataclasses.fields(ReportConfig)}
    texts = {key.removeprefix("report."): value for key, value in params.items() if key.startswith("report.")}
    texts = {key: value for key, value in texts.items() if key in known}
    for key, value in changes.items():
        if key.removeprefix("report.") not in known:
            raise UsageError(unknown_key(key, sorted(known)))
        texts[key.removeprefix("report.")] = value
    cfg = OmegaConf.structured(ReportConfig)
    for key, value in texts.items():
        try:
            OmegaConf.update(cfg, key, None if value in ("None", "null", "") else value)
        except OmegaConfBaseException as error:
            raise UsageError(f"report.{key}={value}: {str(error.msg or error).splitlines()[0]}") from error
    report = OmegaConf.to_object(cfg)
    assert isinstance(report, ReportConfig)
    return check_report(report)
