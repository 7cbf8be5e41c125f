"""`python -m accumexp.run.rank <folder>`: one rank of a run that `launch` started. Not for the shell."""

from __future__ import annotations

import logging.config
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    die_with_parent()
    from ..environment.ranks import exit_immediately
    from .launch import report

    code = 0
    try:
        carry_out(folder / "order.json", rank)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:
        logging.getLogger(__name__).info("rank %d failed", rank, exc_info=error)
        report(folder, rank, error)
        code = 1
    exit_immediately(code)


def carry_out(path: Path, rank: int) -> None:
    from ..environment.ranks import launched_rank
    from .job import carry_out as executed
    from .spec import RunSpec

    spec = RunSpec.read(path)
    if rank == 0 and spec.logging.get("version"):
        logging.config.dictConfig(spec.logging)
    rank_info = launched_rank()
    assert rank_info is not None
    with _known_to_run(spec.folder) if spec.job and rank_info.first else nullcontext():
        executed(spec, rank_info)


def _known_to_run(folder: Path) -> AbstractContextManager[Any]:
    """A lock that tells whoever goes on with the job that its ranks outlive the one who started them."""
    from filelock import FileLock

    from ..sweeps.job_status import RANKS_LOCK

    return FileLock(folder / RANKS_LOCK)


def die_with_parent() -> None:
    """On Linux, SIGTERM when the process that launched the ranks is gone, however it went."""
    if sys.platform == "linux":
        import ctypes
        import signal

        PR_SET_PDEATHSIG = 1  # prctl(2)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    main()
