"""accumexp's own window, `accumexp.accum.Window`: the loader yields the whole batch of an update."""

from __future__ import annotations

import torch
from torch import Tensor

from accumexp.accum import OptimizerStep, Window, batch_size, data_parallel, steps_for

from ..models import model_of
from ..samples import loader_of
from ..settings import GENERAL, IGNORED, Setting, Watch, cross_entropy, optimizer_of, schedule_of

PACKAGE = "accumexp"
SETTINGS = GENERAL


class MeanOverLabels:
    """The user's loss as a `WindowLoss`: a mean over labels that are not ignored."""

    def __init__(self, setting: Setting) -> None:
        self.mean = cross_entropy(setting)

    def weight(self, targets: Tensor) -> Tensor:
        return (targets != IGNORED).sum()

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.mean(outputs, targets) * self.weight(targets)


def fit(setting: Setting, watch: Watch, steps: int, micro: int) -> None:
    dtype, several = setting.dtype(watch), setting.processes > 1
    model = watch(model_of(setting, dtype))
    window = Window(
        data_parallel(model) if several else model,
        MeanOverLabels(setting),
        steps,
        autocast=torch.bfloat16 if setting.mixed else None,
    )
    optimizer = optimizer_of(setting, model)
    step = OptimizerStep(window, optimizer, clip_norm=setting.clip_norm)
    schedule = schedule_of(setting, optimizer)
    loader = loader_of(setting, steps * micro, dtype, sharded=several)
    for _ in range(setting.epochs):
        for inputs, labels in loader:
            optimizer.zero_grad()
            size = batch_size(inputs)
            result = window.backward(inputs, labels, steps=steps_for(size, steps * micro, steps))
            step()
            schedule.step()
            watch.loss(float(result.loss))
