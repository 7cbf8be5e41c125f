"""Numbers of ranks, steps and samples, with the missing ones derived from the others. Imports no torch."""

from __future__ import annotations

import re

from ..environment.ranks import check_devices, default_processes, launched_rank
from ..errors import UsageError

DEFAULT_BATCH_SIZE = 128
AUTO = "auto"
UNITS = {"": 1, "b": 1, **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)}}
UNITS.update({f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)})


def processes(asked: int | None, standalone: bool, device: str) -> int:
    """The number of ranks of the run, of which `asked` is the configured number.

    Raises:
        UsageError: if the strategy, torchrun or this machine's GPUs do not allow it.
    """
    at_least(1, "accum.processes", asked)
    launched = launched_rank()
    if standalone:
        source = "WORLD_SIZE" if launched else "accum.processes"
        count = launched.size if launched else asked or 1
        if count > 1:
            raise UsageError(f"{source}={count}: this strategy is one process, take accum=ddp or fsdp")
        return 1
    if launched:
        if asked not in (None, launched.size):
            raise UsageError(f"accum.processes={asked}: {launched.size} processes were started, leave it out")
        if device.startswith("cuda:"):
            check_devices(launched.size, device)
        return launched.size
    if asked is None:
        return default_processes(device)
    check_devices(asked, device)
    return asked


def batch_sizes(
    batch: int | None, steps: int | str | None, micro: int | None, ranks: int = 1
) -> tuple[int, int | str, int | None]:
    """`data.batch_size`, `accum.steps`, `accum.micro_batch_size` on each of `ranks`, from any two of them.

    With less than two, the batch is 128 and the window has one step. If steps and ranks do not divide the
    batch, micro-batches differ by one sample and `micro_batch_size` is the largest. With `AUTO` steps the
    micro-batch size is None.

    Raises:
        UsageError: if one is below 1 or not a number, the three disagree, or the batch has fewer samples than
            steps.
    """
    if isinstance(steps, str) and steps != AUTO:
        try:
            steps = int(steps)
        except ValueError:
            raise UsageError(f"accum.steps={steps}: a number of micro-batches, or {AUTO}") from None
    at_least(1, "data.batch_size", batch)
    at_least(1, "accum.steps", steps)
    at_least(1, "accum.micro_batch_size", micro)
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
    """Raises a `UsageError` if there are fewer samples than micro-batches on all ranks."""
    if steps * ranks > batch:
        key, most = ("accum.steps", batch // ranks) if batch >= ranks else ("accum.processes", batch)
        on = f" on each of {ranks} processes" if ranks > 1 else ""
        raise UsageError(
            f"accum.steps={steps}: data.batch_size={batch} samples cannot be split into more "
            f"micro-batches{on} than samples, at most {key}={most}"
        )


def in_bytes(key: str, value: int | str) -> int:
    """Parses an amount of memory, such as 500000000, "2GiB", "500MiB" or "24GB", for the key `key`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(value).strip())
    amount = int(float(match[1]) * UNITS.get(match[2].lower(), 0)) if match else 0
    if amount < 1:
        raise UsageError(f"{key}={value}: bytes above 0, or an amount such as 2GiB, 500MiB or 24GB")
    return amount


def at_least(least: int, key: str, value: int | str | None) -> None:
    """Raises a `UsageError` for a number below `least`; None and text pass."""
    if isinstance(value, int) and value < least:
        raise UsageError(f"{key}={value}: at least {least}")
