"""`python -m accumexp.prove`: a certificate. Is this window the larger batch?

Exit code 0: proved, perhaps up to sources that are named; 1: not proved; 2: wrong usage.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

from ..cli import command, hydra_app
from ..errors import UsageError

HELP = """\
python -m accumexp.prove [-v] [overrides of run]

Is this window of micro-batches the larger batch? The run's own trainer makes its first updates; the larger
batch is computed beside each of them in one piece, and everything is compared. Where it differs, experiments
find the cause. Nothing is trained to its end.

The verdict and its cause are printed first, then the checks that failed. All of it, with pictures, is in
certificate.html and certificate.json in the run's folder, and in MLflow.

Exit codes:
  0   proved, perhaps up to sources that are named, such as dropout draws
  1   not proved: another update, or more memory or communication than promised
  2   wrong usage

Options:
  -v, --verbose       list all checks, also those that passed
  --cfg job           print the configuration that the overrides compose

Keys, as key=value (all of `python -m accumexp.run --help`, and of the proof itself):
  proof.updates=null  updates that are compared one by one with the larger batch's: 100, or 36 for models with
                      more than 2 million parameters

Examples:
  python -m accumexp.prove accum.steps=4
  python -m accumexp.prove -v model=resnet18 model.norm=group accum.steps=8
  python -m accumexp.prove accum=ddp accum.processes=2 accum.steps=4 proof.updates=20

`python -m accumexp.run prove=true` makes the certificate before it trains. A loop of your own is certified by
`accumexp.proof.certify`. docs/proof.md says what every check compares, and what a proof cannot see.
"""
VERBOSE = ("-v", "--verbose")


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(HELP, end="")
        return
    from ..environment.ranks import exit_immediately, launched_rank, silent_rank_overrides

    if {"-m", "--multirun"} & set(sys.argv[1:]):
        raise UsageError(
            "--multirun: a proof is of one experiment; python -m accumexp.run -m prove=true certifies "
            "the jobs of a sweep"
        )
    verbose = bool(set(VERBOSE) & set(sys.argv[1:]))
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument not in VERBOSE]  # Hydra's follow

    def task(cfg: Any) -> None:
        from .job import prove_job  # imports the proof

        prove_job(cfg, verbose)

    rank_info = launched_rank()
    if rank_info is None or rank_info.size == 1:
        hydra_app(task)
        return
    code: object = 0
    with tempfile.TemporaryDirectory(prefix="accumexp-rank-") as folder:
        try:
            if not rank_info.first:
                sys.argv[1:] = [*sys.argv[1:], *silent_rank_overrides(folder)]
            hydra_app(task)
        except SystemExit as end:
            code = end.code
    exit_immediately(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    command(main)
