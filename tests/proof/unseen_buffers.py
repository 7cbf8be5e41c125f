"""Models with buffers and normalisation, where one forward a micro-batch matters or does not."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from tests.proof.unseen_common import (
    Book,
    decaying,
    given,
    images,
    micro_batches,
    momentum,
    seeded,
    sgd,
    two_layers,
)

BOOK = Book()


def plain(model, optimizer, batch, steps):
    """The loop of all these models: weighted by size, one step."""
    optimizer.zero_grad()
    for x, y in micro_batches(batch, steps):
        (F.cross_entropy(model(x), y) * len(x) / len(batch[0])).backward()
    optimizer.step()


def same_loop(model, **arguments):
    """The arguments for a model (a class or a function that makes one) in the plain loop."""
    return given(plain, model=lambda: seeded(model), **{"optimizer": sgd, **arguments})


class Counted(nn.Module):
    """Watches its inputs as ``watch`` says."""

    def __init__(self, watch):
        super().__init__()
        self.layers = two_layers(6, 12, 3)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("largest", torch.zeros(6))
        self.watch = watch

    def forward(self, x):
        with torch.no_grad():
            self.watch(self, x)
        return self.layers(x - self.mean if self.watch is first_mean else x)


def samples_seen(model, x):
    model.seen += len(x)
    model.mean += x.sum(0)


def calls(model, x):
    model.seen += 1


def running_mean(model, x):
    model.mean.lerp_(x.mean(0), 0.1)


def running_mean_later(model, x):
    if model.seen > 0:
        model.mean.lerp_(x.mean(0), 0.1)
    model.seen.fill_(1)


def largest(model, x):
    model.largest.copy_(torch.maximum(model.largest, x.abs().amax(0)))


def first_mean(model, x):
    if int(model.seen) == 0:
        model.mean.copy_(x.mean(0))
        model.seen.fill_(1)


@BOOK.right_case("buffer")
def counts_and_sums_its_samples():
    return same_loop(lambda: Counted(samples_seen))


@BOOK.right_case("buffer")
def remembers_the_largest():
    return same_loop(lambda: Counted(largest), optimizer=momentum)


@BOOK.wrong_case("buffer")
def counts_its_calls():
    """the buffer seen counts forwards, 4 in an update instead of one"""
    return same_loop(lambda: Counted(calls))


@BOOK.wrong_case("buffer")
def mean_by_micro_batch():
    """the buffer mean moves at every forward, 4 times in an update"""
    return same_loop(lambda: Counted(running_mean), optimizer=decaying)


@BOOK.wrong_case("buffer")
def mean_by_micro_batch_later():
    """the buffer mean moves at every forward but the model's first: 3 times in update 1, then 4 times"""
    return same_loop(lambda: Counted(running_mean_later))


@BOOK.wrong_case("buffer")
def mean_of_the_first_micro_batch():
    """the inputs are centred by the mean of update 1's first micro-batch, not of the whole batch"""
    return same_loop(lambda: Counted(first_mean))


class Annealed(nn.Module):
    """Its temperature falls with every forward."""

    temperature: torch.Tensor

    def __init__(self):
        super().__init__()
        self.layers = two_layers(6, 12, 3)
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, x):
        outputs = self.layers(x) / self.temperature.clone()
        self.temperature.mul_(0.99)
        return outputs


@BOOK.wrong_case("buffer")
def temperature_by_forward():
    """the temperature falls at every forward: micro-batch 2 has 0.99 times that of micro-batch 1"""
    return same_loop(Annealed)


@BOOK.right_case("buffer")
def temperature_once_a_window():
    class Model(Annealed):
        def forward(self, x):
            return self.layers(x) / self.temperature

    def train_window(model, optimizer, batch, steps):
        plain(model, optimizer, batch, steps)
        model.temperature.mul_(0.99)

    return given(train_window, model=lambda: seeded(Model), optimizer=sgd)


def normalised(layer):
    return lambda: nn.Sequential(
        OrderedDict(body=nn.Linear(6, 12), norm=layer(12), act=nn.ReLU(), head=nn.Linear(12, 3))
    )


class FrozenNorm(nn.BatchNorm1d):
    """Batch normalisation that stays in evaluation, as in fine-tuned detectors."""

    def __init__(self, features):
        super().__init__(features)
        self.register_buffer("running_mean", torch.randn(features) * 0.3)
        self.register_buffer("running_var", torch.rand(features) + 0.5)
        self.eval()

    def train(self, mode=True):
        return super().train(False)


@BOOK.wrong_case("batchnorm")
def batch_norm():
    """norm (BatchNorm1d) takes its statistics over 6 of 24 samples"""
    return same_loop(normalised(nn.BatchNorm1d), drop_last=True)


@BOOK.wrong_case("batchnorm")
def batch_norm_without_buffers():
    """norm (BatchNorm1d) takes its statistics over 6 of 24 samples"""
    return same_loop(normalised(lambda n: nn.BatchNorm1d(n, track_running_stats=False)), drop_last=True)


@BOOK.right_case("batchnorm")
def frozen_batch_norm():
    return same_loop(normalised(FrozenNorm), optimizer=momentum)


@BOOK.right_case("batchnorm")
def layer_norm():
    return same_loop(normalised(nn.LayerNorm), optimizer=decaying)


@BOOK.right_case("batchnorm")
def group_norm():
    return same_loop(normalised(lambda n: nn.GroupNorm(3, n)))


class Convolutions(nn.Sequential):
    def __init__(self, norm):
        super().__init__(
            nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
        )


@BOOK.wrong_case("batchnorm")
def batch_norm_of_images():
    """1 (BatchNorm2d) takes its statistics over 4 of 16 images"""
    return same_loop(lambda: Convolutions(nn.BatchNorm2d(4)), batch=images)


@BOOK.wrong_case("batchnorm")
def batch_norm_with_frozen_statistics_only():
    """1 (BatchNorm2d, momentum 0) keeps its buffers but still normalises by 4 of 16 images"""
    return same_loop(lambda: Convolutions(nn.BatchNorm2d(4, momentum=0.0)), batch=images, optimizer=momentum)


@BOOK.wrong_case("buffer")
def instance_norm_with_statistics():
    """1 (InstanceNorm2d) normalises each image by itself but its running statistics move at every forward"""
    return same_loop(lambda: Convolutions(nn.InstanceNorm2d(4, track_running_stats=True)), batch=images)


@BOOK.right_case("batchnorm")
def instance_norm():
    """The bias before the normalisation has no gradient but rounding."""
    return same_loop(
        lambda: Convolutions(nn.InstanceNorm2d(4, affine=True)), batch=images, optimizer=decaying
    )
