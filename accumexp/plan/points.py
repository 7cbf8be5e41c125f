"""Results of a plan: the memory limit, the measured splits of a batch, and their frontier."""

from __future__ import annotations

from dataclasses import dataclass

from ..environment.console import amount


@dataclass(frozen=True)
class Limit:
    """The most bytes that tensors may take on a rank's device, and the setting that they come from."""

    bytes: int
    setting: str

    def __str__(self) -> str:
        return f"{amount(self.bytes)} ({self.setting})"


@dataclass(frozen=True)
class Point:
    """One way to cut the update's batch, on one rank.

    Attributes:
        predicted, measured: peaks in bytes; None where nothing was tried.
        fits: whether the peak that is known is within the limit.
        trouble: why the trial did not come to its end.
    """

    steps: int
    micro_batch: int
    predicted: int
    fits: bool
    measured: int | None = None
    seconds: float | None = None
    trouble: str | None = None


@dataclass(frozen=True)
class Frontier:
    """What was found.

    Attributes:
        chosen: the point that `accum.steps=auto` takes, or None with the reason in `refused`.
        samples: of an update; fewer than `batch_size` where there are no more to train on.
        evaluation: the peak of an evaluation in bytes, predicted.
        parts: bytes of the chosen point by what they hold; not all of it is alive at the same time.
    """

    name: str
    device: str
    batch_size: int
    samples: int
    ranks: int
    limit: Limit
    points: list[Point]
    chosen: Point | None
    refused: str | None
    evaluation: int
    parts: dict[str, int]
