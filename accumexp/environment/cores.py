"""CPU cores of a process."""

from __future__ import annotations


def cores() -> int:
    """Returns the number of cores that affinity and control group leave to this process."""
    from joblib import cpu_count

    return cpu_count()


def most_workers() -> int:
    """The most data workers that a process starts: a few for each core, which may wait for a disk."""
    return max(8, 2 * cores())
