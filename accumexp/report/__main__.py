"""`python -m accumexp.report`: tables, statistics, pictures and page of a sweep."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..cli import command, command_options
from ..errors import TrainingError, UsageError

HELP = """\
  sweep=<folder or parent run id>   the newest sweep of the store if none is named
  tracking.uri=<address>            the store, if it is not mlflow.db in this folder or known from the sweep's
  sync=<folder>                     instead of a report, sends what the runs in this folder could not send
                                    to their store
  clean=<folder or parent run id>   instead of a report, deletes a sweep's runs and models in the store, and
                                    says what then removes their files
  folder=<path>                     where page, pictures and CSV go; by default <sweep>/report
  report.margin=0.5                 the largest difference that does not matter, in points of accuracy or
                                    in the metric's own unit
  report.metric=accuracy            a key of final/*; report.confidence=0.95 and report.power=0.8 are
                                    the other settings
"""
SETTINGS = ["report.margin", "report.metric", "report.confidence", "report.power"]


def main() -> None:
    options, changes = command_options(
        "report",
        "Is accumulation equivalent to the larger batch, and what does it cost?",
        HELP,
        {"sweep": "", "tracking.uri": "", "sync": "", "clean": "", "folder": ""},
    )
    for key in changes:
        if not key.startswith("report."):
            raise UsageError(f"{key}: no such key, a report has {', '.join([*options, *SETTINGS])}")

    if options["sync"]:
        _sync(Path(options["sync"]), options["tracking.uri"])
        return

    if options["clean"]:
        _clean(options["clean"], options["tracking.uri"])
        return

    # Imported after --help has been answered: these load MLflow, scipy and matplotlib.
    from ..environment.console import console
    from .jobs import find_sweep
    from .publish import publish

    sweep = find_sweep(options["sweep"], options["tracking.uri"])
    publish(sweep, changes, Path(options["folder"]) if options["folder"] else None)
    if sweep.store and sweep.run_id:
        lines = sweep.store.sweep_lines(sweep.run_id)
        console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)


def _clean(name: str, uri: str) -> None:
    """Deletes the sweep in the store; its files are left to the commands that this prints."""
    from ..environment.console import print_line
    from ..tracking import delete_sweep, sweep_of
    from .jobs import find_sweep

    sweep = find_sweep(name, uri)
    if sweep.status == "RUNNING":
        raise UsageError(f"clean={name}: the sweep is still running")
    if sweep.store and sweep.run_id:
        runs, models = delete_sweep(sweep.store, sweep_of(sweep.store, sweep.run_id))
        print_line(f"{sweep.name}: {runs} runs and {models} logged models are deleted in {sweep.store.uri}")
        collect = f"MLFLOW_TRACKING_URI={sweep.store.uri} mlflow gc --backend-store-uri {sweep.store.uri}"
        where = "on the server: mlflow gc --backend-store-uri <its database>" if sweep.store.on_server else ""
        print_line(f"their files go with   {where or collect}", markup=False)
    if sweep.folder:
        print_line(f"its folder goes with  rm -r {shlex.quote(str(sweep.folder))}", markup=False)


def _sync(folder: Path, uri: str) -> None:
    """Sends what the runs in `folder` could not send; goes on after one that fails."""
    from ..environment.console import print_line
    from ..tracking.resend import send_unsent, unsent_runs

    runs = unsent_runs(folder)
    if not runs:
        print_line(f"{folder}: nothing is left to send", markup=False)
    errors = []
    for run in runs:
        try:
            print_line(f"{run.path}: {send_unsent(run, uri)}", markup=False)
        except (UsageError, TrainingError) as error:
            if len(runs) == 1:
                raise
            errors.append(str(error))
    if errors:
        raise TrainingError("\n".join(errors))


if __name__ == "__main__":
    command(main)
