"""The windows of several replicas as one: models of one architecture, each with its own weights and batch.

The parameters are stacked, as by `torch.func.stack_module_state`, and a micro-batch of all replicas is one
forward and loss under `torch.func.vmap` and one backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils import _pytree as pytree

from .batch import Nested, batch_size, map_tensors, split, split_sizes
from .buffers import LOW_PRECISION
from .denominators import reciprocal_of
from .loss import ClassIndexLoss, MeanOverSamples, SumOverSamples, WindowLoss
from .terms import has_terms
from .window import MicroBatch, Observer, Window, WindowResult
from .window_norm import window_norms


class ReplicaWindow:
    """The windows of R replicas, accumulated at once.

    The models' parameters, buffers and gradients become views into stacks whose first dimension is the
    replica. Each model can still be evaluated, saved and stepped by itself.

    Args:
        windows: on one process, over models that differ only in the values of their parameters and buffers.

    Attributes:
        parameters: the stacked parameters, (R, ...) each, in the order of the models' own, tied ones once.
            A parameter that the last window did not reach has `.grad` None.
        buffers: the stacked buffers, (R, ...) each, by name.

    Raises:
        ValueError: for models with norms over the window.
    """

    def __init__(self, windows: Sequence[Window]) -> None:
        if any(window_norms(window.model) for window in windows):
            raise ValueError("norms over the window make passes of one model, not of several at once")
        self.windows = list(windows)
        self.parameters: list[Tensor] = []
        self._names: list[str] = []
        self._tied = False
        # For each parameter: the replicas' own, the stacked gradient, its views, and the sum that is
        # accumulated, in fp32 if asked for and else the gradient itself.
        self._of_replicas: list[list[nn.Parameter]] = []
        self._gradients: list[Tensor] = []
        self._views: list[list[Tensor]] = []
        self._sums: list[Tensor] = []
        self.buffers: dict[str, Tensor] = {}
        self._reached: set[int] = set()  # indices of the parameters with a gradient in this window
        self._stack()

    def stacks(self) -> dict[nn.Parameter, Tensor]:
        """The stack of each of the first replica's parameters."""
        return {members[0]: stack for members, stack in zip(self._of_replicas, self.parameters, strict=True)}

    def keep(self, which: Sequence[int]) -> None:
        """Keeps only the replicas `which`; the models of the others are copied out of the stacks."""
        for r in set(range(len(self.windows))) - set(which):
            _unstack(self.windows[r].model)
        self.windows = [self.windows[r] for r in which]
        if self.windows:
            self._stack()

    @torch.no_grad()
    def _stack(self) -> None:
        models = [window.model for window in self.windows]
        named = [dict(model.named_parameters()) for model in models]
        self._names = list(named[0])
        self._tied = _has_ties(models[0])
        self._of_replicas = [[each[name] for each in named] for name in self._names]
        self.parameters = []
        for members in self._of_replicas:
            stack = torch.stack([p.detach() for p in members])
            for parameter, part in zip(members, stack.unbind(), strict=True):
                parameter.data, parameter.grad = part, None
            self.parameters.append(stack.requires_grad_(members[0].requires_grad))
        self._gradients = [torch.zeros_like(stack) for stack in self.parameters]
        self._views = [list(gradient.unbind()) for gradient in self._gradients]
        self._sums = [
            gradient.float() if self.windows[0].fp32_buffers and gradient.dtype in LOW_PRECISION else gradient
            for gradient in self._gradients
        ]
        self.buffers = {}
        buffers = [dict(model.named_buffers()) for model in models]
        for name in buffers[0]:
            self.buffers[name] = stack = torch.stack([each[name] for each in buffers])
            for each, part in zip(buffers, stack.unbind(), strict=True):
                each[name].data = part

    def backward(
        self, inputs: Nested, targets: Nested, *, steps: int, observe: Sequence[Observer | None] = ()
    ) -> list[WindowResult]:
        """Forward and backward of every micro-batch of all replicas; replaces earlier gradients.

        Returns each replica's result. Does not wait for the device.

        Args:
            inputs: the replicas' batches of the update, (R, n, ...).
            targets: their targets, (R, n, ...).
            steps: micro-batches in the window.
            observe: for each replica None, or a function called with each micro-batch's detached outputs
                and its targets.

        Raises:
            ValueError: for a loss of several terms or one that couples samples; if the batches have fewer
                samples than `steps`, or a parameter is frozen in some but not all replicas.
        """
        first = self.windows[0]
        if has_terms(first.loss):
            raise ValueError("a loss of several terms or one that couples samples is not stacked")
        self._update_frozen()
        samples = batch_size(_replica((inputs, targets), 0))
        sizes = split_sizes(samples, steps)
        parts = list(zip(split(inputs, sizes, dim=1), split(targets, sizes, dim=1), strict=True))
        by_step = first.reduction == "sum"
        weights = [_weights(first, part) for part in ([t for _, t in parts] if by_step else [targets])]
        share: Tensor | None = None  # 1 / weight of each replica, (R,)
        total: Tensor | None = None
        self._reached = set()
        for k, (inputs_k, targets_k) in enumerate(parts):
            with first.precision():
                outputs, loss_sum = self._forward(inputs_k, targets_k)
            if share is None or by_step:
                share = reciprocal_of(weights[k if by_step else 0], loss_sum).expand_as(loss_sum)
            trained = [p for p in self.parameters if p.requires_grad]
            self._add(
                torch.autograd.grad(loss_sum, trained, self._start_of_backward(share), allow_unused=True)
            )
            detached = loss_sum.detach()
            total = detached if total is None else total + detached
            self._notify(MicroBatch(k, k == steps - 1, sizes[k], targets_k, share), outputs, observe)
            # Freed before the next forward, as in Window.
            del outputs, loss_sum
        self._close()
        assert share is not None and total is not None
        counts = getattr(first.loss, "counts", True)
        weight = sum(weights[1:], weights[0]) if counts else weights[0]
        mean = total * (reciprocal_of(weight, total) if by_step else share)
        each = weight.unbind() if isinstance(weight, Tensor) else [weight] * len(mean)
        return [WindowResult(m, w, samples, steps) for m, w in zip(mean.unbind(), each, strict=True)]

    def _update_frozen(self) -> None:
        """Copies `requires_grad` from the replicas, where callbacks may change it between windows."""
        for name, stack, members in zip(self._names, self.parameters, self._of_replicas, strict=True):
            trained = {parameter.requires_grad for parameter in members}
            if len(trained) > 1:
                raise ValueError(f"{name} is frozen in some replicas and not in others: they cannot be one")
            stack.requires_grad_(trained.pop())

    def _forward(self, inputs: Nested, targets: Nested) -> tuple[Any, Tensor]:
        """The outputs, (R, n, ...), and summed losses, (R,), of all replicas."""
        first = self.windows[0]
        parameters = dict(zip(self._names, self.parameters, strict=True))

        def one(parameters: Any, buffers: Any, inputs: Nested) -> Any:
            keywords = dict(inputs) if isinstance(inputs, Mapping) else {}
            arguments = () if keywords else (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
            state = (parameters, buffers)
            return functional_call(first.model, state, arguments, keywords, tie_weights=self._tied)

        outputs = vmap(one)(parameters, self.buffers, inputs)
        return outputs, _totals(first.loss, outputs, targets)

    def _start_of_backward(self, share: Tensor) -> Tensor:
        """The gradient that backward starts from, (R,): each replica's share, times its loss scale."""
        if self.windows[0].loss_scale is None:
            return share
        scales = [window.loss_scale.scale for window in self.windows if window.loss_scale is not None]
        return (share * torch.stack(scales)).to(share.dtype)

    @torch.no_grad()
    def _add(self, gradients: Sequence[Tensor | None]) -> None:
        """Accumulates a micro-batch's gradients, one for each trained parameter."""
        trained = [k for k, p in enumerate(self.parameters) if p.requires_grad]
        new = {k: g for k, g in zip(trained, gradients, strict=True) if g is not None}
        first = [k for k in new if k not in self._reached]
        later = [k for k in new if k in self._reached]
        if first:
            torch._foreach_copy_([self._sums[k] for k in first], [new[k] for k in first])  # pyright: ignore[reportPrivateImportUsage]
        if later:
            wide = [new[k].to(self._sums[k].dtype) for k in later]
            torch._foreach_add_([self._sums[k] for k in later], wide)  # pyright: ignore[reportPrivateImportUsage]
        self._reached.update(first)
        for k in first:
            self.parameters[k].grad = self._gradients[k]
            for parameter, view in zip(self._of_replicas[k], self._views[k], strict=True):
                if parameter.grad is not view:  # in the first window, or if replaced since
                    parameter.grad = view

    def _close(self) -> None:
        for k, (gradient, total) in enumerate(zip(self._gradients, self._sums, strict=True)):
            if k not in self._reached:  # None, so that optimizers skip the parameter
                for parameter in (self.parameters[k], *self._of_replicas[k]):
                    parameter.grad = None
            elif total is not gradient:
                gradient.copy_(total)

    def _notify(self, micro: MicroBatch, outputs: Any, observe: Sequence[Observer | None]) -> None:
        """Calls each replica's `after_micro_batch` functions and observer."""
        for r, window in enumerate(self.windows):
            observer = observe[r] if observe else None
            if not window.after_micro_batch and observer is None:
                continue
            targets = _replica(micro.targets, r)
            for after in window.after_micro_batch:
                after(replace(micro, targets=targets, share=micro.share[r]))
            if observer is not None:
                observer(pytree.tree_map(lambda t, r=r: t[r].detach(), outputs), targets)


def _totals(loss: WindowLoss, outputs: Any, targets: Any) -> Tensor:
    """The summed losses of each replica, (R,)."""
    if type(loss) is not ClassIndexLoss or not isinstance(outputs, Tensor):
        return vmap(loss.total)(outputs, targets)
    # The same with fewer operations: vmap decomposes torch's cross entropy.
    losses = loss.losses(outputs.flatten(0, 1), targets.flatten(0, 1), "none")
    return losses.view(len(outputs), -1).sum(1)


def _weights(window: Window, targets: Any) -> Tensor | float:
    """The weight of each replica's `targets`, (R,), or a number if it is the same for all."""
    loss = window.loss
    if type(loss) in (MeanOverSamples, SumOverSamples):
        return loss.weight(_replica(targets, 0))
    if type(loss) is ClassIndexLoss and not targets.is_floating_point() and loss.criterion.weight is None:
        return (targets != loss.criterion.ignore_index).flatten(1).sum(1)
    numbers: list[float] = []

    def weigh(targets: Nested) -> Tensor:
        weight = loss.weight(targets)
        if isinstance(weight, Tensor):
            return weight
        numbers.append(weight)  # a number cannot depend on the targets' values, so all replicas share it
        return torch.zeros(())

    weights = vmap(weigh)(targets)
    return numbers[0] if numbers else weights


def _replica(batch: Nested, replica: int) -> Nested:
    return map_tensors(lambda t: t[replica], batch)


def _has_ties(model: nn.Module) -> bool:
    """Whether a parameter or buffer has several names, which `functional_call` handles slowly."""
    names = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return len(names) > len({id(tensor) for _, tensor in names})


@torch.no_grad()
def _unstack(model: nn.Module) -> None:
    """Copies a model's tensors out of the stacks."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
        if tensor.grad is not None:
            tensor.grad = tensor.grad.clone()
