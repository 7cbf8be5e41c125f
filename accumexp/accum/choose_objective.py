"""The objective of a window, by the kind of its loss and how late weights are counted."""

from __future__ import annotations

from typing import Any, Literal

from .late_gradients import OneGradientPerTerm
from .loss import WindowLoss
from .objective import Coupled, Objective, OneTerm, SeveralDenominators
from .sync import Sync
from .terms import CoupledLoss, SeveralTerms
from .window_batch import WindowBatch

LateWeights = Literal["first_pass", "gradients"]


def objective_of(
    loss: WindowLoss,
    sync: Sync,
    batch: WindowBatch,
    by_step: bool,
    weight: float | None,
    late_weights: LateWeights,
) -> Objective:
    """The objective of `loss` on `batch`. See `Window` for the arguments."""
    if isinstance(loss, CoupledLoss):
        return Coupled(loss, sync, batch)
    if isinstance(loss, SeveralTerms):
        several = SeveralDenominators if late_weights == "first_pass" else OneGradientPerTerm
        return several(loss, sync, batch)
    return OneTerm(loss, sync, batch, by_step, weight)


def passes_of(loss: WindowLoss, late_weights: LateWeights) -> int:
    """Forward passes of a micro-batch in a window: 1, or 2 where the first is without gradients."""
    several = isinstance(loss, SeveralTerms) and loss.late != () and late_weights == "first_pass"
    return 2 if several or isinstance(loss, CoupledLoss) else 1


def check_late_weights(late_weights: Any, fp32_buffers: bool, sharded: bool) -> None:
    """Raises a ValueError for a choice that there is not, or that the others exclude."""
    if late_weights not in ("first_pass", "gradients"):
        raise ValueError(f"late_weights is 'first_pass' or 'gradients', not {late_weights!r}")
    if late_weights == "gradients" and (fp32_buffers or sharded):
        raise ValueError("late_weights='gradients': not with fp32 buffers or a fully sharded model")
