"""`python -m accumexp.audit`: is the gradient accumulation of somebody else's trainer the larger batch?

Exit code 0: equal; 1: not equal; 2: wrong usage, or a trainer that cannot be watched.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..cli import command
from ..errors import UsageError

if TYPE_CHECKING:
    from .cells import Cell

DESCRIPTION = """\
Is the gradient accumulation of this trainer the larger batch? The trainer runs unmodified on a small model,
with 4 micro-batches an update and with one; every update is compared, each from the same weights.

  <trainer>        one of the project's adapters: accelerate, accumexp, composer, deepspeed, fabric, ignite,
                   lightning, timm, torchtune, transformers, trl. Its package must be installed
  all              every trainer that is installed, each in a process of its own
  module:function  your own: function(watch, steps, micro) trains from the beginning with `steps`
                   micro-batches of `micro` samples, and passes its model through `model = watch(model)`
"""
EPILOG = """\
Keys, as key=value:
  setting=<name>,...   what is trained, all that the trainer can do by default: classes, tokens (some labels
                       are ignored), label_smoothing, own_loss, groups, clipping, schedule, epoch (does not
                       divide), short_epoch, two_ranks, bf16, dropout; with transformers' own models:
                       sequence_classification, token_classification, masked_lm, causal_lm
  setting.<key>=       changes a setting: model, samples, epochs, seed, ... of accumexp/audit/settings.py
  steps=4  micro=8     micro-batches in a window, samples in a micro-batch

Exit codes:
  0   equal, perhaps up to sources that are named, such as dropout draws
  1   not equal
  2   wrong usage, or a trainer that cannot be watched

Examples:
  python -m accumexp.audit transformers
  python -m accumexp.audit lightning setting=epoch setting.samples=60 -v
  python -m accumexp.audit my_training:fit steps=8 micro=4
  python -m accumexp.audit all --write audit.md

From Python: `accumexp.proof.audit(fit)`. docs/audit.md has the matrix of trainers and settings.
"""


def main() -> None:
    options = _options()
    if options.trainer == "all":
        if options.folder or options.mlflow:
            raise UsageError("--folder and --mlflow keep the certificates of one trainer, not of all")
        cells, left_out = _audit_all(options.arguments)
    else:
        cells, left_out = _audit_one(options), []
    if options.json:
        from .cells import as_json

        Path(options.json).write_text(as_json(cells))
    if options.write:
        from .matrix import write

        words = " ".join(sys.argv[1:])
        write(cells, left_out, f"python -m accumexp.audit {words}", Path(options.write))
    _exit(cells)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m accumexp.audit",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("trainer", help="see above")
    parser.add_argument("arguments", nargs="*", metavar="key=value")
    parser.add_argument("-v", "--verbose", action="store_true", help="all checks of each certificate")
    parser.add_argument("--folder", help="keep each certificate, its page and pictures in this folder")
    parser.add_argument("--mlflow", action="store_true", help="keep each certificate as a run in MLflow too")
    parser.add_argument("--json", help="write the results as JSON to this file")
    parser.add_argument("--write", metavar="PAGE.md", help="write the matrix as Markdown, and JSON beside it")
    options = parser.parse_intermixed_args()
    for argument in options.arguments:
        if "=" not in argument:
            raise UsageError(f"{argument}: one trainer, all, or module:function; others are key=value")
    return options


def _audit_one(options: argparse.Namespace) -> list[Cell]:
    from .cases import cases_of
    from .cells import judge
    from .show import show_cell, show_certificate, show_locations, stages

    cases = cases_of(options.trainer, options.arguments)
    alone = len(cases) == 1
    folder = Path(options.folder or "audit")
    cells = []
    for case in cases:
        with stages(f"{case.trainer} {case.name}") as stage:
            certificate, cell = judge(case, stage)
        cells.append(cell)
        show_cell(cell, alone)
        if certificate is None:
            continue
        if alone or options.verbose:
            show_certificate(certificate, options.verbose)
        if options.folder or options.mlflow:
            from .keep import keep

            show_locations(
                keep(certificate, cell, folder if alone else folder / cell.setting, options.mlflow)
            )
    return cells


def _audit_all(arguments: Sequence[str]) -> tuple[list[Cell], list[str]]:
    from .matrix import all_trainers
    from .show import show_cell, show_left_out, stages

    cells: list[Cell] = []
    left_out: list[str] = []
    with stages("all trainers") as stage:
        for name, result in all_trainers(arguments):
            stage(f"{name} is done")
            if isinstance(result, str):
                left_out.append(result)
                show_left_out(result)
                continue
            cells += result
            for cell in result:
                show_cell(cell)
    return sorted(cells, key=lambda cell: cell.trainer), sorted(left_out)


def _exit(cells: Sequence[Cell]) -> None:
    from .cells import EQUAL, UNEQUAL
    from .show import show_total

    show_total(cells)
    verdicts = {cell.verdict for cell in cells}
    if UNEQUAL in verdicts:
        sys.exit(1)
    if verdicts != {EQUAL}:
        sys.exit(2)


if __name__ == "__main__":
    command(main)
