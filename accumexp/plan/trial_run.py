"""Trial runs: two updates of a run's own training loop, on a separate experiment, with memory measured."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from statistics import median

import torch
from torch import Tensor, nn

from ..accum import Peak, held_bytes, measure_peak
from ..config.loading import with_steps
from ..config.schema import Config, Strategy
from ..config.sizes import AUTO, micro_batch
from ..environment.ranks import RankInfo, device_of, local_first
from ..errors import UsageError
from ..training.callbacks import without_output
from ..training.components import build_metrics, build_model
from ..training.evaluation import Evaluator
from ..training.experiment import ALONE, Experiment
from ..training.metrics_sink import NullMetricsSink
from ..training.trainer import Trainer
from .trial_callbacks import StopAfter, UpdateClock
from .trial_data import UPDATES, TrialData

TO_GO_BACK = "copies to go back to"
BUCKETS = "buckets of ddp"
UNDER_WAY = "a bucket of ddp under way"
# A bucket of DistributedDataParallel is full at this size (its bucket_cap_mb).
FULL_BUCKET = 25 * 2**20


@dataclass(frozen=True)
class TrialMeasurement:
    """What two updates and one evaluated batch took, in bytes.

    Attributes:
        micro: samples in a micro-batch.
        update: of everything up to the end of the second update, what a callback makes at its beginning
            and the next batch's gathering included.
        evaluation: of batches of `micro` samples (of a whole trial: the run's own), after it.
        batch: the data during a window: its batch and the order of the epoch.
        parameters: with buffers.
        activations: the most that was saved for backward.
    """

    micro: int
    update: Peak
    evaluation: Peak
    batch: int
    parameters: int
    gradients: int
    state: int
    activations: int


class TrialRun:
    """The run that `config` describes, to be tried at any split of its batch.

    All that a run does in an update is done: its trainer, its window and its callbacks, except those that
    print or save. One process, whatever the strategy: a rank tries its own part of the batch, without the
    others, and with gradients that stay as those of `accum=ddp` do. Buffers of `beside` bytes stand for the
    memory that a single process does not allocate.

    Building and using it moves torch's random state.

    Args:
        rank_info: the rank whose part is tried; all ranks must build it together.
    """

    def __init__(self, config: Config, rank_info: RankInfo = ALONE) -> None:
        self.config = config
        self.ranks, self.rank = config.accum.processes or 1, rank_info.rank
        # Without launched ranks, all ranks are taken to be on this machine.
        self.local_ranks = rank_info.local_size if rank_info.size > 1 else self.ranks
        self._device = device_of(config.device, rank_info)
        first = self._config(1)
        with local_first(rank_info):
            self.experiment = Experiment.build(first)
        self.device = self.experiment.device
        self.data = TrialData(self.experiment.splits, self.rank, self.ranks, self.device)
        self._length = replace(self.experiment, config=config).updates

    def small(self, micro: int, steps: int) -> TrialMeasurement:
        """A window of `steps` micro-batches of `micro` samples, and an evaluation of as many."""
        self.data.take_small(micro, steps)
        return self._measure(self._config(steps, steps * micro * self.ranks), micro)

    def whole(self, steps: int) -> TrialMeasurement:
        """The run's own batch in `steps`, and its own evaluation."""
        self.data.take_whole(steps)
        return self._measure(self._config(steps), micro_batch(self.data.batch_size, steps, self.ranks))

    def feeding(self) -> Peak:
        """The peak of gathering one whole batch after the other."""
        self.data.take_whole(1)
        return self._gather()

    def seconds(self, steps: int, updates: int) -> float:
        """Median seconds of an update of the whole batch in `steps`, of `updates` after a first one."""
        self.data.take_whole(steps)
        config = self._config(steps)
        config.trainer.epochs, config.trainer.log_every = updates + 2, 10 * updates
        self._take(config)
        trainer = self._trainer(updates + 1)
        clock = UpdateClock(updates + 1)
        trainer.callbacks["clock"] = clock
        with self._cleared(trainer):
            trainer.fit()
        return median(clock.seconds[1:])

    def _config(self, steps: int, batch: int | None = None) -> Config:
        """A rank's part of the run in `steps`, as a run of its own without an end."""
        config = with_steps(self.config, steps, batch)
        accum, loop = config.accum, config.trainer
        accum.strategy = Strategy.standalone
        # A scale that overflows would leave the optimizer without its state.
        accum.init_scale = max(1.0, accum.min_scale)
        loop.epochs, loop.max_updates, loop.log_every, loop.check_finite = UPDATES + 1, None, 1, False
        loop.eval_every = 10**9
        # Recovery would hide what does not fit, and a graph's memory is not counted as tensors.
        accum.recover, loop.graph = False, False
        config.device = self._device
        return config

    @property
    def held(self) -> list[Tensor]:
        """The tensors that are there before a run begins: model, loss and data."""
        experiment = self.experiment
        modules = [m for m in (experiment.model, experiment.criterion) if isinstance(m, nn.Module)]
        held = [t for module in modules for t in chain(module.parameters(), module.buffers())]
        return [*(tensor for tensor in held if tensor.device.type == self.device.type), *self.data.held]

    @property
    def beside(self) -> dict[str, int]:
        """Bytes that recovery and DDP allocate in the run besides, by what they hold.

        To go back to a window's start, copies of all buffers and, on the host, torch's random state (an old
        one and a new). With `accum=ddp`, buckets: in the first window gradients are beside them, in the
        second they are made anew, and the thread that reduced one of the old may still hold it.
        """
        experiment, accum = self.experiment, self.config.accum
        sizes: dict[str, int] = {}
        if accum.recovers and not self.config.trainer.graph:
            modules = [m for m in (experiment.model, experiment.criterion) if isinstance(m, nn.Module)]
            copies = sum(buffer.nbytes for module in modules for buffer in module.buffers())
            host = 2 * torch.get_rng_state().nbytes if self.device.type == "cpu" else 0
            sizes[TO_GO_BACK] = copies + host
        if accum.strategy is Strategy.ddp:
            gradients = [p.nbytes for p in experiment.model.parameters() if p.requires_grad]
            sizes[BUCKETS] = sum(gradients)
            sizes[UNDER_WAY] = min(sum(gradients), FULL_BUCKET + max(gradients, default=0))
        return {name: size for name, size in sizes.items() if size}

    def close(self) -> None:
        """Drops model and data, and returns their memory to the device; no trial can follow."""
        self.experiment.splits.close()
        del self.experiment, self.data
        discard(self.device)

    def _room(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def _gather(self) -> Peak:
        return self.data.gather(held_bytes(self.held))

    def _measure(self, config: Config, micro: int) -> TrialMeasurement:
        self._take(config)
        batch = self._gather()
        with measure_peak(self.device, held_bytes(self.held)) as update:
            # Stands in for what this one process does not make, so that what does not fit fails here.
            beside = {name: self._room(size) for name, size in self.beside.items()}
            trainer = self._trainer()
            trainer.callbacks["end"] = StopAfter(UPDATES)
            with self._cleared(trainer, but_at_the_end=True):
                trainer.fit()
        if trainer.progress.update < UPDATES:
            raise UsageError(
                f"accum.steps={AUTO}: {trainer.stop_reason or 'the run'} ends after update "
                f"{trainer.progress.update}, and {UPDATES} are needed to try a micro-batch; give accum.steps"
            )
        trainer.clear_stop()
        end = update.end
        if not config.accum.fp32_buffers:  # after a window the gradients are in the buckets
            end -= self.beside.get(BUCKETS, 0)
            beside.pop(BUCKETS, None)
        with measure_peak(self.device, end) as evaluation, self._cleared(trainer, but_at_the_end=True):
            trainer.evaluate("eval")
        beside.clear()
        model = self.experiment.model
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        state = [
            value
            for values in trainer.optimizer.state.values()
            for value in values.values()
            if isinstance(value, Tensor)
        ]
        measurement = TrialMeasurement(
            micro,
            update,
            evaluation,
            batch.end - batch.start,
            held_bytes(chain(model.parameters(), model.buffers())),
            held_bytes(gradients),
            held_bytes(state),
            trainer.progress.activation_bytes,
        )
        model.zero_grad(set_to_none=True)
        return measurement

    @contextmanager
    def _cleared(self, trainer: Trainer, but_at_the_end: bool = False) -> Iterator[None]:
        """Leaves nothing of a window on the model that all trials share, above all not of one that failed."""
        done = False
        try:
            yield
            done = True
        finally:
            if not done:
                trainer.window.discard()
            if not (done and but_at_the_end):
                self.experiment.model.zero_grad(set_to_none=True)

    def _take(self, config: Config) -> None:
        """Makes `config` the experiment's, with a new model where its configuration contains the split."""
        model = self.experiment.model
        if config.model != self.experiment.config.model:
            like = next(model.parameters())
            model = build_model(config).to(like.device, like.dtype)
        self.experiment = replace(self.experiment, config=config, model=model)

    def _trainer(self, updates: int = UPDATES) -> Trainer:
        """The run's trainer; its schedule is the run's, and long enough for `updates`."""
        experiment = self.experiment
        # Metrics of its own, or those that are there already would be freed under measurement.
        metrics = build_metrics(experiment.config, experiment.device)
        fresh = Evaluator(experiment.loss, metrics, experiment.autocast)
        experiment = replace(experiment, evaluator=fresh)
        trainer = experiment.trainer(NullMetricsSink(), max(self._length, updates))
        trainer.callbacks = without_output(trainer.callbacks)
        for metrics in (fresh.metrics, trainer.log.train_metrics.metrics):
            metrics.keep_to_this_process()  # the other ranks may be at another trial, or have none
        if self.config.accum.strategy is Strategy.ddp:
            trainer.window.sync.keeps_gradients = not self.config.accum.find_unused_parameters
        return trainer


@contextmanager
def trial_run(config: Config, rank_info: RankInfo = ALONE) -> Iterator[TrialRun]:
    """A `TrialRun` of `config`, closed at the end."""
    trial = TrialRun(config, rank_info)
    gc.collect()
    gc.freeze()  # every measurement collects what is left of the one before, and nothing else
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))  # the run itself logs the same
    try:
        yield trial
    finally:
        logging.disable(before)
        gc.unfreeze()
        trial.close()
        if config.trainer.compile:
            torch.compiler.reset()  # or what was compiled here would decide what the run compiles


def discard(device: torch.device) -> None:
    """Returns the memory of unreferenced tensors to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
