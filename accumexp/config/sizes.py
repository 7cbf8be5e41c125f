"""How many ranks, steps and samples: what was not given follows from the rest. Imports no torch."""

from __future__ import annotations

import re

from ..environment.ranks import check_devices, default_processes, launched_rank
from ..errors import UsageError

DEFAULT_BATCH_SIZE = 128
AUTO = "auto"
UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**k for k, p in enumerate("kMGT", 1)}}
UNITS.update({f"{p}iB": 1024**k for k, p in enumerate("KMGT", 1)})


def processes(asked: int | None, standalone: bool, device: str) -> int:
    """How many ranks the run has, `asked` for or not.

    Raises:
        UsageError: if that is not what the strategy, torchrun or this machine's GPUs allow.
    """
    at_least(1, "accum.processes", asked)
    outside = launched_rank()
    if standalone:
        source = "WORLD_SIZE" if outside else "accum.processes"
        count = outside.size if outside else asked or 1
        if count > 1:
            raise UsageError(f"{source}={count}: this strategy is one process, take accum=ddp or fsdp")
        return 1
    if outside:
        if asked not in (None, outside.size):
            raise UsageError(f"accum.processes={asked}: {outside.size} processes were started, leave it out")
        if device.startswith("cuda:"):
            check_devices(outside.size, device)
        return outside.size
    if asked is None:
        return default_processes(device)
    check_devices(asked, device)
    return asked


def batch_sizes(
    batch: int | None, steps: int | str | None, micro: int | None, ranks: int = 1
) -> tuple[int, int | str, int | None]:
    """`data.batch_size`, `accum.steps`, `accum.micro_batch_size` on each of `ranks`, from any two of them.

    With less than two, the batch is 128 and the window has one step. Where steps and ranks do not divide
    the batch, micro-batches differ by one sample and `micro_batch_size` is the largest. Steps that are
    `AUTO` stay so, and the micro-batch is not known yet.

    Raises:
        UsageError: if one is below 1 or no number, the three disagree, or the batch has fewer samples than
            steps.
    """
    steps = _number(steps)
    given = {"data.batch_size": batch, "accum.steps": steps, "accum.micro_batch_size": micro}
    for key, value in given.items():
        at_least(1, key, None if isinstance(value, str) else value)
    if isinstance(steps, str):
        if micro is not None:
            raise UsageError(
                f"accum.micro_batch_size={micro}: is what accum.steps={AUTO} looks for, leave one of them out"
            )
        batch = batch or DEFAULT_BATCH_SIZE
        check_split(batch, 1, ranks)
        return batch, steps, None
    if batch is None:
        batch = steps * micro * ranks if steps and micro else DEFAULT_BATCH_SIZE
    if steps is None:
        steps = -(-batch // (micro * ranks)) if micro else 1
    check_split(batch, steps, ranks)
    largest = micro_batch(batch, steps, ranks)
    if micro is not None and micro != largest and steps != -(-batch // (micro * ranks)):
        also = f" and accum.processes={ranks}" if ranks > 1 else ""
        raise UsageError(
            f"accum.micro_batch_size={micro}: disagrees with data.batch_size={batch} and "
            f"accum.steps={steps}{also}, which give {largest}; leave one of the three out"
        )
    return batch, steps, largest


def micro_batch(batch: int, steps: int, ranks: int = 1) -> int:
    """Samples in the largest micro-batch of a rank."""
    return -(-batch // (steps * ranks))


def check_split(batch: int, steps: int, ranks: int) -> None:
    """
    Raises:
        UsageError: if there are fewer samples than micro-batches on all ranks.
    """
    if steps * ranks > batch:
        key, most = ("accum.steps", batch // ranks) if batch >= ranks else ("accum.processes", batch)
        on = f" on each of {ranks} processes" if ranks > 1 else ""
        raise UsageError(
            f"accum.steps={steps}: data.batch_size={batch} samples cannot be split into more "
            f"micro-batches{on} than samples, at most {key}={most}"
        )


def in_bytes(key: str, value: int | str) -> int:
    """An amount of memory in bytes, such as 500000000, "2GiB", "500MiB" or "24GB".

    Raises:
        UsageError: naming `key`, if it is none or not above 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(value).strip())
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    factor = units.get(found[2].lower()) if found else None
    amount = 0 if found is None or factor is None else int(float(found[1]) * factor)
    if amount < 1:
        raise UsageError(f"{key}={value}: bytes above 0, or an amount such as 2GiB, 500MiB or 24GB")
    return amount


def _number(steps: int | str | None) -> int | str | None:
    """`steps` as a number where it is written as one."""
    if isinstance(steps, str) and steps != AUTO:
        try:
            return int(steps)
        except ValueError:
            raise UsageError(f"accum.steps={steps}: a number of micro-batches, or {AUTO}") from None
    return steps


def at_least(least: int, key: str, value: int | None) -> None:
    if value is not None and value < least:
        raise UsageError(f"{key}={value}: at least {least}")
