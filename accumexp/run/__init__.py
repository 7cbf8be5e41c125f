"""The command `python -m accumexp.run`, and the life of a run from its specification to its summary.

`run` is the command for scripts and notebooks.
"""

from .api import RunResult, run

__all__ = ["RunResult", "run"]
