"""Windows over ranks: a rank's own part of a batch, models wrapped for ranks, and their whole gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from accumexp.accum import data_parallel, fully_sharded, rank_share

SAMPLES = 101  # a prime: nothing divides it
STEPS = [1, 2, 3, 5]
CPU = torch.device("cpu")


def own_part(batch: tuple[Tensor, Tensor], steps: int) -> tuple[Tensor, Tensor, int]:
    """This rank's samples, one of padding if it has none, and how many count."""
    parts = rank_share(len(batch[0]), steps, dist.get_rank(), dist.get_world_size())
    chosen = [sample for part in parts for sample in part]
    inputs, targets = (tensor[chosen or [0]] for tensor in batch)
    return inputs, targets, len(chosen)


def wrapped(model: nn.Module, how: str) -> nn.Module:
    if how == "averaging":
        return DistributedDataParallel(model)
    return fully_sharded(model, CPU) if how == "sharded" else data_parallel(model)


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    parameter_gradients = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {
        name: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone()  # pyright: ignore
        for name, g in parameter_gradients.items()
        if g is not None
    }


class Branches(nn.Module):
    """Samples whose first feature is positive go one way, the others another: a rank may use one alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.one, self.other = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.one if bool((inputs[:, 0] > 0).all()) else self.other)(inputs)
