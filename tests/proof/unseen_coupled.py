"""Losses that couple the samples of a batch, and loops that keep them whole."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.proof.unseen_common import (
    Book,
    generator,
    given,
    micro_batches,
    momentum,
    regressor,
    samples,
    seeded,
    sgd,
    two_layers,
    values,
)

BOOK = Book()


def looping(loss):
    """The plain loop with this loss."""

    def train_window(model, optimizer, batch, steps):
        optimizer.zero_grad()
        for x, y in micro_batches(batch, steps):
            outputs = model(*x) if isinstance(x, tuple) else model(x)
            (loss(outputs, y) * (samples(y) / samples(batch[1]))).backward()
        optimizer.step()

    return train_window


def with_loss(loss=F.cross_entropy, **arguments):
    return given(looping(loss), loss=loss, **{"optimizer": sgd, **arguments})


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = two_layers(6, 10, 4), two_layers(6, 10, 4)

    def forward(self, x, t):
        return F.normalize(self.image(x), dim=1), F.normalize(self.text(t), dim=1)


def pairs(n=16):
    g = generator(31)
    x = torch.randn(n, 6, generator=g)
    return (x, x.roll(1, 1) + 0.3 * torch.randn(n, 6, generator=g)), torch.arange(n)


def info_nce(outputs, _):
    logits = outputs[0] @ outputs[1].T / 0.3
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


TOWERS = dict(model=lambda: seeded(Towers), batch=pairs)


@BOOK.wrong_case("coupled")
def contrast_within_micro_batches():
    """the contrastive loss compares with the 4 samples of a micro-batch, not with all 16"""
    return with_loss(info_nce, **TOWERS)


@BOOK.right("coupled", loss=info_nce, optimizer=sgd, **TOWERS)
def cached_contrast(model, optimizer, batch, steps):
    """Embeddings first, the loss over all of them, then each micro-batch again with its gradient."""
    optimizer.zero_grad()
    parts = micro_batches(batch, steps)
    with torch.no_grad():
        outputs = [model(*x) for x, _ in parts]
    leaves = [torch.cat(o).requires_grad_() for o in zip(*outputs, strict=True)]
    slopes = torch.autograd.grad(info_nce(leaves, batch[1]), leaves)
    start = 0
    for x, y in parts:
        grads = [slope[start : start + len(y)] for slope in slopes]
        torch.autograd.backward(model(*x), grads)
        start += len(y)
    optimizer.step()


def decorrelated(outputs, labels):
    centred = outputs - outputs.mean(0)
    covariance = centred.T @ centred / len(outputs)
    return F.cross_entropy(outputs, labels) + 0.1 * (covariance - covariance.diag().diag()).square().sum()


@BOOK.wrong_case("coupled")
def covariance_of_the_micro_batch():
    """the penalty takes the covariance of the outputs over 6 of 24 samples"""
    return with_loss(decorrelated, optimizer=momentum)


def ranks(outputs, targets):
    scores, wanted = outputs[:, 0], targets[:, 0]
    better = (wanted[:, None] > wanted[None, :]).to(scores.dtype)
    return (F.softplus(scores[None, :] - scores[:, None]) * better).sum() / len(scores) ** 2


@BOOK.wrong_case("coupled")
def ranks_within_micro_batches():
    """the rank loss compares pairs within a micro-batch: pairs across micro-batches have no loss"""
    return with_loss(ranks, model=regressor, batch=values)


def standardised(outputs, targets):
    scaled = (targets - targets.mean()) / (targets.std(unbiased=False) + 1e-3)
    return F.mse_loss(outputs, scaled)


@BOOK.wrong_case("coupled")
def targets_scaled_by_micro_batch():
    """the targets are standardised over the 5 samples of a micro-batch, not over all 20"""
    return with_loss(standardised, model=regressor, batch=values)


@BOOK.right("coupled", loss=standardised, model=regressor, batch=values, optimizer=sgd)
def targets_scaled_by_the_window(model, optimizer, batch, steps):
    optimizer.zero_grad()
    inputs, targets = batch
    scaled = (targets - targets.mean()) / (targets.std(unbiased=False) + 1e-3)
    for x, y in micro_batches((inputs, scaled), steps):
        (F.mse_loss(model(x), y) * len(x) / len(inputs)).backward()
    optimizer.step()


def dice(outputs, masks):
    chance = outputs.sigmoid()
    return 1 - (2 * (chance * masks).sum() + 1) / (chance.sum() + masks.sum() + 1)


@BOOK.wrong_case("coupled")
def dice_of_the_micro_batch():
    """the dice loss divides sums over 5 of 20 samples, it is no mean over samples"""
    return with_loss(dice, model=regressor, batch=lambda: (values()[0], (values()[1] > 0.2).float()))


@BOOK.right_case("coupled")
def triplets():
    """Each sample brings its own positive and negative."""
    return with_loss(
        lambda outputs, _: F.triplet_margin_loss(*outputs),
        model=lambda: seeded(Siblings),
        batch=lambda: (tuple(pairs()[0][0].roll(k, 1) for k in range(3)), torch.zeros(16)),
    )


class Siblings(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = two_layers(6, 10, 4)

    def forward(self, *inputs):
        return tuple(self.tower(x) for x in inputs)
