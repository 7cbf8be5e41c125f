"""From a configuration to what training and evaluation need: an `Experiment`, which builds a `Trainer`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from ..accum import GraphedStep, Ranks, Window, WindowLoss, data_parallel, fully_sharded, window_loss
from ..accum.terms import has_terms
from ..config.instantiate import build
from ..config.schema import Config, Reduction, Strategy
from ..data import Share, Splits, build_splits
from ..data.samples import check_inputs
from ..environment.cores import cores
from ..environment.random_state import derive_seed, seed_everything
from ..environment.ranks import RankInfo, local_first
from ..errors import UsageError
from .components import (
    autocast_dtype,
    build_callbacks,
    build_loss,
    build_loss_scale,
    build_metrics,
    build_model,
    check_monitored,
    ignored_label,
    placement,
)
from .evaluated_schedule import steppable, takes_metric
from .evaluation import Evaluator
from .graph_check import graphs, warn_of_eager_step
from .metrics_sink import MetricsSink
from .optimizers import build_optimizer
from .progress import LoopOptions, default_log_every
from .trainer import Trainer

log = logging.getLogger(__name__)
ALONE = RankInfo()


@dataclass(frozen=True)
class Experiment:
    """A configuration and the objects it names, on the device and in the precision it asks for.

    `dataclasses.replace` makes a variant, of another model or configuration over the same data.

    Attributes:
        rank_info: this process among those that train together.
        criterion: the loss as the configuration names it; `loss` is the same as a window takes it.
        autocast: dtype of `torch.autocast` around the forward pass, or None.
    """

    config: Config
    rank_info: RankInfo
    device: torch.device
    model: nn.Module
    criterion: Any
    loss: WindowLoss
    splits: Splits
    evaluator: Evaluator
    autocast: torch.dtype | None

    @classmethod
    def build(cls, config: Config, rank_info: RankInfo = ALONE, splits: Splits | None = None) -> Experiment:
        """Builds data, model, loss and metrics.

        Seeds all generators first: the model's initial weights are a function of `config.seed`, equal on
        all ranks. The random state after it differs from rank to rank.

        Args:
            splits: the data, if it is built already.

        Raises:
            UsageError: naming the key that cannot be built.
        """
        place = placement(config, rank_info)
        device, dtype = place.device, place.dtype
        _set_threads(config, rank_info)
        seed_everything(config.seed, config.trainer.deterministic)
        autocast = autocast_dtype(config.precision, dtype)
        ranks = Ranks() if rank_info.size > 1 else Ranks(alone=True)
        # The data comes before the model, so that an error in it is reported first.
        share = Share(rank_info.rank, rank_info.size, cast(int, config.accum.steps))
        if splits is None:
            with local_first(rank_info):
                splits = build_splits(config.data, config.seed, place, share, ignored_label(config))
        seed_everything(config.seed, config.trainer.deterministic)
        model = build_model(config)
        if splits.train.example is not None:
            check_inputs(model, splits.train.example[0])
        criterion = build_loss(config, device, dtype)
        try:
            loss = window_loss(criterion)
        except ValueError as error:
            raise UsageError(f"loss.{error}") from error
        evaluator = Evaluator(loss, build_metrics(config, device), autocast, ranks)
        model = model.to(device, dtype)
        if rank_info.rank:
            seed_everything(derive_seed("rank", config.seed, rank_info.rank), config.trainer.deterministic)
        return cls(config, rank_info, device, model, criterion, loss, splits, evaluator, autocast)

    @property
    def updates(self) -> int:
        """Updates in the run."""
        return self.options.total_updates(len(self.splits.train))

    @property
    def options(self) -> LoopOptions:
        """What the loop of the configuration does, and how often."""
        loop = self.config.trainer
        options = LoopOptions(
            loop.epochs,
            loop.max_updates,
            eval_every=loop.eval_every,
            clip_norm=loop.clip_norm,
            clip_value=loop.clip_value,
            check_finite=loop.check_finite,
            recover=self.config.accum.recovers and not loop.graph,
        )
        updates = options.total_updates(len(self.splits.train))
        return replace(options, log_every=loop.log_every or default_log_every(updates))

    def prepared_model(self, model: nn.Module) -> nn.Module:
        """`model` as `accum.strategy` needs it: itself, wrapped for DDP, or sharded in place.

        Raises:
            UsageError: if it cannot be sharded.
        """
        accum = self.config.accum
        if accum.strategy is Strategy.ddp:
            return data_parallel(model, find_unused_parameters=accum.find_unused_parameters)
        if accum.strategy is Strategy.fsdp:
            try:
                return fully_sharded(model, self.device)
            except ValueError as error:  # parameters that two blocks share
                raise UsageError(f"model: accum=fsdp cannot cut it into blocks: {error}") from error
        return model

    def window(self, model: nn.Module | None = None) -> Window:
        """The window over `model`, which is prepared already; by default the experiment's, prepared here.

        Raises:
            UsageError: for a loss that `accum.reduction` cannot reduce.
        """
        accum = self.config.accum
        if accum.reduction is Reduction.sum and has_terms(self.loss):
            raise UsageError(
                "accum.reduction=sum: adds the means of micro-batches, and a loss of several terms, or one "
                "that couples samples, has none; give accum.reduction=mean"
            )
        return Window(
            self.prepared_model(self.model) if model is None else model,
            self.loss,
            cast(int, accum.steps),
            reduction=accum.reduction.value,
            autocast=self.autocast,
            fp32_buffers=accum.fp32_buffers,
            loss_scale=build_loss_scale(accum, self.device),
            reduce_every_micro_batch=accum.reduce_every_micro_batch,
            local_loss=True,
        )

    def optimizer(self, parameters: list[nn.Parameter] | None = None) -> Optimizer:
        """The optimizer over `parameters`, those of the model by default.

        It is fused where torch has a kernel for it and the configuration chooses no implementation. Groups
        by name go by the names of the model's parameters, which `parameters` are copies of, in their order.

        Raises:
            UsageError: naming the key that cannot be built.
        """
        named = list(self.model.named_parameters())
        if parameters is not None:
            named = [(name, other) for (name, _), other in zip(named, parameters, strict=True)]
        return build_optimizer(
            self.config.optimizer, named, self.model.modules(), capturable=self.config.trainer.graph
        )

    def schedule(self, optimizer: Optimizer, updates: int | None = None) -> Any:
        """The learning rate schedule over `updates`, those of the run by default."""
        node, config = self.config.scheduler, self.config
        # A schedule's own `mode` is not that of the metric, unless it is stepped with the metric.
        offered = {"mode": config.mode} if takes_metric(node) else {}
        if takes_metric(node):
            check_monitored("monitor", config.monitor, self.splits.has_eval)
        made = build(node, "scheduler", optimizer, total_updates=updates or self.updates, **offered)
        return steppable(made, str(node.get("_target_")), config.monitor)

    def trainer(
        self, metrics_sink: MetricsSink, updates: int | None = None, options: LoopOptions | None = None
    ) -> Trainer:
        """The training loop; `updates` is the length of its schedule.

        The schedule's length and the options are those of the configuration by default.

        Raises:
            UsageError: naming the key that cannot be built.
        """
        config, loop = self.config, self.config.trainer
        if loop.compile:
            self.model.compile()
        window = self.window()
        optimizer = self.optimizer()  # after the window: sharding replaces the parameters
        trainer = Trainer(
            window,
            optimizer,
            self.schedule(optimizer, updates),
            self.splits,
            self.evaluator,
            build_metrics(config, self.device),
            metrics_sink,
            build_callbacks(config, self.splits.has_eval),
            options or self.options,
            graphs(window, self.splits.train, self.device) if loop.graph else None,
        )
        if isinstance(trainer.step, GraphedStep):
            warn_of_eager_step(trainer.step.step)
        for name, callback in trainer.callbacks.items():
            callback.check(trainer, f"callbacks.{name}")
        return trainer


def _set_threads(config: Config, rank_info: RankInfo) -> None:
    threads = config.trainer.threads
    if threads is None and rank_info.size > 1:
        threads = max(1, cores() // rank_info.local_size)
    if threads and threads > cores():
        if rank_info.first:
            log.warning("trainer.threads=%d: this machine has %d cores, as many are taken", threads, cores())
        threads = cores()
    if threads:
        torch.set_num_threads(threads)
