"""BatchNorm whose statistics are those of the whole window, in every micro-batch and on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

Model = TypeVar("Model", bound=nn.Module)


class NormPass(Protocol):
    """What a window does with the calls of its norms in a forward pass; `norm_passes.WindowNorms`."""

    def normalised(self, module: WindowBatchNorm, input: Tensor) -> Tensor:
        """The output of `module` on a micro-batch."""
        ...


class WindowBatchNorm(_BatchNorm):
    """Base of the norms over a window. Outside of a `Window` each is torch's BatchNorm.

    In a window the gradient, with that through the statistics, and the running statistics are those of
    torch's BatchNorm on the whole batch. Running statistics are updated once a window, with `momentum`.
    """

    # Set by the window on the module while it computes.
    window_pass: NormPass | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.window_pass is None or not takes_statistics(self):
            return super().forward(input)
        self._check_input_dim(input)
        return self.window_pass.normalised(self, input)

    @torch.no_grad()
    def update_running_statistics(self, statistics: Statistics) -> None:
        """Updates them as a forward pass of torch's BatchNorm on the whole window does."""
        if not self.training or self.running_mean is None or self.running_var is None:
            return
        momentum = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1 / self.num_batches_tracked.to(statistics.mean.dtype)
        assert momentum is not None
        unbiased = statistics.variance * (statistics.count / (statistics.count - 1))
        for running, new in ((self.running_mean, statistics.mean), (self.running_var, unbiased)):
            running.copy_((1 - momentum) * running + momentum * new)


class WindowBatchNorm1d(WindowBatchNorm, nn.BatchNorm1d):
    """BatchNorm1d over a window. Shapes: (n, channels) or (n, channels, length) to the same."""


class WindowBatchNorm2d(WindowBatchNorm, nn.BatchNorm2d):
    """BatchNorm2d over a window. Shapes: (n, channels, height, width) to the same."""


class WindowBatchNorm3d(WindowBatchNorm, nn.BatchNorm3d):
    """BatchNorm3d over a window. Shapes: (n, channels, depth, height, width) to the same."""


_KINDS: dict[type, type] = {
    nn.BatchNorm1d: WindowBatchNorm1d,
    nn.BatchNorm2d: WindowBatchNorm2d,
    nn.BatchNorm3d: WindowBatchNorm3d,
}


def window_batch_norm(model: Model) -> Model:
    """Makes every BatchNorm1d, 2d and 3d of `model` one over the window, in place, and returns `model`.

    Parameters, buffers and hooks stay. Subclasses, SyncBatchNorm among them, are not changed.

    Raises:
        ValueError: for a lazy BatchNorm that has not been called.
    """
    for name, module in model.named_modules():
        if isinstance(module, LazyModuleMixin) and isinstance(module, _BatchNorm):
            where = name or "(model)"
            raise ValueError(f"{where}: a lazy BatchNorm has no channels yet; call the model first")
        kind = _KINDS.get(type(module))
        if kind is not None:
            module.__class__ = kind
    return model


def takes_statistics(module: _BatchNorm) -> bool:
    """Whether `module` normalises by its input's statistics: in training, or without running ones."""
    return module.training or (module.running_mean is None and module.running_var is None)


def window_norms(model: nn.Module) -> list[WindowBatchNorm]:
    """The norms over the window in `model` that normalise by their inputs' statistics now."""
    norms = [module for module in model.modules() if isinstance(module, WindowBatchNorm)]
    return [module for module in norms if takes_statistics(module)]


class Statistics:
    """Mean and biased variance of `count` values a channel; of a part of the window, or of all.

    Shapes: mean and variance (channels,), count (), in fp32 or fp64.
    """

    def __init__(self, count: Tensor, mean: Tensor, variance: Tensor) -> None:
        self.count = count
        self.mean = mean
        self.variance = variance

    @classmethod
    def of(cls, input: Tensor) -> Statistics:
        """Those of `input`, (n, channels, ...)."""
        values = input.detach()
        values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
        variance, mean = torch.var_mean(values, [0, *range(2, values.dim())], correction=0)
        return cls(mean.new_full((), values.numel() // max(values.shape[1], 1)), mean, variance)

    @classmethod
    def joined(cls, parts: list[Statistics]) -> Statistics:
        """Those of all `parts` (Chan, Golub and LeVeque 1983); a part may have the count 0."""
        counts = torch.stack([part.count for part in parts])
        count = counts.sum()
        shares = (counts / count.clamp(min=1)).unsqueeze(1)
        means = torch.stack([part.mean for part in parts])
        mean = (shares * means).sum(0)
        variances = torch.stack([part.variance for part in parts]) + (means - mean).square()
        return cls(count, mean, (shares * variances).sum(0))

    def empty(self) -> Statistics:
        """The same with the count 0, as of padding."""
        return Statistics(torch.zeros_like(self.count), self.mean, self.variance)

    def packed(self) -> Tensor:
        """All numbers, (2 * channels + 1,)."""
        return torch.cat([self.count.reshape(1), self.mean, self.variance])

    @classmethod
    def unpacked(cls, packed: Tensor) -> Statistics:
        mean, variance = packed[1:].chunk(2)
        return cls(packed[0], mean, variance)


def normalised(
    module: _BatchNorm,
    input: Tensor,
    statistics: Statistics,
    sums: Callable[[], Tensor | None],
    mark: Tensor | None,
) -> Tensor:
    """`input`, normalised by `statistics`, with weight and bias of `module`.

    Args:
        sums: called in the backward; returns the sums over the window, of the gradients of the output and of
            their products with the normalised input, (2, channels). The gradient of the input is then that
            through the statistics too. With None they are constants.
        mark: zeros of shape (2, channels), whose gradient becomes this input's part of the sums.
    """
    arguments = (input, module.weight, module.bias, mark, statistics, sums, module.eps)
    output: Tensor = _Normalise.apply(*arguments)  # type: ignore[assignment]
    return output


class _Normalise(torch.autograd.Function):
    """BatchNorm by given statistics of which the input is a part."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mark: Tensor | None,
        statistics: Statistics,
        sums: Callable[[], Tensor | None],
        eps: float,
    ) -> Tensor:
        ctx.statistics, ctx.sums, ctx.eps = statistics, sums, eps
        ctx.dtypes = [None if each is None else each.dtype for each in (weight, bias)]
        mean, variance = statistics.mean, statistics.variance
        weight, bias = (None if each is None else each.to(mean.dtype) for each in (weight, bias))
        ctx.save_for_backward(input, weight)
        return F.batch_norm(input, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        input, weight = ctx.saved_tensors
        mean, variance = ctx.statistics.mean, ctx.statistics.variance
        weight = torch.ones_like(mean) if weight is None else weight
        gradient, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
            grad_outputs[0], input, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        window_sums = ctx.sums() if ctx.needs_input_grad[0] else None
        if window_sums is not None:
            # Of torch's BatchNorm: weight / std * (gradient - mean gradient - normalised * mean product).
            factor = -weight * (variance + ctx.eps).rsqrt() / ctx.statistics.count
            through = factor * window_sums
            gradient += F.batch_norm(input, mean, variance, through[1], through[0], False, 0.0, ctx.eps)
        sums = torch.stack([by_bias, by_weight]) if ctx.needs_input_grad[3] else None
        by_weight, by_bias = (
            None if dtype is None else each.to(dtype)
            for dtype, each in zip(ctx.dtypes, (by_weight, by_bias), strict=True)
        )
        return gradient, by_weight, by_bias, sums, None, None, None
