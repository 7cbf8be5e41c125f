"""A window's samples on this rank, its micro-batches and its result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .batch import Nested, batch_size, map_tensors, split, split_sizes


@dataclass(frozen=True)
class WindowBatch:
    """This rank's samples of a window.

    Attributes:
        parts: the micro-batches, pairs (inputs, targets).
        sizes: their samples; 0 for one that the rank computes on `padding`.
        targets: all targets, in one or several parts.
        padding: a pair of one sample, or empty where no size is 0.
    """

    parts: list[tuple[Nested, Nested]]
    sizes: list[int]
    targets: list[Nested]
    padding: list[Nested] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[Nested, Nested]]:
        """The inputs and targets that each micro-batch computes on."""
        for part, size in zip(self.parts, self.sizes, strict=True):
            inputs, targets = part if size else self.padding
            yield inputs, targets

    @classmethod
    def split(
        cls, inputs: Nested, targets: Nested, steps: int, samples: int | None, *, empty: bool
    ) -> WindowBatch:
        """The first `samples` of a batch, by default all, in `steps` micro-batches.

        Args:
            empty: whether micro-batches may be without samples.

        Raises:
            ValueError: as of `Window.backward`.
        """
        held = batch_size((inputs, targets))
        samples = held if samples is None else samples
        if not 0 <= samples <= held or not held:
            raise ValueError(f"samples={samples}: the batch has {held}, and one is needed to pad with")
        sizes = split_sizes(samples, steps, empty=empty)
        padding = [map_tensors(_first, batch) for batch in (inputs, targets)] if 0 in sizes else []
        if samples < held:
            inputs, targets = (map_tensors(lambda t: t[:samples], batch) for batch in (inputs, targets))
        parts = list(zip(split(inputs, sizes), split(targets, sizes), strict=True))
        return cls(parts, sizes, [targets], padding)

    @classmethod
    def of_micro_batches(cls, given: Any, steps: int | None, samples: int | None) -> WindowBatch:
        """A list of pairs (inputs, targets), each of at least one sample.

        Raises:
            ValueError: as of `Window.backward`.
        """
        if not isinstance(given, list | tuple) or not all(
            isinstance(part, list | tuple) and len(part) == 2 for part in given
        ):
            raise ValueError("backward: without targets, a list of pairs (inputs, targets) is needed")
        if steps not in (None, len(given)) or samples is not None:
            raise ValueError(f"backward: {len(given)} micro-batches are given, leave out steps and samples")
        if not given or not all(batch_size(tuple(part)) for part in given):
            raise ValueError(
                "backward: a window needs at least one micro-batch, and each at least one sample"
            )
        parts = [(inputs, targets) for inputs, targets in given]
        return cls(parts, [batch_size(part) for part in parts], [targets for _, targets in parts])


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of this rank, right after its backward.

    The backward has added to `.grad` the gradient of the sum of its items' weighted losses, times `share`,
    `Window.loss_scale` and `Window.sync.factor`. After the `last` one, `.grad` holds the sum over the ranks.

    Attributes:
        number: its index in the window, from 0.
        last: whether it is the window's last.
        samples: this rank's samples in it; 0 for padding, whose gradient is 0.
        targets: the samples' targets; their weight is `Window.loss.weight(targets)`.
        share: the factor of the sum, shape (): 1 / the window's weight, or with `reduction="sum"`
            1 / the micro-batch's.
    """

    number: int
    last: bool
    samples: int
    targets: Nested
    share: Tensor


@dataclass(frozen=True)
class WindowResult:
    """The result of one window. Tensors stay on the device; reading them makes the host wait.

    Attributes:
        loss: the mean loss over the window's items on all ranks, shape (), detached; with `local_loss`
            this rank's part, and the parts of all ranks add up to the mean.
        weight: the window's total weight (samples, or the sum of valid items' weights), over all ranks.
        samples: this rank's samples in the window.
        steps: micro-batches in the window.
        terms: of a loss of several terms, each one's part of `loss`, shape (), by name.
    """

    loss: Tensor
    weight: Tensor | float
    samples: int
    steps: int
    terms: Mapping[str, Tensor] = field(default_factory=dict)


def _first(tensor: Tensor) -> Tensor:
    return tensor[:1]
