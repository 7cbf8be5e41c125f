"""The memory of a coupled loss: a window keeps all outputs of its samples, and computes the loss on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..accum import call, held_bytes, measure_peak
from ..accum.batch import batch_size
from ..accum.terms import CoupledLoss, sum_of
from ..accum.two_passes import floating
from ..training.evaluation import precision
from .trial_run import TrialRun

# Samples whose outputs are computed, and then repeated.
SAMPLES = 4


@dataclass(frozen=True)
class CoupledMemory:
    """Bytes that a window of a coupled loss takes besides those of its micro-batches.

    Attributes:
        sample: the gradient of one sample's outputs, kept for the second pass.
        loss: outputs and targets of the whole window, and the most that the loss on them allocates.
    """

    sample: int
    loss: int


def couples(trial: TrialRun) -> bool:
    """Whether the loss of the run couples samples."""
    return isinstance(trial.experiment.loss, CoupledLoss)


def coupled_memory(trial: TrialRun) -> CoupledMemory:
    """Measures a coupled loss on as many samples as an update has on all ranks."""
    experiment = trial.experiment
    loss = experiment.loss
    assert isinstance(loss, CoupledLoss)
    trial.data.take_small(SAMPLES, 1)
    batch = next(iter(trial.data.splits.train.epoch(0)))
    model, samples = experiment.model, min(trial.data.batch_size, trial.data.samples)
    was_training = model.training
    model.eval()  # leaves the buffers as they are
    with torch.no_grad(), precision(experiment.autocast, trial.device):
        outputs = loss.kept(call(model, batch.inputs))
    model.train(was_training)
    count = batch_size(batch.targets)
    rows = [
        pytree.tree_map(lambda leaf: _repeated(leaf, count, samples), v) for v in (outputs, batch.targets)
    ]
    leaves = floating(rows[0])
    held = held_bytes(leaf for leaf in pytree.tree_leaves(rows) if isinstance(leaf, Tensor))
    with measure_peak(trial.device, held) as peak:
        for leaf in leaves:
            leaf.requires_grad_(True)
        with precision(experiment.autocast, trial.device):
            sum_of(loss.terms(*rows)).backward()
    return CoupledMemory(sum(leaf.nbytes for leaf in leaves) // samples, held + peak.peak - peak.start)


def _repeated(leaf: Any, count: int, samples: int) -> Any:
    """The rows of `count` samples, repeated for `samples`; below fp32 widened, as a window does."""
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.float() if leaf.dtype in (torch.float16, torch.bfloat16) else leaf
    wanted = len(leaf) // count * samples
    return leaf[torch.arange(wanted, device=leaf.device) % len(leaf)]
