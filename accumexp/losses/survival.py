"""Cox's partial likelihood: each event is compared with all samples that are still at risk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .coupled import Coupled, couples

TIES = ("breslow", "efron")


@couples
def cox(outputs: Tensor, targets: Any, ties: str = "breslow") -> Tensor:
    """The negative logarithm of Cox's partial likelihood, divided by the number of events.

    With h_i the logarithm of a sample's hazard, t_i its time and R_i the samples with t_j >= t_i,

        loss = 1 / events * sum_{i: event} (log sum_{j in R_i} exp(h_j) - h_i)

    (Cox 1972, doi:10.1111/j.2517-6161.1972.tb00899.x; ties after Breslow 1974). With `ties="efron"` the l-th
    of d events at one time has sum_{R_i} exp(h_j) - l / d * sum_{events at t_i} exp(h_j) in the logarithm,
    l = 0 to d - 1 (Efron 1977). 0 without events. Does not wait for the device.

    Args:
        outputs: logarithms of hazards, (n,) or (n, 1).
        targets: a pair (times, events), each (n,), or one tensor (n, 2); an event is not 0 where it was
            observed, and 0 where the sample left the study at its time.
        ties: "breslow" or "efron".

    Returns:
        Shape ().

    Raises:
        ValueError: for outputs or targets of other shapes.
    """
    hazards = outputs.reshape(-1)
    times, events = _times_and_events(targets)
    if outputs.shape[1:] not in ((), (1,)) or not len(hazards) == times.numel() == events.numel():
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (outputs, times, events))
        raise ValueError(f"hazards (n,) or (n, 1), times (n,) and events (n,) are needed, not {shapes}")
    times, events = times.reshape(-1), events.reshape(-1)
    order = times.argsort(descending=True)
    hazards, times, observed = hazards[order], times[order], events[order] != 0
    places = torch.arange(len(times), device=times.device)
    changes = torch.ones_like(observed)
    changes[1:] = times[1:] != times[:-1]
    groups = changes.cumsum(0) - 1  # samples of one time, of which at most n
    last = torch.zeros_like(places).scatter_reduce(0, groups, places, "amax")
    at_risk = hazards.logcumsumexp(0)[last[groups]]
    each = at_risk
    if ties == "efron":
        # The number of events at a time, and how many of them come before.
        count = torch.zeros_like(places).index_add(0, groups, observed.long())[groups]
        before = observed.cumsum(0) - observed.long()
        first = torch.full_like(places, len(places)).scatter_reduce(0, groups, before, "amin")
        share = (before - first[groups]).to(hazards.dtype) / count.clamp(min=1)
        parts = (hazards - at_risk).exp().where(observed, 0.0)
        tied = torch.zeros_like(hazards).index_add(0, groups, parts)[groups]
        # Only those of an event: elsewhere the logarithm may be that of 0.
        each = at_risk + torch.log1p(-(share * tied).where(observed, 0.0))
    return (each - hazards).where(observed, 0.0).sum() / observed.sum().clamp(min=1)


class Cox(Coupled):
    """`cox` as a module.

    Raises:
        ValueError: for other `ties` than "breslow" and "efron".
    """

    def __init__(self, ties: str = "breslow") -> None:
        super().__init__()
        if ties not in TIES:
            raise ValueError(f"ties={ties}: one of {', '.join(TIES)}")
        self.ties = ties

    def forward(self, outputs: Tensor, targets: Any) -> Tensor:
        return cox(outputs, targets, self.ties)


def _times_and_events(targets: Any) -> tuple[Tensor, Tensor]:
    if isinstance(targets, Tensor):
        if targets.dim() != 2 or targets.shape[1] != 2:
            raise ValueError(f"pairs (time, event) of shape (n, 2) are needed, not {tuple(targets.shape)}")
        return targets[:, 0], targets[:, 1]
    if not isinstance(targets, tuple | list) or len(targets) != 2:
        raise ValueError(f"a pair (times, events) is needed, not a {type(targets).__name__}")
    return targets[0], targets[1]
