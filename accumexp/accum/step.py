"""The optimizer step after a window: unscales, clips, and steps or skips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from .window import Window


@dataclass(frozen=True)
class StepResult:
    """The result of a step. Tensors stay on the device.

    Attributes:
        norm: the 2-norm of the unscaled gradient before clipping, shape (), or None if it was not needed.
        overflow: whether the window was skipped, bool of shape (), or None without a loss scale.
    """

    norm: Tensor | None
    overflow: Tensor | None


class OptimizerStep:
    """Steps `optimizer` on the gradient that `window` accumulated.

    With a loss scale the gradient is first divided by it. A window that overflowed on any rank changes
    neither weights nor optimizer state, and the scale is updated once. A fused optimizer skips on the device;
    for any other the host waits for the device once an update.

    Args:
        clip_norm: the 2-norm that the update's gradient is clipped to, or None.
        clip_value: the largest absolute value of its elements, or None. The norm is clipped first.
    """

    def __init__(
        self,
        window: Window,
        optimizer: Optimizer,
        clip_norm: float | None = None,
        clip_value: float | None = None,
    ) -> None:
        self.window = window
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.clip_value = clip_value

    def __call__(self, want_norm: bool = False) -> StepResult:
        sync, scale = self.window.sync, self.window.loss_scale
        give_momentum(self.optimizer)
        if scale is None and self.clip_norm is None and self.clip_value is None and not want_norm:
            self.optimizer.step()
            return StepResult(None, None)
        overflow = None if scale is None else sync.overflow()
        unscale = None if scale is None else scale.scale.double().reciprocal()
        norm = sync.norm() if want_norm or self.clip_norm is not None else None
        if norm is not None and unscale is not None:
            norm = norm * unscale
        factor = unscale
        if self.clip_norm is not None and norm is not None:
            # As in torch.nn.utils.clip_grads_with_norm_.
            clip = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            factor = clip if factor is None else factor * clip
        if factor is not None:
            _multiply(sync.gradients(), factor)
        if self.clip_value is not None:
            for gradient in sync.gradients():
                gradient.clamp_(-self.clip_value, self.clip_value)
        if scale is None or overflow is None:
            self.optimizer.step()
        else:
            self._step_unless(overflow)
            scale.update(overflow)
        return StepResult(norm, overflow)

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
        """Whether the optimizer can skip an update on the device, as torch's fused ones can."""
        groups = self.optimizer.param_groups
        supported = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        # Groups of a loaded checkpoint may not be fused.
        fused = all(group.get("fused") and not _dampened(group) for group in groups)
        return supported and fused and not self.window.sync.sharded


def give_momentum(optimizer: Optimizer) -> None:
    """Creates the missing momentum buffers of fused SGD, as zeros, for parameters that have a gradient.

    Fused SGD creates all buffers in its first step, leaves them uninitialised if that step is skipped, and
    fails if a parameter gets its first gradient later. From a buffer of zeros the first step is the same.
    """
    if not isinstance(optimizer, SGD):
        return
    for group in optimizer.param_groups:
        if not (group.get("fused") and group["momentum"]) or _dampened(group):
            continue
        for parameter in group["params"]:
            if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _dampened(group: dict[str, Any]) -> bool:
    """Whether the group's first step differs from the later ones, which a fused kernel does not support."""
    return bool(group.get("momentum") and group.get("dampening"))


def _multiply(gradients: list[Tensor], factor: Tensor) -> None:
    """Multiplies all gradients by `factor`, shape (), in place."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    for dtype, group in by_dtype.items():
        torch._foreach_mul_(group, factor.to(dtype))  # pyright: ignore[reportPrivateImportUsage]
