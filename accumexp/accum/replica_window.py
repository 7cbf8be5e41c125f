"""Many windows as one: equal models with weights of their own, each on a batch of its own, at once.

R models of one shape are one function of R stacked parameters (`torch.func.stack_module_state`), and a
micro-batch of all of them is one `torch.func.vmap`ped forward and loss and one backward. What a window does
(its weight, its split, its shares) is done for each of the models alone, so that each gets the gradient that
it would have had by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils import _pytree as pytree

from .batch import Nested, batch_size, map_tensors, split_sizes
from .buffers import LOW_PRECISION
from .loss import ClassIndexLoss, MeanOverSamples, SumOverSamples, WindowLoss
from .weights import share_of
from .window import MicroBatch, Observer, Window, WindowResult


class ReplicaWindow:
    """The windows of R replicas, accumulated together.

    The models' parameters and buffers become views into stacks whose first dimension is the replica, and
    their gradients views into the stacks' gradients. Each model stays what it was: it can be evaluated,
    saved and stepped alone.

    Args:
        windows: over models that differ in the values of their parameters and buffers alone, on one process.

    Attributes:
        parameters: the stacked parameters, (R, ...) each, in the order of the models' own, tied ones once.
            What the last window added nothing to has `.grad` None.
    """

    def __init__(self, windows: Sequence[Window]) -> None:
        self.windows = list(windows)
        self.parameters: list[Tensor] = []
        self._names: list[str] = []
        self._tied = False
        self._gradients: list[Tensor] = []
        self._parts: list[list[Tensor]] = []
        self._sums: list[Tensor] = []
        self._own: list[list[nn.Parameter]] = []
        self._buffers: dict[str, Tensor] = {}
        self._seen: set[int] = set()  # the parameters that this window's micro-batches have reached
        self._stack()

    @property
    def buffers(self) -> list[Tensor]:
        """The stacked buffers, (R, ...) each."""
        return list(self._buffers.values())

    def stacks(self) -> dict[nn.Parameter, Tensor]:
        """The stack that each of the first replica's parameters is in."""
        return {own[0]: stack for own, stack in zip(self._own, self.parameters, strict=True)}

    def keep(self, which: Sequence[int]) -> None:
        """Goes on with the replicas `which` alone; the models of the others get memory of their own."""
        for r in set(range(len(self.windows))) - set(which):
            _leave(self.windows[r].model)
        self.windows = [self.windows[r] for r in which]
        if self.windows:
            self._stack()

    @torch.no_grad()
    def _stack(self) -> None:
        models = [window.model for window in self.windows]
        named = [dict(model.named_parameters()) for model in models]
        self._names = list(named[0])
        self._tied = _ties(models[0])
        self._own = [[each[name] for each in named] for name in self._names]
        self.parameters, self._gradients, self._parts = [], [], []
        for own in self._own:
            stack = torch.stack([p.detach() for p in own])
            gradient = torch.zeros_like(stack)
            for r, parameter in enumerate(own):
                parameter.data, parameter.grad = stack[r], None
            self.parameters.append(stack.requires_grad_(own[0].requires_grad))
            self._gradients.append(gradient)
            self._parts.append(list(gradient.unbind()))
        self._sums = [
            gradient.float() if self.windows[0].fp32_buffers and gradient.dtype in LOW_PRECISION else gradient
            for gradient in self._gradients
        ]
        self._buffers = {}
        every = [dict(model.named_buffers()) for model in models]
        for name in every[0]:
            self._buffers[name] = stack = torch.stack([each[name] for each in every])
            for r, each in enumerate(every):
                each[name].data = stack[r]

    def backward(
        self, inputs: Nested, targets: Nested, *, steps: int, observe: Sequence[Observer | None] = ()
    ) -> list[WindowResult]:
        """Forward and backward of every micro-batch of all replicas; gradients replace those of before.

        Nothing here waits for the device.

        Args:
            inputs: the replicas' batches of the update, (R, n, ...).
            targets: their targets, (R, n, ...).
            steps: micro-batches in the window.
            observe: for each replica None, or what is called with each micro-batch's detached outputs and
                its targets.

        Returns:
            Of each replica what its window did.

        Raises:
            ValueError: if the batches have fewer samples than `steps`, or a parameter is frozen in some of
                the replicas alone.
        """
        first = self.windows[0]
        self._freeze()
        samples = batch_size(_of((inputs, targets), 0))
        sizes = split_sizes(samples, steps)
        parts = list(zip(_split(inputs, sizes), _split(targets, sizes), strict=True))
        by_step = first.reduction == "sum"
        weights = [_weights(first, part) for part in ([t for _, t in parts] if by_step else [targets])]
        share: Tensor | None = None  # of an item in each replica's loss, (R,)
        total: Tensor | None = None
        self._seen = set()
        for k, (inputs_k, targets_k) in enumerate(parts):
            with first._precision():
                outputs, loss_sum = self._forward(inputs_k, targets_k)
            if share is None or by_step:
                share = share_of(weights[k if by_step else 0], loss_sum).expand_as(loss_sum)
            learning = [p for p in self.parameters if p.requires_grad]
            self._add(torch.autograd.grad(loss_sum, learning, self._seed(share), allow_unused=True))
            detached = loss_sum.detach()
            total = detached if total is None else total + detached
            self._tell(MicroBatch(k, k == steps - 1, sizes[k], targets_k, share), outputs, observe)
            # Outputs must not live through the next forward, as in a window of one.
            del outputs, loss_sum
        self._close()
        assert share is not None and total is not None
        counts = getattr(first.loss, "counts", True)
        weight = sum(weights[1:], weights[0]) if counts else weights[0]
        mean = total * (share_of(weight, total) if by_step else share)
        each = weight.unbind() if isinstance(weight, Tensor) else [weight] * len(mean)
        return [WindowResult(m, w, samples, steps) for m, w in zip(mean.unbind(), each, strict=True)]

    def _freeze(self) -> None:
        """Takes over which parameters learn: callbacks may change it between windows."""
        for name, stack, own in zip(self._names, self.parameters, self._own, strict=True):
            learns = {parameter.requires_grad for parameter in own}
            if len(learns) > 1:
                raise ValueError(f"{name} is frozen in some replicas and not in others: they cannot be one")
            stack.requires_grad_(learns.pop())

    def _forward(self, inputs: Nested, targets: Nested) -> tuple[Any, Tensor]:
        """Outputs and summed losses of all replicas, (R, ...) and (R,)."""
        first = self.windows[0]
        parameters = dict(zip(self._names, self.parameters, strict=True))

        def one(parameters: Any, buffers: Any, inputs: Nested) -> Any:
            return _called(first.model, (parameters, buffers), inputs, self._tied)

        outputs = vmap(one)(parameters, self._buffers, inputs)
        return outputs, _totals(first.loss, outputs, targets)

    def _seed(self, share: Tensor) -> Tensor:
        """What autograd starts from, (R,): each replica's share, times its loss scale."""
        if self.windows[0].loss_scale is None:
            return share
        scales = [window.loss_scale.scale for window in self.windows if window.loss_scale is not None]
        return (share * torch.stack(scales)).to(share.dtype)

    @torch.no_grad()
    def _add(self, found: Sequence[Tensor | None]) -> None:
        """Adds a micro-batch's gradients; `found` has one for each parameter that learns."""
        learning = [k for k, p in enumerate(self.parameters) if p.requires_grad]
        new = {k: g for k, g in zip(learning, found, strict=True) if g is not None}
        first = [k for k in new if k not in self._seen]
        later = [k for k in new if k in self._seen]
        if first:
            torch._foreach_copy_([self._sums[k] for k in first], [new[k] for k in first])  # pyright: ignore[reportPrivateImportUsage]
        if later:
            wide = [new[k].to(self._sums[k].dtype) for k in later]
            torch._foreach_add_([self._sums[k] for k in later], wide)  # pyright: ignore[reportPrivateImportUsage]
        self._seen.update(first)
        for k in first:
            self._show(k)

    def _show(self, k: int) -> None:
        """Makes the gradient of parameter `k` seen, in the stack and by every replica."""
        self.parameters[k].grad = self._gradients[k]
        for parameter, part in zip(self._own[k], self._parts[k], strict=True):
            if parameter.grad is not part:  # as in the first window, or after other hands have been at it
                parameter.grad = part

    def _close(self) -> None:
        for k, (gradient, total) in enumerate(zip(self._gradients, self._sums, strict=True)):
            if k not in self._seen:  # as after set_to_none, an optimizer leaves it out
                for parameter in (self.parameters[k], *self._own[k]):
                    parameter.grad = None
            elif total is not gradient:
                gradient.copy_(total)

    def _tell(self, micro: MicroBatch, outputs: Any, observe: Sequence[Observer | None]) -> None:
        """Tells those who look at a replica's micro-batch or at its outputs."""
        for r, window in enumerate(self.windows):
            look = observe[r] if observe else None
            if not window.after_micro_batch and look is None:
                continue
            targets = _of(micro.targets, r)
            for after in window.after_micro_batch:
                after(replace(micro, targets=targets, share=micro.share[r]))
            if look is not None:
                look(pytree.tree_map(lambda t, r=r: t[r].detach(), outputs), targets)


