"""Which of a trainer's saved numbers are inf or nan: a checkpoint of them is no model to go on with."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import TrainingError

if TYPE_CHECKING:
    from .trainer import Trainer

log = logging.getLogger(__name__)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class FiniteCheck:
    """Looks for inf and nan in the parameters, the buffers and the optimizer's state.

    Buffers and frozen parameters that are not finite from the beginning, such as a mask of -inf, are passed
    over.
    """

    def __init__(self) -> None:
        self._passed_over = set[str]()
        self._warned = False

    def begin(self, model: nn.Module) -> None:
        """Takes in what is not finite in `model` before its first update."""
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        fixed = {name: value for name, value in _tensors(model.state_dict()) if name not in trained}
        self._passed_over = set(not_finite(fixed))

    def __call__(self, trainer: Trainer) -> str | None:
        """The first of them on this rank that is not finite, described, or None. Waits for the device."""
        saved = {n: t for n, t in _tensors(trainer.model.state_dict()) if n not in self._passed_over}
        names: dict[Tensor, str] = {parameter: name for name, parameter in trainer.model.named_parameters()}
        for parameter, state in trainer.optimizer.state.items():
            for key, value in _tensors(state):
                if value.dim():  # not a count of steps
                    saved[f"{key} of {names.get(parameter, 'a parameter')} in the optimizer"] = value
        return next(iter(not_finite(saved)), None)

    def refuse(self, faulty: str, trainer: Trainer, checkpoints: Sequence[Path]) -> None:
        """Ends the run because `faulty` is not finite, or with `check_finite=false` warns once.

        Args:
            checkpoints: those that are kept, oldest first.

        Raises:
            TrainingError: with `check_finite`.
        """
        newest = f"the newest is {checkpoints[-1]}" if checkpoints else "there is none"
        line = f"{faulty} is inf or nan after update {trainer.progress.update}: no checkpoint ({newest})"
        if trainer.options.check_finite:
            raise TrainingError(
                f"{line}; lower optimizer.lr, set trainer.clip_norm, or go on regardless with "
                "trainer.check_finite=false"
            )
        if not self._warned and not trainer.window.sync.ranks.rank:
            log.warning("%s, nor of what follows from it", line)
        self._warned = True


@torch.no_grad()
def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of `tensors` with an inf or nan: one fused reduction for each dtype and device."""
    groups: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        local = getattr(tensor, "_local_tensor", tensor).detach()  # the shard on this rank of a DTensor
        if local.dtype in DTYPES and local.layout is torch.strided and local.numel():
            groups.setdefault((local.device, local.dtype), {})[name] = local
    names = set[str]()
    for group in groups.values():
        largest = torch._foreach_norm(list(group.values()), math.inf)  # pyright: ignore[reportPrivateImportUsage]
        finite = torch.stack(largest).isfinite().tolist()
        names |= {name for name, is_finite in zip(group, finite, strict=True) if not is_finite}
    return [name for name in tensors if name in names]


def _tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    return ((str(name), value) for name, value in state.items() if isinstance(value, Tensor))
