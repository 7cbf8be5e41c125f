"""The gradient noise scale from the gradients of single samples, for windows of any number of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from ..accum import WindowLoss, map_tensors
from ..accum.batch import Nested, batch_size
from ..config.ranges import require
from ..environment.random_state import derive_seed, drawn_from
from ..errors import UsageError, first_line
from .noise_scale import GradientNoise, number
from .out_of_memory import NoMemoryFor

if TYPE_CHECKING:
    from .trainer import Trainer


class SampleNoiseScale(GradientNoise):
    """Estimates the noise from the gradients of an update's first samples, one by one.

    Measures before the window, at the weights of the update, in the parameters' own precision: without
    autocast and loss scale, so a window that is skipped counts too. Its cost, about the forward and backward
    of `samples` samples, does not count in `perf/*`. Dropout draws differ from sample to sample and leave the
    draws of the training unchanged.

    A sample is that of `data.batch_size`. Under weights (of classes, of valid tokens) its noise is that of
    its part in the weighted mean: see `sample_moments`. The estimates of several ranks, each from samples of
    its own, are averaged.

    Args:
        samples: number of samples on each rank, the first of the update.
        chunk: samples whose gradients are held at once.
        every: published updates from one measurement to the next; the first one is measured.
        decay: of `GradientNoise`.

    Raises:
        ValueError: for less than 2 samples, or a chunk or interval below 1.
    """

    def __init__(self, samples: int = 64, chunk: int = 16, every: int = 1, decay: float = 0.9) -> None:
        super().__init__(decay)
        if samples < 2:
            raise ValueError(f"samples={samples}: a variance needs at least 2")
        for name, value in (("samples", samples), ("chunk", chunk), ("every", every)):
            require(name, value, at_least=1, at_most=2**31 - 1, whole=True)
        self.samples = samples
        self.chunk = chunk
        self.every = every
        self.published = 0
        self._moments: Tensor | None = None

    def check(self, trainer: Trainer, key: str) -> None:
        super().check(trainer, key)
        model = trainer.model
        training = model.training
        for name, module in model.train().named_modules():
            if isinstance(module, _BatchNorm) and module.training:
                kind, where = type(module).__name__, f" {name}" if name else ""
                raise UsageError(
                    f"{key}: there is no gradient of a single sample where {kind}{where} takes the batch's "
                    "statistics, callbacks=noise_scale needs none"
                )
        batch = next(iter(trainer.splits.train.epoch(0)))
        try:
            self._measure(trainer, batch.inputs, batch.targets, 2)
        except Exception as error:
            reason = first_line(error)
            raise UsageError(
                f"{key}: torch.func.vmap cannot run this model and loss on single samples: {reason}"
            ) from error
        finally:
            model.train(training)

    def update_begin(self, trainer: Trainer) -> None:
        if not trainer.publishes or self.published % self.every:
            return
        batch = trainer.batch
        assert batch is not None
        no_memory = NoMemoryFor("callbacks=sample_noise_scale", "lower its chunk, samples held at once")
        with trainer.off_the_clock(), no_memory:
            count = min(self.samples, batch.samples)
            self._moments = self._measure(trainer, batch.inputs, batch.targets, count)

    def measured(self, trainer: Trainer, values: dict[str, float]) -> None:
        self.published += 1
        if self._moments is None:
            return
        ranks, square, variance = trainer.window.sync.ranks.sum(self._moments).tolist()
        self._moments = None
        if ranks:
            values.update(self.count(square / ranks, variance / ranks))

    def _measure(self, trainer: Trainer, inputs: Nested, targets: Nested, count: int) -> Tensor:
        """(1, |G|^2, tr(Sigma)) of the first `count` samples, float64, shape (3,); zeros for fewer than 2."""
        window = trainer.window
        inputs, targets = (map_tensors(lambda t: t[:count], batch) for batch in (inputs, targets))
        seed = derive_seed("noise", trainer.progress.update, window.sync.ranks.rank)
        with _undisturbed(seed, trainer.device):
            return sample_moments(window.model, window.loss, inputs, targets, self.chunk)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "published": self.published}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.published = state["published"]


def sample_moments(model: nn.Module, loss: WindowLoss, inputs: Nested, targets: Nested, chunk: int) -> Tensor:
    """|G|^2 and tr(Sigma) of a batch, without bias, from the gradient of every sample in it.

    Sample i has the weight w_i and adds c_i / W to the batch's gradient T, where c_i is the gradient of its
    summed loss and W = sum_i w_i. Of the n samples v weigh something. Then

        var T = v / (v - 1) * sum_i |c_i - w_i T|^2 / W^2,    tr(Sigma) = n var T,    |G|^2 = |T|^2 - var T.

    For equal weights that is the covariance's own unbiased estimate; for others it is the linearised
    variance of a ratio of means (Cochran, "Sampling Techniques", chapter 6), biased by an order of 1 / n.

    Holds the gradients of `chunk` samples, and two more in float64.

    Returns:
        (1, |G|^2, tr(Sigma)), float64 of shape (3,), on the device; zeros where v < 2.
    """
    samples = batch_size((inputs, targets))
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    device = next(iter(parameters.values())).device
    plain = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    weighted = {name: torch.zeros_like(total) for name, total in plain.items()}
    with torch.no_grad():
        each_weight = [number(loss.weight(_rows(targets, i, i + 1)), device) for i in range(samples)]
    weights = torch.stack(each_weight) if each_weight else torch.zeros(0, dtype=torch.float64, device=device)
    squares = torch.zeros((), dtype=torch.float64, device=device)
    gradient = vmap(grad(_summed(model, loss)), in_dims=(None, 0, 0), randomness="different")
    for begin in range(0, samples, chunk):
        end = begin + chunk
        gradients = gradient(parameters, _rows(inputs, begin, end), _rows(targets, begin, end))
        for name, each in gradients.items():
            each = each.double()
            squares += each.square().sum()
            plain[name] += each.sum(0)
            weighted[name] += torch.tensordot(weights[begin:end], each, 1)
    weight = weights.sum()
    mean_square = _dot(plain, plain) / weight.square()
    spread = squares - 2 * _dot(plain, weighted) / weight + mean_square * weights.square().sum()
    some = weights.count_nonzero().double()
    variance = some / (some - 1) * spread / weight.square()
    moments = torch.stack([torch.ones_like(weight), mean_square - variance, samples * variance])
    return torch.where(some < 2, 0.0, moments)


def _summed(model: nn.Module, loss: WindowLoss) -> Callable[..., Tensor]:
    """The weighted sum of one sample's losses as a function of the parameters. Buffers stay as they are."""

    def total(parameters: dict[str, Tensor], inputs: Nested, targets: Nested) -> Tensor:
        inputs, targets = (map_tensors(lambda t: t.unsqueeze(0), one) for one in (inputs, targets))
        # Copied here: vmap allows in-place writes only to tensors made inside the function.
        buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        if isinstance(inputs, Mapping):
            outputs = functional_call(model, (parameters, buffers), (), dict(inputs))
        else:
            given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
            outputs = functional_call(model, (parameters, buffers), given)
        return loss.total(outputs, targets)

    return total


def _rows(batch: Nested, begin: int, end: int) -> Nested:
    return map_tensors(lambda t: t[begin:end], batch)


def _dot(one: dict[str, Tensor], other: dict[str, Tensor]) -> Tensor:
    return torch.stack([(one[name] * other[name]).sum() for name in one]).sum()


@contextmanager
def _undisturbed(seed: int, device: torch.device) -> Iterator[None]:
    """Restores all generators afterwards; the CPU's start from `seed`."""
    on_host = device.type == "cpu"
    forked = nullcontext() if on_host else torch.random.fork_rng([device], device_type=device.type)
    with drawn_from(seed), forked:
        yield
