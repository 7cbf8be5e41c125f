"""`python -m accumexp.environment.worker <folder>`: one rank of a command that `launch` started. Internal."""

from __future__ import annotations

import logging.config
import os
import pickle
import sys
from pathlib import Path


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    end_with_parent()
    from .launch import CALL, report
    from .ranks import exit_immediately

    code = 0
    try:
        function, argument, logging_config = pickle.loads((folder / CALL).read_bytes())
        if rank == 0 and logging_config.get("version"):
            logging.config.dictConfig(logging_config)
        function(argument)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:
        logging.getLogger(__name__).info("rank %d failed", rank, exc_info=error)
        report(folder, rank, error)
        code = 1
    exit_immediately(code)


def end_with_parent() -> None:
    """On Linux, requests SIGTERM for this process when the process that launched it ends."""
    if sys.platform == "linux":
        import ctypes
        import signal

        PR_SET_PDEATHSIG = 1  # prctl(2)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    main()
