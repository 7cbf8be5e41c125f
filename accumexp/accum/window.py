"""The window: accumulates the micro-batches of one update into the gradient of the larger batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .batch import Nested, call
from .buffers import Fp32Buffers
from .choose_objective import LateWeights, check_late_weights, check_loss_parameters, objective_of, passes_of
from .forward_state import ForwardState
from .loss import MeanOverSamples, WindowLoss, window_loss
from .norm_levels import check_norms
from .norm_passes import WindowNorms
from .objective import Objective
from .scale import LossScale
from .sync import NOTHING, sync_of
from .terms import TermsLoss, has_terms
from .two_passes import FirstPass
from .window_batch import MicroBatch, WindowBatch, WindowResult
from .window_norm import window_norms

Reduction = Literal["mean", "sum"]
Observer = Callable[[Any, Nested], None]


class Window:
    """Adds to `.grad` the gradient of one large batch, one micro-batch at a time.

    With `reduction="mean"` the gradient is that of `sum_i w_i l_i / sum_i w_i` over all items of the window,
    for every split. With `reduction="sum"` it is that of the sum of the micro-batch means, which is about
    `steps` times larger and depends on the split; a micro-batch's mean is over all ranks.

    With a model wrapped for several ranks (`data_parallel`, `fully_sharded`, torch's DistributedDataParallel
    and `fully_shard`) the window holds the samples of all ranks: each rank calls `backward` with its own,
    weights are counted over the ranks, and gradients are reduced in the last micro-batch only.

    A loss of several terms (`TermsLoss`, or a function that returns terms by name) has a denominator for
    each of them. One that couples samples (`couples = True`) is computed on the outputs of the whole window,
    in two passes: the outputs of all samples are kept, and every micro-batch is computed once more.

    Norms over the window (`window_batch_norm`) take many passes: docs/normalisation.md.

    Args:
        model: called as `model(x)` with a tensor, `model(*xs)` with a tuple or list, `model(**xs)`
            with a dict.
        loss: a criterion of torch, a function of (outputs, targets), a `WindowLoss` or a `TermsLoss`.
        steps: micro-batches in a window, on each rank.
        reduction: "mean" or "sum", as above.
        autocast: the dtype of `torch.autocast` around forward and loss, or None.
        fp32_buffers: accumulate the gradients of bf16 and fp16 parameters in fp32.
        loss_scale: multiplies the loss before each backward; `OptimizerStep` divides the gradient by it.
        reduce_every_micro_batch: for a fully sharded model, reduce-scatter in every micro-batch: more
            communication, but no unsharded gradient is kept between micro-batches.
        local_loss: do not add the other ranks' loss to the result, which saves a collective.
        late_weights: how the weights of terms are counted that depend on the outputs: in a "first_pass"
            without gradients, or by "gradients", a buffer and a backward of every micro-batch for each term.

    Attributes:
        model: the model without its wrapper.
        sync: the synchronisation of the ranks' gradients.
        after_micro_batch: functions called, in order, with a `MicroBatch` right after its backward. They
            may read `.grad`, which is incomplete with fp32 buffers or shards, but must neither change it nor
            wait for the device.
        on_discard: functions called when a window that has begun is discarded and will be repeated.
        under_way: the index of the current micro-batch, or of the last one that ran.

    Raises:
        ValueError: for `steps` below 1, an unknown reduction, or fp32 buffers or norms over the window of a
            fully sharded model.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Any] | WindowLoss | TermsLoss,
        steps: int,
        *,
        reduction: Reduction = "mean",
        autocast: torch.dtype | None = None,
        fp32_buffers: bool = False,
        loss_scale: LossScale | None = None,
        reduce_every_micro_batch: bool = False,
        local_loss: bool = False,
        late_weights: LateWeights = "first_pass",
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps is the number of micro-batches in a window, at least 1, not {steps}")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is 'mean' or 'sum', not {reduction!r}")
        self.sync = sync_of(model, reduce_every_micro_batch)
        if fp32_buffers and self.sync.sharded:
            raise ValueError("fp32_buffers: gradients of a fully sharded model are not there to collect")
        check_norms(self.sync)
        check_late_weights(late_weights, fp32_buffers, self.sync.sharded)
        self.model = self.sync.module
        self.steps = steps
        self.reduction: Reduction = reduction
        self._use_loss(window_loss(loss))
        check_loss_parameters(self.loss, self.sync, loss_scale)
        self.autocast = autocast
        self.loss_scale = loss_scale
        self.local_loss = local_loss
        self.late_weights: LateWeights = late_weights
        self.fp32_buffers = fp32_buffers
        self.after_micro_batch: list[Callable[[MicroBatch], None]] = []
        self.on_discard: list[Callable[[], None]] = []
        self.under_way = 0
        self._objective: Objective | None = None
        self._norms: WindowNorms | None = None
        self._called = False  # whether the loss was called once, and by the kind that it is
        self._compared = False  # whether the two passes of a window were compared once
        self._buffers = Fp32Buffers(model.parameters()) if fp32_buffers else None

    def backward(
        self,
        inputs: Nested | Sequence[tuple[Nested, Nested]],
        targets: Nested | None = None,
        *,
        steps: int | None = None,
        samples: int | None = None,
        weight: float | None = None,
        observe: Observer | None = None,
        agree: Callable[..., bool] | None = None,
    ) -> WindowResult:
        """Forward and backward of every micro-batch; adds gradients to `.grad`. Does not wait for the device.

        Args:
            inputs: the update's whole batch on this rank, (n, ...). Without `targets`: a list of the
                window's micro-batches, pairs (inputs, targets) of any number of samples each, as a loader
                yields them; as many on all ranks. The denominator is counted over all of them first.
            targets: its targets, (n, ...).
            steps: micro-batches of this window, for example the last one of an epoch; the same on all
                ranks. Default: `Window.steps`.
            samples: the first `samples` of the batch count, the others are padding. On several ranks a rank
                without samples passes one sample as padding and `samples=0`.
            weight: the window's total weight over all ranks; it is then not counted. It must be given on
                all ranks or on none. Ignored with `reduction="sum"`, and for a loss of several terms.
            observe: called with each micro-batch's detached outputs and its targets.
            agree: used by `Recovery`: no micro-batch communicates; `agree` is called after the last one, with
                whether this rank did not use some parameter, and returns whether any rank did not. An error
                that it raises ends the window before gradients are reduced. Before a collective of a pass
                without gradients it is called with `more=True`.

        Raises:
            ValueError: if the batch has fewer samples than `steps` (on several ranks: no sample), its
                tensors differ in their first dimension, or it has fewer than `samples`; if a list of
                micro-batches is empty, holds anything but pairs, or comes with `steps` or `samples`.
        """
        if targets is None:
            batch = WindowBatch.of_micro_batches(inputs, steps, samples)
        else:
            steps, empty = self.steps if steps is None else steps, self.sync.ranks.size > 1
            batch = WindowBatch.split(cast(Nested, inputs), targets, steps, samples, empty=empty)
        start = self._start_of_function()
        try:
            return self._with_norms(batch, weight, observe, agree)
        except _ReturnsTerms:
            pass  # which holds the graph of the first micro-batch
        assert start is not None and self._objective is not None
        self._objective.wait()
        if agree is not None:  # of a rank that has failed, the next collective would be another one
            agree(False, more=True)
        start.restore()
        self._use_loss(window_loss(self.loss))
        return self._with_norms(batch, weight, observe, agree)

    def _with_norms(self, batch: WindowBatch, *arguments: Any) -> WindowResult:
        """`_accumulate`, with the statistics of norms over the window fixed before, if the model has them."""
        modules = window_norms(self.model) if len(batch.parts) * self.sync.ranks.size > 1 else []
        self._norms = None
        if not modules:
            return self._accumulate(batch, *arguments)
        if self.late_weights == "gradients":
            raise ValueError("late_weights='gradients': not with norms over the window; take 'first_pass'")
        passes = self.sync, self.forward, self.precision, batch, arguments[-1], not self._compared
        self._norms = WindowNorms(modules, [self.model, self.loss], *passes)
        with self._norms as norms:
            norms.fix_statistics()
            return self._accumulate(batch, *arguments)

    def _accumulate(
        self,
        batch: WindowBatch,
        weight: float | None,
        observe: Observer | None,
        agree: Callable[..., bool] | None,
    ) -> WindowResult:
        by_step = self.reduction == "sum"
        objective = objective_of(self.loss, self.sync, batch, by_step, weight, self.late_weights)
        self._objective = objective
        first_pass = self._first_pass(batch, agree) if objective.passes else None
        if first_pass is not None:
            objective.prepare(first_pass)
            first_pass.rewind()
        if self._norms is not None:
            self._norms.find_sums(self._value_of, self._start_of_backward)
        if self._buffers:
            self._buffers.open()
        # Whether the ranks' gradients are added after the last backward, and not in it.
        after = agree is not None or self.late_weights == "gradients"
        if after and agree is None:
            self.sync.begin_without_sync()
        if after or self._buffers:
            self.sync.watch_use()
        steps = len(batch.parts)
        done: MicroBatch | None = None
        self.under_way = 0
        for k, (inputs_k, targets_k) in enumerate(batch):
            last = k == steps - 1
            with self.sync.micro_batch(last and not self._buffers and not after):
                with self.precision():
                    outputs = self.forward(k, inputs_k)
                    value, share = self._value_of(k, outputs, targets_k)
                start = self._start_of_backward(share) if batch.sizes[k] else torch.zeros_like(share)
                objective.backward(value, start)
            if self.after_micro_batch:
                done = MicroBatch(k, last, batch.sizes[k], targets_k, share)
                if not last or not after:
                    self._notify(done)
            if first_pass is not None:
                first_pass.repeated(k, outputs)
            if batch.sizes[k]:
                objective.add(value.detach())
                if observe is not None:
                    observe(outputs.detach() if isinstance(outputs, Tensor) else outputs, targets_k)
            # Freed before the next forward: a language model's outputs are its peak memory.
            del outputs, value
        objective.add_last(agree)
        if after:
            unused = not self._buffers and bool(self.sync.unused())
            some_unused = unused if agree is None else agree(unused)
            if not self._buffers:
                self.sync.reduce_gradients(some_unused)
            if done is not None:
                self._notify(done)
        if self._buffers:
            self._buffers.close(self.sync)
        if first_pass is not None:
            first_pass.end()
        if self._norms is not None:
            self._norms.update_running_statistics()
        self._compared = self._compared or first_pass is not None or self._norms is not None
        mean, terms = objective.mean(), dict(objective.terms())
        if not self.local_loss:
            for part in (mean, *terms.values()):
                self.sync.ranks.sum(part)
        return WindowResult(mean, objective.weight, sum(batch.sizes), steps, terms)

    def forward(self, k: int, inputs: Nested) -> Any:
        """The model's outputs for the inputs of micro-batch `k`."""
        self.under_way = k
        if self._norms is not None:
            self._norms.begin(k)
        return call(self.sync.forward, inputs)

    def _value_of(self, k: int, outputs: Any, targets: Nested) -> tuple[Tensor, Tensor]:
        """As `Objective.value_and_share`, of the window that computes."""
        assert self._objective is not None
        value = self._objective.value_and_share(k, outputs, targets)
        if getattr(self.loss, "returns_terms", False):
            raise _ReturnsTerms
        self._called = True
        return value

    def _first_pass(self, batch: WindowBatch, agree: Callable[..., bool] | None) -> FirstPass:
        parts = [self.model, self.loss]
        compare = not self._compared
        return FirstPass(self.forward, self.precision, self.sync, parts, batch, agree, compare)

    def precision(self) -> AbstractContextManager[Any]:
        """The context of the forward pass and the loss: autocast, or nothing."""
        if self.autocast is None:
            return NOTHING
        return torch.autocast(next(self.model.parameters()).device.type, self.autocast)

    @property
    def passes(self) -> int:
        """Forward passes of a micro-batch in a window: 1, or 2 where the first is without gradients."""
        return passes_of(self.loss, self.late_weights)

    def _start_of_function(self) -> ForwardState | None:
        """The state before the first window of a loss that may turn out to return terms by name."""
        if self._called or type(self.loss) is not MeanOverSamples:
            return None
        state = ForwardState([self.model, self.loss], next(self.model.parameters()).device)
        state.save()
        return state

    def _use_loss(self, loss: WindowLoss) -> None:
        if has_terms(loss) and self.reduction == "sum":
            raise ValueError("reduction='sum' adds micro-batch means, and a loss of several terms has none")
        self.loss = loss

    def discard(self) -> None:
        """Ends a window that has failed on this rank or another. Gradients are not changed."""
        if self._objective is not None:
            self._objective.wait()
        if self._buffers:
            self._buffers.drop()
        for discard in self.on_discard:
            discard()

    def _notify(self, micro_batch: MicroBatch) -> None:
        for after in self.after_micro_batch:
            after(micro_batch)

    def _start_of_backward(self, share: Tensor) -> Tensor:
        """The gradient that backward starts from: the share, times the loss scale and the ranks' factor."""
        if self.loss_scale is not None:
            share = (share * self.loss_scale.scale).to(share.dtype)
        return share if self.sync.factor == 1 else share * self.sync.factor


class _ReturnsTerms(Exception):
    """A loss that was taken as a mean over samples returned terms by name."""
