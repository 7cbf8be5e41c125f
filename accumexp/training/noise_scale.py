"""The gradient noise scale: the batch size at which noise and gradient are of equal size.

McCandlish et al., "An Empirical Model of Large-Batch Training" (arXiv 1812.06162): with G the gradient of the
true loss and Sigma the covariance of one sample's gradient, a batch of B samples has the gradient G with a
variance of tr(Sigma) / B. The noise scale is tr(Sigma) / |G|^2, in samples. Far below it a twice larger batch
saves almost half of the updates; far above it saves none.

Both are estimated without bias from the gradients of parts of a batch (appendix A.1, here for parts of
unequal weight), smoothed separately, and then divided: the mean of a ratio is not the ratio of the means.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..accum import MicroBatch, Window
from ..accum.terms import has_terms
from ..errors import UsageError
from .callbacks import Callback

if TYPE_CHECKING:
    from .trainer import Trainer

log = logging.getLogger(__name__)


class GradientNoise(Callback):
    """Base of both estimators: smooths their estimates at published updates, and logs them.

    `train/gradient_square` is |G|^2, `train/gradient_variance` tr(Sigma) of one sample, both averaged with
    weights that fall by `decay` from one estimate to the next (bias-corrected, as Adam's moments are), and
    `train/noise_scale` is their ratio, in samples. An unbiased estimate of a small value may be negative.
    It counts in the average; while the average of |G|^2 is not above 0, or that of tr(Sigma)
    is below 0, no point is logged.

    Args:
        decay: from 0 (only the newest estimate) to below 1.

    Raises:
        ValueError: for another decay.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: from 0 to below 1")
        self.decay = decay
        self.estimates = 0
        self.square = 0.0
        self.variance = 0.0

    def check(self, trainer: Trainer, key: str) -> None:
        others = [c for c in trainer.callbacks.values() if isinstance(c, GradientNoise) and c is not self]
        if others:
            raise UsageError(f"{key}: another callback logs train/noise_scale already, leave one out")
        if has_terms(trainer.window.loss):
            raise UsageError(
                f"{key}: the loss has several terms or couples samples, so the gradient of a window is no "
                "mean over samples whose variance falls with their number; leave it out"
            )
        if trainer.window.sync.sharded:
            raise UsageError(f"{key}: accum=fsdp has no whole gradients to estimate the noise from")

    def count(self, square: float, variance: float) -> dict[str, float]:
        """Adds one estimate of |G|^2 and tr(Sigma); returns the values to log."""
        if not (math.isfinite(square) and math.isfinite(variance)):
            return {}
        self.estimates += 1
        self.square += (1 - self.decay) * (square - self.square)
        self.variance += (1 - self.decay) * (variance - self.variance)
        counted = 1 - self.decay**self.estimates
        square, variance = self.square / counted, self.variance / counted
        if square <= 0 or variance < 0:
            return {}
        return {
            "train/noise_scale": variance / square,
            "train/gradient_variance": variance,
            "train/gradient_square": square,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"estimates": self.estimates, "square": self.square, "variance": self.variance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.estimates, self.square, self.variance = state["estimates"], state["square"], state["variance"]


class NoiseScale(GradientNoise):
    """Estimates the noise from the gradients of the window's micro-batches, with no further backward.

    The K micro-batches have mean gradients m_k over weights W_k, and the window has T = sum_k a_k m_k. Where
    the variance of a mean falls with its weight, as s / W_k,

        E sum_k W_k |m_k|^2 = (sum_k W_k) |G|^2 + K s        over the micro-batches observed alone,
        E |T|^2 = (sum_k a_k)^2 |G|^2 + (sum_k a_k^2 / W_k) s        over all,

    two equations that are solved for |G|^2 and s. For equal micro-batches this is appendix A.1 of the paper.

    A sample is that of `data.batch_size`, and the logged values do not depend on the unit of the loss's
    weight: tr(Sigma) = s * samples / sum_k W_k, and G is the gradient of the mean over the items,
    with `accum.reduction=sum` too. With class weights or valid tokens the noise of a sample is that of its
    part in the weighted mean; samples of unequal weight then leave a bias of order 1 / (samples in a
    micro-batch). Gradients are those before clipping, divided by the loss scale; a window that overflowed
    is not counted.

    It needs windows of 2 micro-batches or more, and keeps one copy of the gradient in the windows that are
    published. On several ranks every micro-batch of every rank counts, but the last of each, in whose
    backward the gradients of the ranks are added.
    """

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__(decay)
        self._window: Window | None = None
        self._before: dict[Tensor, Tensor] = {}
        self._rows: list[Tensor] = []
        self._whole: Tensor | None = None

    def check(self, trainer: Trainer, key: str) -> None:
        super().check(trainer, key)
        if trainer.window.fp32_buffers:
            raise UsageError(f"{key}: accum.fp32_buffers=true keeps a window's gradients where none can look")

    def run_begin(self, trainer: Trainer) -> None:
        if trainer.window.steps == 1 and trainer.window.sync.ranks.rank == 0:
            log.warning(
                "train/noise_scale: not estimated from a window of one micro-batch, give accum.steps=2 or "
                "more, or take callbacks=sample_noise_scale"
            )

    def update_begin(self, trainer: Trainer) -> None:
        # Also a window of a single micro-batch, which may be split when it runs out of memory.
        if trainer.publishes:
            self.watch(trainer.window)

    def watch(self, window: Window) -> None:
        """Observes the next window, without waiting for the device, up to `measured`."""
        self._window = window
        window.after_micro_batch.append(self._observe)
        window.on_discard.append(self._reset)

    def measured(self, trainer: Trainer, values: dict[str, float]) -> None:
        if self._window is None:
            return
        self._window.after_micro_batch.remove(self._observe)
        self._window.on_discard.remove(self._reset)
        ranks, self._window = self._window.sync.ranks, None
        assert self._whole is not None
        local = torch.stack(self._rows).sum(0) if self._rows else self._whole.new_zeros(len(Sums._fields))
        *sums, whole = torch.cat([ranks.sum(local), self._whole.reshape(1)]).tolist()
        self._rows.clear()
        values.update(self.count(*solved(Sums(*sums), whole)))

    def _reset(self) -> None:
        self._before.clear()
        self._rows.clear()
        self._whole = None

    @torch.no_grad()
    def _observe(self, micro: MicroBatch) -> None:
        window = self._window
        assert window is not None
        added = micro.last and window.sync.ranks.size > 1
        scale = 1.0 if window.loss_scale is None else window.loss_scale.scale.double()
        if micro.last:
            self._whole = _square(window.sync.gradients(), micro.share) / scale**2
        part = None if added else self._added_square(window, micro) / (scale * window.sync.factor) ** 2
        if micro.last:
            self._before.clear()
        if micro.samples:
            weight: Any = float(micro.samples)
            if getattr(window.loss, "counts", True):
                weight = window.loss.weight(micro.targets)
            self._rows.append(_row(part, weight, micro))

    def _added_square(self, window: Window, micro: MicroBatch) -> Tensor:
        """|c|^2 of what this micro-batch added to `.grad`, float64 of shape ()."""
        parts = []
        for parameter in window.model.parameters():
            if parameter.grad is None:
                continue
            before = self._before.get(parameter)
            parts.append(parameter.grad if before is None else before.sub_(parameter.grad))
        square = _square(parts, micro.share)
        for parameter in () if micro.last else window.model.parameters():
            if parameter.grad is None:
                continue
            if parameter in self._before:
                self._before[parameter].copy_(parameter.grad)
            else:
                self._before[parameter] = parameter.grad.clone()
        return square


class Sums(NamedTuple):
    """The sums over micro-batches of all ranks in `NoiseScale`'s two equations.

    Attributes:
        squares: sum of W_k |m_k|^2 over the micro-batches observed alone.
        weight_seen, seen: sum of their W_k, and their number.
        own, own_square: sums of a_k and of a_k^2 / W_k over all micro-batches.
        weight, samples: of the window.
    """

    squares: float
    weight_seen: float
    seen: float
    own: float
    own_square: float
    weight: float
    samples: float


def solved(sums: Sums, whole: float) -> tuple[float, float]:
    """|G|^2 and tr(Sigma) from the sums and from `whole`, |T|^2; nan where these do not determine them."""
    determinant = sums.seen * sums.own**2 - sums.weight_seen * sums.own_square
    if not determinant > 1e-9 * sums.seen * sums.own**2:
        return math.nan, math.nan
    square = (sums.seen * whole - sums.own_square * sums.squares) / determinant
    spread = (sums.own**2 * sums.squares - sums.weight_seen * whole) / determinant
    return square, spread * sums.samples / sums.weight


def _row(part: Tensor | None, weight: Tensor | float, micro: MicroBatch) -> Tensor:
    """A micro-batch's terms of `Sums`, float64 of shape (7,); zeros where its weight is 0.

    With c = a m = (W share) m, W |m|^2 = |c|^2 / (W share^2).
    """
    device = micro.share.device
    share = micro.share.double()
    weight = number(weight, device)
    some = (weight > 0).double()
    seen = some * (part is not None)
    per_weight = weight * share.square()
    alone = torch.zeros_like(weight) if part is None else torch.where(weight > 0, part / per_weight, 0.0)
    samples = torch.full_like(weight, micro.samples)
    return torch.stack([alone, weight * seen, seen, weight * share, per_weight, weight, samples])


def number(value: Tensor | float, device: torch.device) -> Tensor:
    """`value` as float64 of shape (), without a copy that makes the host wait."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)


def _square(tensors: list[Tensor], like: Tensor) -> Tensor:
    """The sum of the tensors' squared 2-norms, float64 of shape () on the device of `like`."""
    if not tensors:
        return like.new_zeros((), dtype=torch.float64)
    norms = [
        torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)).double()
        for t in tensors
    ]
    return torch.stack(norms).square().sum()
