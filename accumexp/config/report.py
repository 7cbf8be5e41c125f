"""The settings of a sweep's report: `report.*`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import UsageError, unknown_key


@dataclass
class ReportConfig:
    """The metric and the statistical tests of a sweep's report. Set them before the sweep runs."""

    # Whether the end of a sweep writes page, pictures and CSV; if not, it only prints the tables.
    write: bool = True
    # A key of final/*. Null: accuracy if the runs have it, else loss.
    metric: str | None = None
    # The largest difference that does not matter, in points (hundredths) of accuracy or in the metric's unit.
    # Null: half a point for an accuracy; for another metric there is no default and nothing is equivalent.
    margin: float | None = None
    # Of all intervals. 1 - confidence bounds the probability that any claim of a kind (equivalent, different)
    # is wrong.
    confidence: float = 0.95
    # Of the test, for the number of seeds that would decide an undecided comparison.
    power: float = 0.8


def check_report(report: ReportConfig) -> ReportConfig:
    """Returns `report`, or raises a `UsageError` that names the key of a value out of range."""
    if report.margin is not None and not report.margin > 0:
        raise UsageError(f"report.margin={report.margin}: a difference above 0")
    for key, value in (("confidence", report.confidence), ("power", report.power)):
        if not 0.5 <= value < 1:
            raise UsageError(f"report.{key}={value}: from 0.5 to below 1")
    return report


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
    return check_report(report)
