"""The objective of a window, by the kind of its loss and how late weights are counted."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from .late_gradients import OneGradientPerTerm
from .loss import WindowLoss
from .objective import Coupled, Objective, OneTerm, SeveralDenominators
from .refusals import LossRefused
from .scale import LossScale
from .sync import Sync
from .terms import CoupledLoss, SeveralTerms
from .window_batch import WindowBatch

LateWeights = Literal["first_pass", "gradients"]
REMEDY = "make them parameters of the model, or set their requires_grad to false"


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


def trained_parameters(loss: Any) -> list[str]:
    """The names of the parameters of a loss that have a gradient."""
    parameters = loss.named_parameters() if isinstance(loss, nn.Module) else ()
    return [name.removeprefix("criterion.") for name, p in parameters if p.requires_grad]


def check_loss_parameters(loss: WindowLoss, sync: Sync, loss_scale: LossScale | None) -> None:
    """Refuses parameters of the loss whose gradient would not be that of the larger batch.

    Ranks add the gradients of the model alone, and `OptimizerStep` divides them alone by the scale. A coupled
    loss is computed on all samples by every rank, without the scale.

    Raises:
        LossRefused: naming the parameters.
    """
    if isinstance(loss, CoupledLoss) or (sync.ranks.size == 1 and loss_scale is None):
        return
    if names := trained_parameters(loss):
        why = "added over the ranks" if sync.ranks.size > 1 else "divided by the loss scale"
        raise LossRefused(f"{', '.join(names)}: gradients of a loss's parameters are not {why}; {REMEDY}")
