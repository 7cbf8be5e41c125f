"""Times whole processes: to help, to a refused key, to an import, to a run's first update and to its end.

python -m benchmarks.startup --repeat 11 --json startup.json
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.progress import track
from rich.table import Table

from .first_update import MARK
from .measure import (
    at_least_1,
    check_names,
    console,
    environment,
    finish,
    in_turns,
    output_options,
    say,
    table_of,
    with_medians,
    words,
)

KINDS = ("accumexp.run", "import", "first update", "whole run")
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("accelerate", "lightning", "transformers", "mlflow", "hydra-core")


@dataclass(frozen=True)
class Case:
    """A command.

    Attributes:
        reference: the case that it is compared with.
        code: its exit code.
        needs: a package that has to be installed.
        marks: whether it reports its first update.
        twice: whether it is the second run in its folder, whose store exists, that counts.
    """

    words: tuple[str, ...]
    reference: str
    code: int = 0
    needs: str | None = None
    marks: bool = False
    twice: bool = False


def _imports(package: str, needs: str | None = None, statement: str | None = None) -> Case:
    return Case(("-c", statement or f"import {package}"), "import torch", needs=needs)


def _first(name: str, needs: str | None = None) -> Case:
    case = ("-m", "benchmarks.first_update", name)
    return Case(case, "first update: hand-written", needs=needs, marks=True)


RUN = ("-m", "accumexp.run")
MARKED = "+callbacks.mark._target_=benchmarks.mark.Mark"
ONE_UPDATE = ("trainer.max_updates=1", "accum.steps=4", "device=cpu", MARKED)
# What every run does that has an optimizer of torch and a run in MLflow's database.
BY_HAND = """
import mlflow, torch
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
mlflow.set_tracking_uri("sqlite:///mlflow.db")
with mlflow.start_run():
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    mlflow.log_metric("loss", 1.0)
"""
IMPORTS = "whole run: import torch, mlflow"
CASES = {
    "accumexp.run --help": Case((*RUN, "--help"), "import torch"),
    "accumexp.run, a bad key": Case((*RUN, "accum.stps=4"), "import torch", code=2),
    "import torch": _imports("torch"),
    "import accumexp.accum": _imports("accumexp.accum"),
    "import lightning": _imports("lightning", "lightning"),
    "import accelerate": _imports("accelerate", "accelerate"),
    "import transformers' Trainer": _imports(
        "transformers", "transformers", "from transformers import Trainer"
    ),
    "first update: hand-written": _first("hand-written"),
    "first update: accelerate": _first("accelerate", "accelerate"),
    "first update: lightning": _first("lightning", "lightning"),
    "first update: transformers": _first("transformers", "transformers"),
    "first update: accumexp.run": Case((*RUN, *ONE_UPDATE), "first update: hand-written", marks=True),
    "first update: accumexp.run, tracking=none": Case(
        (*RUN, *ONE_UPDATE, "tracking=none"), "first update: hand-written", marks=True
    ),
    IMPORTS: Case(("-c", "import torch, mlflow"), IMPORTS),
    "whole run: by hand, new store": Case(("-c", BY_HAND), IMPORTS),
    "whole run: by hand": Case(("-c", BY_HAND), IMPORTS, twice=True),
    "whole run: accumexp.run, new store": Case((*RUN, *ONE_UPDATE[:-1]), IMPORTS),
    "whole run: accumexp.run": Case((*RUN, *ONE_UPDATE[:-1]), IMPORTS, twice=True),
}


def timed(name: str, case: Case) -> tuple[float, float]:
    """Seconds to the first update (of other cases: to the exit), and to the exit.

    Raises:
        SystemExit: if the command ends with another exit code than it should.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mark")
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        surroundings = os.environ | {"PYTHONPATH": paths, MARK: str(path)}
        start = end = 0.0
        for _ in range(1 + case.twice):
            start = time.time()
            done = subprocess.run(
                [sys.executable, *case.words], cwd=folder, env=surroundings, capture_output=True, text=True
            )
            end = time.time()
            if done.returncode != case.code:
                raise SystemExit(f"error: {name} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return (float(path.read_text()) if case.marks else end) - start, end - start


def show(report: dict[str, Any]) -> list[Table]:
    table = table_of(
        "from the start of the process", "case,median\ns,to its exit\ns,ratio,quartiles,to", "case,to"
    )
    for name, row in report["cases"].items():
        spread = f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}"
        exit_s, to = f"{row['exit_s']:.2f}", row["reference"].rpartition(": ")[2]
        table.add_row(name, f"{row['median_s']:.2f}", exit_s, f"{row['ratio']:.2f}", spread, to)
    return [table]


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--repeat", type=int, default=11, help="%(default)s, after one that is not counted")
    parser.add_argument(
        "--only", type=words, help="the kinds of cases: accumexp.run, import, first update, whole run"
    )
    output_options(parser)
    options = parser.parse_args(given)
    check_names(parser, "--only", options.only or (), KINDS)
    at_least_1(parser, (options.repeat,))
    return options


def report_of(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    chosen = {n: c for n, c in CASES.items() if not options.only or n.startswith(tuple(options.only))}
    chosen = {case.reference: CASES[case.reference] for case in chosen.values()} | chosen
    skipped = {
        n: f"{c.needs} is not installed" for n, c in chosen.items() if c.needs and not find_spec(c.needs)
    }
    for name, reason in skipped.items():
        say(f"{name} skipped: {reason}: pip install 'accumexp[bench]'")
    cases = {name: case for name, case in chosen.items() if name not in skipped}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    exits: dict[str, list[float]] = {name: [] for name in cases}
    for name, case in cases.items():
        timed(name, case)  # not counted: reads files from the disk and compiles modules

    def take(name: str, _: int) -> None:
        first, whole = timed(name, cases[name])
        seconds[name].append(first)
        exits[name].append(whole)

    in_turns(list(cases), track(range(options.repeat), "starting", console=console, transient=True), take)
    rows: dict[str, Any] = {}
    for name, case in cases.items():
        pair = with_medians({case.reference: seconds[case.reference], name: seconds[name]}, case.reference)
        whole = sorted(exits[name])[len(exits[name]) // 2]
        rows[name] = pair[name] | {"exit_s": whole, "exits": exits[name], "reference": case.reference}
    settings = {"repeat": options.repeat}
    here = environment(torch.device("cpu"), *PACKAGES)
    return {"environment": here, "settings": settings, "cases": rows, "skipped": skipped}


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    report = report_of(options)
    finish(report, show(report), options.json)


if __name__ == "__main__":
    main()