def _totals(loss: WindowLoss, outputs: Any, targets: Any) -> Tensor:
    """The summed losses of each replica, (R,)."""
    if type(loss) is not ClassIndexLoss or not isinstance(outputs, Tensor):
        return vmap(loss.total)(outputs, targets)
    # The same, without the dozen small operations that vmap makes of torch's own.
    losses = loss.losses(outputs.flatten(0, 1), targets.flatten(0, 1), "none")
    return losses.view(len(outputs), -1).sum(1)


def _weights(window: Window, targets: Any) -> Tensor | float:
    """What each replica's `targets` weigh, (R,), or the number that they all do."""
    loss = window.loss
    if type(loss) in (MeanOverSamples, SumOverSamples):
        return loss.weight(_of(targets, 0))
    if type(loss) is ClassIndexLoss and not targets.is_floating_point() and loss.criterion.weight is None:
        return (targets != loss.criterion.ignore_index).flatten(1).sum(1)
    numbers: list[float] = []

    def weigh(targets: Nested) -> Tensor:
        weight = loss.weight(targets)
        if isinstance(weight, Tensor):
            return weight
        numbers.append(weight)  # known without a look at the targets, so it is everyone's
        return torch.zeros(())

    found = vmap(weigh)(targets)
    return numbers[0] if numbers else found


def _called(model: nn.Module, state: Any, inputs: Nested, tied: bool) -> Any:
    """`call` with other parameters and buffers."""
    if isinstance(inputs, Mapping):
        return functional_call(model, state, (), dict(inputs), tie_weights=tied)
    given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    return functional_call(model, state, given, tie_weights=tied)


def _split(batch: Nested, sizes: list[int]) -> list[Nested]:
    """`batch`, (R, n, ...), cut along its second dimension."""
    ends = list(accumulate(sizes))
    return [
        map_tensors(lambda t, end=end, size=size: t[:, end - size : end], batch)
        for end, size in zip(ends, sizes, strict=True)
    ]


def _of(batch: Nested, replica: int) -> Nested:
    return map_tensors(lambda t: t[replica], batch)


def _ties(model: nn.Module) -> bool:
    """Whether a parameter or buffer has several names, which takes a walk through the modules to respect."""
    names = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return len(names) > len({id(tensor) for _, tensor in names})


@torch.no_grad()
def _leave(model: nn.Module) -> None:
    """Gives a model that was part of a stack memory of its own."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
        if tensor.grad is not None:
            tensor.grad = tensor.grad.clone()
