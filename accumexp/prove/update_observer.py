"""A callback that observes every update of a trainer and compares it with the larger batch's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Generic, TypeVar

import torch

from ..accum.batch import map_tensors, tensors
from ..data import Batch
from ..proof.certificate import Check
from ..proof.observation import Observation, observing
from ..proof.own_precision import OwnPrecisionReplay
from ..proof.problem import Problem, TrainingState, WholeBatch
from ..proof.ranks import all_gather, world_size
from ..proof.replay_float64 import Float64Replay
from ..training.callbacks import Callback
from ..training.trainer import Trainer

AnyReplay = TypeVar("AnyReplay", Float64Replay, OwnPrecisionReplay)
ONCE_AN_EPOCH = "every sample of the training split comes once an epoch"


class UpdateObserver(Callback, Generic[AnyReplay]):
    """Observes every update and compares it in a replay.

    Args:
        replay_class: of the replay.
        stage: called with a description of the progress.
        updates: compared updates after which the run stops; all by default.

    Attributes:
        replay: after `attach`.
    """

    order = -1000
    replay: AnyReplay

    def __init__(
        self,
        problem: Problem,
        replay_class: type[AnyReplay],
        stage: Callable[[str], None],
        updates: int | None = None,
    ) -> None:
        self.problem = problem
        self.replay_class = replay_class
        self.stage = stage
        self.updates = updates
        self._indices: dict[int, list[int]] = {}  # by epoch
        self._observing = ExitStack()

    def attach(self, trainer: Trainer) -> None:
        """Starts the replay from the weights of `trainer`, before its first update."""
        dtype = next(trainer.model.parameters()).dtype
        self._state = TrainingState(self.problem, dtype, trainer.model, trainer.optimizer)
        self.replay = self.replay_class(self.problem, self._state)

    def update_begin(self, trainer: Trainer) -> None:
        assert trainer.batch is not None
        self._batch, indices = gathered_batch(trainer.batch)
        self._indices.setdefault(trainer.progress.epoch, []).extend(indices)
        arrivals = self.replay_class is OwnPrecisionReplay or self.problem.scaling is not None
        observing_window = observing(self._state, self._batch, arrivals)
        self._observation: Observation = self._observing.enter_context(observing_window)

    def update_end(self, trainer: Trainer) -> None:
        self._observing.close()
        self.replay.compare(self._batch, self._observation)
        if self.updates and self.replay.updates >= self.updates:
            trainer.stop("enough updates were compared", force=True)
        self.stage(f"update {trainer.progress.update} of {trainer.total_updates}")

    def run_end(self, trainer: Trainer) -> None:
        self._observing.close()

    def samples_check(self, trainer: Trainer) -> Check:
        """Checks that every sample of the split, or of the sampler's draw, came once in each whole epoch."""
        train = trainer.splits.train
        count, expected = len(train.order(0)), set(train.indices.tolist())
        wrong, complete = 0, 0
        for epoch, indices in self._indices.items():
            if epoch + 1 in self._indices or len(indices) == count:
                complete += 1
                if train.sampler is not None:  # which may leave out and repeat samples
                    drawn, came = Counter(train.order(epoch).tolist()), Counter(indices)
                    wrong += sum((drawn - came).values()) + sum((came - drawn).values())
                    continue
                distinct = set(indices)
                wrong += len(distinct - expected) + len(indices) - len(distinct) + abs(count - len(indices))
        detail = f"{count} samples in each of {complete} epochs"
        decided = complete > 0
        return Check("samples of an epoch", float(wrong), 0.0, "count", ONCE_AN_EPOCH, detail, decided)


def gathered_batch(batch: Batch) -> tuple[WholeBatch, list[int]]:
    """The update's batch over all ranks, and its samples' indices. A collective call."""
    if world_size() == 1:
        return (batch.inputs, batch.targets), batch.indices.tolist()
    device = tensors(batch.targets)[0].device

    rank_batch = (batch.inputs, batch.targets, batch.indices)
    parts = all_gather(map_tensors(lambda t: t[: batch.samples].cpu(), rank_batch))  # without padding
    inputs, targets = (_joined([part[k] for part in parts], device) for k in range(2))
    return (inputs, targets), [index for part in parts for index in part[2].tolist()]


def _joined(parts: list[Any], device: torch.device) -> Any:
    columns = iter(zip(*(tensors(part) for part in parts), strict=True))
    return map_tensors(lambda _: torch.cat(next(columns)).to(device), parts[0])
