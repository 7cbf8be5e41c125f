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
    report(options["sweep"], options["tracking.uri"], options["folder"], changes)


def report(sweep: str, uri: str, folder: str, changes: dict[str, str]) -> None:
    """Makes, prints and writes the report of a sweep.

    Raises:
        UsageError: if there is no such sweep, or a setting is wrong.
    """
    from ..environment.console import console
    from .find import find_sweep
    from .publish import publish

    past_sweep = find_sweep(sweep, uri)
    publish(past_sweep, changes, Path(folder) if folder else None)
    if past_sweep.store and past_sweep.run_id:
        lines = past_sweep.store.sweep_lines(past_sweep.run_id)
        console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)


if __name__ == "__main__":
    command(main)
