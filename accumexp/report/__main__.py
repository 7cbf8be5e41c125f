"""`python -m accumexp.report`: tables, statistics, pictures and page of a sweep."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..cli import command
from ..errors import UsageError

HELP = """\
  sweep=<folder or parent run id>   the newest sweep of the store if none is named
  tracking.uri=<address>            the store, if it is not mlflow.db in this folder or known from the sweep's
  folder=<path>                     where page, pictures and CSV go; <sweep>/report if that is here
  report.margin=0.5                 the largest difference that does not matter, in points of accuracy or
                                    in the metric's own unit
  report.metric=accuracy            a key of final/*; report.confidence=0.95 and report.power=0.8 are
                                    the other settings
"""
SETTINGS = ["report.margin", "report.metric", "report.confidence", "report.power"]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m accumexp.report",
        description="Is accumulation equivalent to the larger batch, and what does it cost?",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("arguments", nargs="*", metavar="key=value")
    options = {"sweep": "", "tracking.uri": "", "folder": ""}
    changes: dict[str, str] = {}
    for argument in parser.parse_args().arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UsageError(f"{argument}: arguments are key=value, such as sweep=<folder>")
        if key in options:
            options[key] = value
        elif key.startswith("report."):
            changes[key] = value
        else:
            raise UsageError(f"{key}: no such key, a report has {', '.join([*options, *SETTINGS])}")

    # Imported after --help has been answered: these load MLflow, scipy and matplotlib.
    from ..environment.console import console
    from .find import find_sweep
    from .publish import publish

    sweep = find_sweep(options["sweep"], options["tracking.uri"])
    publish(sweep, changes, Path(options["folder"]) if options["folder"] else None)
    if sweep.store and sweep.run_id:
        lines = sweep.store.sweep_lines(sweep.run_id)
        console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)


if __name__ == "__main__":
    command(main)
