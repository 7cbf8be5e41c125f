"""How far a run is, how long it is, and what its loop does when."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        epoch: finished epochs, which is also the number of the present one, from 0.
        update: updates since the run began.
        epoch_update: updates in the present epoch.
        samples: samples of all updates.
        seconds: time spent in the loop, without evaluation and checkpoints.
        activation_bytes: peak bytes saved for backward in the window that was measured, the first one or the
            first of a finer split; 0 before it.
    """

    epoch: int = 0
    update: int = 0
    epoch_update: int = 0
    samples: int = 0
    seconds: float = 0.0
    activation_bytes: int = 0


@dataclass(frozen=True)
class LoopOptions:
    """What a `Trainer` does, and how often.

    Attributes:
        epochs, max_updates: the run ends at whichever comes first.
        log_every: updates between two reads of the device.
        eval_every: epochs between two evaluations; the last is always evaluated.
        clip_norm: the 2-norm that an update's gradient is clipped to, or None.
        clip_value: the largest absolute value that an element of it keeps, or None; after `clip_norm`.
        check_finite: fail on a loss, weight or optimizer state that is inf or nan.
        recover: split a window that runs out of memory into smaller micro-batches, and all that follow.
        may_stop: whether `Trainer.stop` ends the run early when it is not forced.
    """

    epochs: int
    max_updates: int | None = None
    log_every: int = 10
    eval_every: int = 1
    clip_norm: float | None = None
    clip_value: float | None = None
    check_finite: bool = True
    recover: bool = False
    may_stop: bool = True

    def total_updates(self, updates_per_epoch: int, progress: Progress | None = None) -> int:
        """Updates in the run, which is at `progress`; earlier epochs may have had more or fewer updates."""
        done = progress or Progress()
        left = updates_per_epoch * (self.epochs - done.epoch) - done.epoch_update
        updates = done.update + left
        return updates if self.max_updates is None else min(updates, self.max_updates)


def default_log_every(updates: int) -> int:
    """`log_every` of a run of `updates`: a hundredth of the run, from 10 to 100 updates."""
    return max(10, min(100, updates // 100))
