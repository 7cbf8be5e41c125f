"""Updates for an estimator of gradient noise to look at, and what it should find there."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from accumexp.accum import Window
from accumexp.training.noise_scale import GradientNoise

NAMES = ("train/noise_scale", "train/gradient_variance", "train/gradient_square")
MICRO = "+callbacks.noise._target_=accumexp.training.noise_scale.NoiseScale"
SAMPLE = "+callbacks.noise._target_=accumexp.training.sample_noise_scale.SampleNoiseScale"


def flat_gradient(model: nn.Module, loss: Tensor) -> np.ndarray[Any, Any]:
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.reshape(-1) for g in gradients]).numpy()


def of_parts(
    means: list[np.ndarray[Any, Any]], weight: list[float], samples: int
) -> tuple[float, float, float]:
    """(noise scale, tr(Sigma), |G|^2) by the analysis of variance of means over `weight` items each."""
    w, m = np.array(weight), np.stack(means)
    whole = (w[:, None] * m).sum(0) / w.sum()
    spread = (w * ((m - whole) ** 2).sum(1)).sum() / (len(w) - 1)
    square = (whole**2).sum() - spread / w.sum()
    variance = spread * samples / w.sum()
    return variance / square, variance, square


def smoothed(callback: GradientNoise) -> tuple[float, float, float]:
    """(noise scale, tr(Sigma), |G|^2) that a callback is at, logged or not."""
    counted = 1 - callback.decay**callback.estimates
    return callback.variance / callback.square, callback.variance / counted, callback.square / counted


def look(
    callback: GradientNoise, window: Window, inputs: Tensor, targets: Any, samples: int | None = None
) -> dict[str, float]:
    """One published update of `window`, as the trainer would have it, without the optimizer."""
    batch = SimpleNamespace(
        steps=window.steps,
        inputs=inputs,
        targets=targets,
        samples=len(inputs) if samples is None else samples,
    )
    trainer: Any = SimpleNamespace(
        publishes=True,
        batch=batch,
        window=window,
        device=torch.device("cpu"),
        progress=SimpleNamespace(update=0),
        off_the_clock=nullcontext,
    )
    window.model.zero_grad(set_to_none=not window.sync.keeps_gradients)
    callback.update_begin(trainer)
    window.backward(inputs, targets, samples=samples)
    values: dict[str, float] = {}
    callback.measured(trainer, values)
    return values


def each_samples_gradient(model: nn.Module, inputs: Tensor, targets: Tensor) -> list[np.ndarray[Any, Any]]:
    return [
        flat_gradient(model, nn.functional.cross_entropy(model(inputs[i : i + 1]), targets[i : i + 1]))
        for i in range(len(inputs))
    ]
