"""What happens between the window's backward and the next window, once: unscale, clip, step or skip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from .window import Window


@dataclass(frozen=True)
class StepResult:
    """What a step did; tensors stay on the device.

    Attributes:
        norm: the gradient's 2-norm before clipping, unscaled, shape (), or None if nobody asked.
        overflow: whether the window was skipped, bool of shape (), or None without a loss scale.
    """

    norm: Tensor | None
    overflow: Tensor | None


NOTHING_SAID = StepResult(None, None)


class OptimizerStep:
    """Steps `optimizer` on the gradient that `window` accumulated.

    With a loss scale the gradient is first divided by it; a window in which any micro-batch on any rank
    overflowed changes neither weights nor optimizer, and the scale moves once. A fused optimizer is told
    on the device to skip. Any other is skipped by the host, which waits for the device once an update.

    Args:
        clip_norm: the 2-norm that the update's gradient is clipped to, or None.
    """

    def __init__(self, window: Window, optimizer: Optimizer, clip_norm: float | None = None) -> None:
        self.window = window
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        # The state in which every parameter has its momentum, and how many there were.
        self._complete: Any = None
        self._count = 0

    def __call__(self, want_norm: bool = False) -> StepResult:
        sync, scale = self.window.sync, self.window.loss_scale
        self._give_momentum()
        if scale is None and self.clip_norm is None and not want_norm:
            self.optimizer.step()
            return NOTHING_SAID
        overflow = None if scale is None else sync.overflow()
        unscale = None if scale is None else scale.scale.double().reciprocal()
        norm = sync.norm() if want_norm or self.clip_norm is not None else None
        if norm is not None and unscale is not None:
            norm = norm * unscale
        factor = unscale
        if self.clip_norm is not None and norm is not None:
            # As torch.nn.utils.clip_grads_with_norm_ has it.
            clip = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            factor = clip if factor is None else factor * clip
        if factor is not None:
            _multiply(sync.gradients(), factor)
        if scale is None or overflow is None:
            self.optimizer.step()
        else:
            self._step_unless(overflow)
            scale.update(overflow)
        return StepResult(norm, overflow)

    def _give_momentum(self) -> None:
        """`give_momentum`, until every parameter has its own; anew for another state or more parameters."""
        groups, state = self.optimizer.param_groups, self.optimizer.state
        count = sum([len(group["params"]) for group in groups])
        if self._complete is not state or not count == len(state) == self._count:
            self._complete = state if give_momentum(self.optimizer) else None
            self._count = count

    def _step_unless(self, overflow: Tensor) -> None:
        if self.skips_on_device:
            optimizer: object = self.optimizer
            setattr(optimizer, "found_inf", overflow.float())  # noqa: B010
            setattr(optimizer, "grad_scale", None)  # noqa: B010
            try:
                self.optimizer.step()
            finally:
                del optimizer.found_inf, optimizer.grad_scale  # pyright: ignore[reportAttributeAccessIssue]
        elif not overflow:
            self.optimizer.step()

    @property
    def skips_on_device(self) -> bool:
        """Whether the optimizer itself can leave an update out, as torch's fused ones can."""
        groups = self.optimizer.param_groups
        able = getattr(self.optimizer, "_step_supports_amp_scaling", False) and not self.window.sync.sharded
        # A checkpoint may have brought groups that are not fused.
        return bool(able) and all(group.get("fused") and not _dampened(group) for group in groups)


def give_momentum(optimizer: Optimizer) -> bool:
    """Gives fused SGD the momentum buffers that it has not made yet, for parameters that have a gradient.

    It makes them for all at once in its first step, leaves them uninitialised if that is skipped, and
    fails where a parameter has its first gradient later. Zeros make a parameter's first step as it should be.

    Returns:
        Whether all parameters of all groups have one now.
    """
    if not isinstance(optimizer, SGD):
        return False
    complete = True
    for group in optimizer.param_groups:
        if not (group.get("fused") and group["momentum"]) or _dampened(group):
            complete = False
            continue
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if state and state.get("momentum_buffer") is not None:
                continue
            if parameter.grad is None:
                complete = False
            else:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return complete


def _dampened(group: dict[str, Any]) -> bool:
    """Whether the group's first step is another, of which a fused kernel knows nothing."""
    return bool(group.get("momentum") and group.get("dampening"))


def _multiply(gradients: list[Tensor], factor: Tensor) -> None:
    """Multiplies all gradients by `factor`, shape (), in place."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    for dtype, alike in by_dtype.items():
        torch._foreach_mul_(alike, factor.to(dtype))  # pyright: ignore[reportPrivateImportUsage]
