"""Watches one run of somebody else's training loop: the model that it trains, and any optimizer of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .audit_records import AuditError, FitRecord, MicroBatch, Update
from .audit_rerun import (
    ModelDraws,
    Rounding,
    Starts,
    load_optimizer_state,
    load_start,
    loss_gradient,
    optimizer_state,
)
from .audit_samples import sample_keys
from .compilation import outside_graphs
from .fixed_draws import SDPBackend, sdpa_kernel
from .larger_batch import Gradient
from .module_tracker import in_backward
from .nested import cloned


class Watch:
    """What `audit` gives to a loop: `model = watch(model)` makes a model observable and returns it.

    It adds hooks and nothing else, so that a trainer receives an ordinary module.

    Attributes:
        dtype: in which the loop should train.
        record: of the run so far.
        model: the one that is trained, once it is known.
        calls: its forward passes with gradients.
        foreign_steps: of optimizers that hold none of its parameters.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        limit: int,
        seed: int,
        starts: Starts | None = None,
        fix_draws: bool = False,
        rounding: Rounding | None = None,
        own_loss: Callable[..., Any] | None = None,
    ) -> None:
        self.dtype = dtype
        self.record = FitRecord()
        self.calls = 0
        self.foreign_steps = 0
        self._limit = limit
        self._seed = seed
        self._starts = starts
        self._rounding = rounding
        self._own_loss = own_loss
        self._fix_draws = fix_draws
        self._draws: ModelDraws | None = None
        self.model: nn.Module | None = None
        self._names: dict[int, str] = {}
        self._open: Update | None = None
        self._stepped: Counter[int] = Counter()
        self._random_state: Tensor | None = None
        self._targets: list[Any] = []
        self._paused = False
        self._hooks = ExitStack()

    def __call__(self, model: nn.Module) -> nn.Module:
        if self.model is not None and model is not self.model:
            raise AuditError("watch(model) was called for a second model: watch the one that is trained")
        if self.model is None:
            self.model = model
            if self._fix_draws:
                self._draws = ModelDraws(model, self._seed)
                self._hooks.enter_context(self._draws.modules.hooks)
                self._hooks.enter_context(sdpa_kernel([SDPBackend.MATH]))
                self._hooks.enter_context(self._draws)
            before, after = self._observers()
            handle = model.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
            self._hooks.enter_context(handle)
            self._hooks.enter_context(model.register_forward_hook(after, with_kwargs=True))
        return model

    def loss(self, value: float) -> None:
        """Takes the loss that the loop logs for its newest update."""
        update = self._open or (self.record.updates[-1] if self.record.updates else None)
        if update is not None:
            update.loss = float(value)

    def targets(self, targets: Any) -> None:
        """Takes the targets of the next forward pass, for the `loss` that is given to `audit`."""
        self._targets.append(cloned(targets))

    def _observers(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The model's hooks. Functions: a copy of the model has the same ones."""

        def before_forward(module: nn.Module, arguments: Any, keywords: Any) -> Any:
            if not self.calls and not self._ignored():
                self.model = module  # a trainer may train a copy of the model that was given
            if module is not self.model or self._ignored():
                return None
            return self._before_forward(module, arguments, keywords)

        def after_forward(module: nn.Module, arguments: Any, keywords: Any, outputs: Any) -> Any:
            if module is not self.model or self._ignored():
                return None
            return self._after_forward(outputs)

        return outside_graphs(before_forward), outside_graphs(after_forward)

    def _ignored(self) -> bool:
        """Whether a forward pass is none of training: an evaluation, or a checkpoint's second one."""
        return self._paused or not torch.is_grad_enabled() or in_backward()

    def _before_forward(self, module: nn.Module, arguments: Any, keywords: Any) -> Any:
        self.calls += 1
        samples = sample_keys([arguments, keywords])
        if self._open is None or self._stepped:
            self._begin_update(module, samples)
        assert self._open is not None
        newest = self._open.micro_batches[-1] if self._open.micro_batches else None
        if newest is not None and not newest.gradient and self._stores:
            newest.samples.extend(samples)
        else:
            self._open.micro_batches.append(MicroBatch(samples))
        if self._own_loss is not None and self._stores:
            self._open.forward_inputs.append(cloned((arguments, keywords)))
        self._random_state = torch.get_rng_state()
        if self._rounding is not None:
            return self._rounding.inputs(arguments, keywords)
        return None

    def _after_forward(self, outputs: Any) -> Any:
        if self._random_state is not None:
            if not torch.equal(torch.get_rng_state(), self._random_state):
                self.record.draws = True
            if self._draws is not None:  # so that the loop's own draws do not depend on the micro-batches
                torch.set_rng_state(self._random_state)
        return None if self._rounding is None else self._rounding.outputs(outputs)

    @property
    def _stores(self) -> bool:
        return len(self.record.updates) < self._limit

    def _begin_update(self, module: nn.Module, samples: list[int]) -> None:
        self._close()
        self._open = update = Update()
        self._observe_parameters(module)
        if not self._stores:
            return
        if self._starts is not None:
            update.source = self._starts.find(samples)
            if update.source is not None:
                load_start(module, self._starts.updates[update.source].first)
        update.before = _tensors(module)
        for name, parameter in module.named_parameters():
            if parameter.grad is not None and bool(_dense(parameter.grad).any()):
                update.carried[name] = _dense(parameter.grad).double()

    def _observe_parameters(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            if id(parameter) not in self._names:
                self._names[id(parameter)] = name
                if parameter.requires_grad:
                    self._hooks.enter_context(parameter.register_hook(partial(self._delivered, name)))
        for name, child in module.named_modules():
            if isinstance(child, _BatchNorm) and child.training:
                self.record.normalised[name or "(model)"] = type(child).__name__
        self.record.model = type(module).__name__
        self.record.parameters = sum(p.numel() for p in module.parameters())

    def _delivered(self, name: str, gradient: Tensor) -> Tensor | None:
        if self._paused:
            return None
        factor = 1.0 if self._rounding is None else self._rounding.factor
        if factor != 1.0:
            gradient = gradient / factor
        if self._open is not None and self._open.micro_batches:
            self.record.dtypes.add(str(gradient.dtype).removeprefix("torch."))
            delivered = self._open.micro_batches[-1].gradient
            value = _dense(gradient).double() if self._stores else torch.zeros(())
            delivered[name] = delivered[name] + value if name in delivered else value
        return gradient if factor != 1.0 else None

    def before_step(self, optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> Any:
        """An optimizer's pre-hook: records at once, or after the closure, in which some loops compute."""
        itself, *rest = arguments
        closure = rest[0] if rest else keywords.get("closure")
        if closure is None:
            self._record_step(optimizer)
            return None

        def observed() -> Any:
            value = closure()
            self._record_step(optimizer)
            return value

        if rest:
            return (itself, observed, *rest[1:]), keywords
        return arguments, {**keywords, "closure": observed}

    def _trains(self, optimizer: torch.optim.Optimizer) -> bool:
        if any(id(p) in self._names for group in optimizer.param_groups for p in group["params"]):
            return True
        self.foreign_steps += 1
        return False

    def _record_step(self, optimizer: torch.optim.Optimizer) -> None:
        update = self._open
        if not self._trains(optimizer) or update is None:
            return
        update.skipped = bool(getattr(optimizer, "found_inf", False))
        first = not self._stepped[id(optimizer)]
        self._stepped[id(optimizer)] += 1
        update.steps = max(self._stepped.values())
        if not self._stores or not first:
            return
        scale = float(getattr(optimizer, "grad_scale", None) or 1.0)
        for group in optimizer.param_groups:
            names = [self._names[id(p)] for p in group["params"] if id(p) in self._names]
            update.groups.append(names)
            update.rates.append(float(group["lr"]))
            for p in group["params"]:
                if p.grad is not None and id(p) in self._names:
                    update.gradient[self._names[id(p)]] = _dense(p.grad).double() / scale
        update.optimizer_state.update(optimizer_state(optimizer, self._names))
        if self._starts is not None and update.source is not None:
            load_optimizer_state(optimizer, self._starts.updates[update.source].first, self._names)
        if self._own_loss is not None and update.own_loss_gradient is None:
            update.own_loss_gradient = self._own_gradient(update)

    def after_step(self, optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
        """An optimizer's post-hook."""
        if self._open is not None and self._stepped and self._stores and self.model is not None:
            self._open.after = _tensors(self.model)

    def skipped_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes note that a loss scaler has left out a step."""
        if self._open is not None and self._trains(optimizer) and not self._stepped:
            self._open.skipped = True
            self._stepped[id(optimizer)] += 1

    def clipping(self, parameters: list[Tensor]) -> None:
        """Takes note of the gradients of `parameters`, which are about to be clipped."""
        gradients = {self._names[id(p)]: p.grad for p in parameters if id(p) in self._names}
        update = self._open
        if not gradients or update is None or self._stepped or not self._stores:
            return
        count = len(update.micro_batches)
        if update.before_clipping is None or update.clipped_after[-1] != count:
            update.before_clipping = {}
        update.clipped_after.append(count)
        for name, gradient in gradients.items():
            if gradient is not None:
                update.before_clipping.setdefault(name, _dense(gradient).double())

    def _own_gradient(self, update: Update) -> Gradient:
        assert self._own_loss is not None and self.model is not None
        arguments, keywords = update.forward_inputs[0]
        targets = self._targets[-1] if self._targets else None
        self._paused = True
        try:
            return loss_gradient(self.model, self._own_loss, arguments, keywords, targets)
        finally:
            self._paused = False

    def _close(self) -> None:
        if self._open is not None:
            if self._stepped:
                self.record.updates.append(self._open)
            else:
                self.record.rest = self._open.micro_batches
        self._open = None
        self._stepped.clear()

    def finish(self) -> FitRecord:
        """The record, once the loop has ended; removes all hooks."""
        self._hooks.close()
        self._close()
        if self._draws is not None:
            self.record.drawing = self._draws.operators
            self.record.unfixed = self._draws.unfixed
        return self.record


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def _dense(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_dense() if tensor.is_sparse else tensor.clone()
