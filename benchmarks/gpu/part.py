"""Runs one part of `benchmarks.gpu`, which starts a process for each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from .session import Session


def function_of(name: str) -> Callable[[Session], None]:
    """The part's function; only parts that train in this process import torch."""
    if name in ("window", "memory"):
        from . import updates

        return getattr(updates, name)
    from . import commands

    return getattr(commands, name)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.part", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--device", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args(given)
    session = Session(chosen.device, chosen.quick, chosen.folder, chosen.data_root)
    function_of(chosen.name)(session)
    if session.problems:
        sys.exit("; ".join(session.problems))


if __name__ == "__main__":
    main()
