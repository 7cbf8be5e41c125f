"""One cell of the matrix: a trainer in a setting, and what the audit says of it."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from ..environment.launch import launch
from ..errors import UsageError, first_line
from ..proof import Certificate
from .settings import Setting
from .trainers import adapter_of, fit_of, version_of

CONF = Path(__file__).resolve().parent / "conf"
EQUAL, UNEQUAL, UNDECIDED = "equal", "not equal", "not audited"
VERDICTS = {"proved": EQUAL, "proved up to": EQUAL, "not proved": UNEQUAL}


@dataclass(frozen=True)
class Case:
    """What is audited. It can be pickled.

    Attributes:
        trainer: the name of an adapter, or "module:function".
        setting: None for a function of the user's own.
        steps: micro-batches in a window on each rank.
        micro: samples in a micro-batch.
    """

    trainer: str
    setting: Setting | None
    steps: int
    micro: int

    @property
    def name(self) -> str:
        return self.setting.name if self.setting else "own"

    def fit(self) -> Callable[..., Any]:
        """The function that `accumexp.proof.audit` takes."""
        if self.setting is None:
            return fit_of(self.trainer)
        fit = adapter_of(self.trainer).fit
        setting = self.setting

        def trained(watch: Any, steps: int, micro: int) -> None:
            fit(setting, watch, steps, micro)

        trained.__module__, trained.__qualname__ = fit.__module__, fit.__qualname__
        return trained


@dataclass(frozen=True)
class Cell:
    """The result of a case.

    Attributes:
        package, version: the distribution of the trainer.
        verdict: `EQUAL`, `UNEQUAL`, or `UNDECIDED` if the trainer could not be watched.
        lines: the sentences of the verdict: causes first; for `UNDECIDED` why.
        advice: what to do, a sentence for each cause.
        seconds: of all runs, without the imports.
    """

    trainer: str
    package: str
    version: str
    setting: str
    verdict: str
    lines: list[str]
    advice: list[str]
    seconds: float

    @property
    def equal(self) -> bool:
        return self.verdict == EQUAL

    @property
    def reason(self) -> str:
        """The first sentence of the verdict; "" for equal ones without a source that is named."""
        return next(iter(self.lines), "")


def cell_of(case: Case, certificate: Certificate | None, refusal: str, seconds: float) -> Cell:
    """The cell of a certificate, or of the line that says why there is none."""
    package = adapter_of(case.trainer).PACKAGE if case.setting else ""
    cell = Cell(
        case.trainer,
        package,
        version_of(package) if package else "",
        case.name,
        UNDECIDED,
        [refusal],
        [],
        seconds,
    )
    if certificate is None:
        return cell
    causes = [cause for cause in certificate.causes if not cause.excused]
    excused = [
        f"up to {c.source}" + (f" ({c.where})" if c.where else "") for c in certificate.causes if c.excused
    ]
    lines = excused if certificate.proved else [_without_verdict(line) for line in certificate.lines]
    advice = list(dict.fromkeys(cause.advice for cause in causes if cause.advice))
    if causes and (special := advice_of(case.trainer, case.name)):
        advice = [special]
    return replace(cell, verdict=VERDICTS[certificate.verdict], lines=lines, advice=advice)


def advice_of(trainer: str, setting: str) -> str | None:
    """What a user of the trainer should do where `setting` differs, if `conf/advice.yaml` says so."""
    entries = yaml.safe_load((CONF / "advice.yaml").read_text(encoding="utf-8")).get(trainer, {})
    return entries.get(setting, entries.get("all"))


def _without_verdict(line: str) -> str:
    return line.removeprefix("not proved: ").removeprefix("also: ")


def judge(case: Case, stage: Callable[[str], None]) -> tuple[Certificate | None, Cell]:
    """Audits a case, in ranks of its own where its setting has several. No certificate if it is refused.

    Raises:
        UsageError: if the trainer's package is not installed.
    """
    fit = case.fit()  # imports the trainer before the time is taken
    begin = time.monotonic()
    try:
        if case.setting and case.setting.processes > 1:
            certificate = _on_ranks(case, case.setting.processes)
        else:
            certificate = audited(case, fit, stage)
    except UsageError as refusal:
        return None, cell_of(case, None, str(refusal), time.monotonic() - begin)
    return certificate, cell_of(case, certificate, "", time.monotonic() - begin)


def audited(case: Case, fit: Callable[..., Any], stage: Callable[[str], None]) -> Certificate:
    """The certificate of a case in this process.

    Raises:
        UsageError: if the trainer cannot be watched or fails by itself, in one line.
    """
    from ..proof import audit

    try:
        return audit(fit, case.steps, case.micro, progress=stage)
    except ValueError as error:
        raise UsageError(first_line(error)) from error
    except Exception as error:
        raise UsageError(f"the trainer fails: {type(error).__name__}: {first_line(error)}") from error


def _on_ranks(case: Case, processes: int) -> Certificate:
    with TemporaryDirectory(prefix="accumexp-audit-") as folder:
        path = Path(folder) / "certificate.pickle"
        launch(partial(_write, path=path), case, processes, {"version": 1})
        return pickle.loads(path.read_bytes())


def _write(case: Case, path: Path) -> None:
    """Writes the certificate of a case to `path`. Called in each rank."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    certificate = audited(case, case.fit(), lambda stage: None)
    if dist.get_rank() == 0:
        path.write_bytes(pickle.dumps(certificate))


def as_json(cells: Sequence[Cell]) -> str:
    return json.dumps([asdict(cell) for cell in cells], indent=1) + "\n"


def from_json(text: str) -> list[Cell]:
    return [Cell(**each) for each in json.loads(text)]
