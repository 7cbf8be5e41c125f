"""What one run of somebody else's training loop did, update by update."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .audit_samples import multiset
from .larger_batch import Gradient


class AuditError(ValueError):
    """A training loop that cannot be watched, or compared; its text is one line."""


@dataclass
class MicroBatch:
    """One forward pass and the backward pass after it, on this rank.

    Several forward passes are one micro-batch if autograd delivers nothing between them.

    Attributes:
        samples: a number for each, by content.
        gradient: what autograd delivered to the parameters, by name, in fp64.
    """

    samples: list[int]
    gradient: Gradient = field(default_factory=dict)


@dataclass
class Update:
    """The micro-batches since the optimizer step before, and the step, on this rank.

    Attributes:
        before: parameters and buffers when its first forward pass began, by name.
        optimizer_state: of every parameter when the step began, by name.
        gradient: as the optimizer received it: unscaled, clipped and reduced.
        carried: what `.grad` held when its first forward pass began.
        before_clipping: the gradient that was clipped last; None without clipping.
        clipped_after: the number of micro-batches before each call that clipped.
        after: parameters and buffers when the step had ended.
        rates: learning rates of the parameter groups.
        groups: names of the parameters in each of them.
        steps: how often an optimizer stepped, the largest number where there are several.
        skipped: whether a loss scaler skipped the step.
        source: of an update of the larger batch, the update whose weights it began from.
        loss: logged by the loop.
        own_loss_gradient: of the loss that the caller of the audit gave, on these samples.
        forward_inputs: what the model received in its forward passes.
    """

    micro_batches: list[MicroBatch] = field(default_factory=list)
    before: dict[str, Tensor] = field(default_factory=dict)
    optimizer_state: dict[str, dict[str, Any]] = field(default_factory=dict)
    gradient: Gradient = field(default_factory=dict)
    carried: Gradient = field(default_factory=dict)
    before_clipping: Gradient | None = None
    clipped_after: list[int] = field(default_factory=list)
    after: dict[str, Tensor] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    groups: list[list[str]] = field(default_factory=list)
    steps: int = 0
    skipped: bool = False
    source: int | None = None
    loss: float | None = None
    own_loss_gradient: Gradient | None = None
    forward_inputs: list[Any] = field(default_factory=list)

    @property
    def samples(self) -> list[int]:
        return [sample for each in self.micro_batches for sample in each.samples]

    @property
    def sizes(self) -> list[int]:
        return [len(each.samples) for each in self.micro_batches]


@dataclass
class FitRecord:
    """One run of the loop on one rank.

    Attributes:
        updates: in order; all of them count samples, the first ones hold tensors.
        rest: micro-batches after the last optimizer step.
        draws: whether the model's forward pass moved torch's generator.
        drawing: names of the operators that drew, by module, if draws were held fixed.
        unfixed: those of them that could not be.
        normalised: names and types of modules with statistics over the micro-batch.
        model: its type.
        parameters: their number.
        dtypes: of the gradients.
        scaled: whether a loss scaler stepped the optimizer.
    """

    updates: list[Update] = field(default_factory=list)
    rest: list[MicroBatch] = field(default_factory=list)
    draws: bool = False
    drawing: dict[str, set[str]] = field(default_factory=dict)
    unfixed: set[str] = field(default_factory=set)
    normalised: dict[str, str] = field(default_factory=dict)
    model: str = ""
    parameters: int = 0
    dtypes: set[str] = field(default_factory=set)
    scaled: bool = False


@dataclass
class JointUpdate:
    """The same update on all ranks."""

    ranks: list[Update]

    @property
    def first(self) -> Update:
        return self.ranks[0]

    @property
    def micro_batches(self) -> list[MicroBatch]:
        """Of all ranks, one after the other."""
        return [each for update in self.ranks for each in update.micro_batches]

    @property
    def samples(self) -> Counter[int]:
        return multiset(update.samples for update in self.ranks)

    @property
    def steps(self) -> int:
        """How often an optimizer stepped, on any rank."""
        return max(update.steps for update in self.ranks)

    @property
    def sizes(self) -> list[list[int]]:
        """Samples of the micro-batches, by rank."""
        return [update.sizes for update in self.ranks]


def joint_updates(records: list[FitRecord]) -> list[JointUpdate]:
    """The updates of all ranks' records, as many as all of them made."""
    return [JointUpdate(list(ranks)) for ranks in zip(*(record.updates for record in records), strict=False)]
