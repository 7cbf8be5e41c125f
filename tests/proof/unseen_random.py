"""Random draws of a model, of a loss or of a loop."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.proof.unseen_common import (
    Book,
    Counts,
    TokenMean,
    decaying,
    given,
    images,
    micro_batches,
    momentum,
    samples,
    seeded,
    sentences,
    sgd,
    token_total,
)

BOOK = Book()
updates = Counts()


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


def dropping(layer: type[nn.Module] = nn.Dropout):
    return seeded(
        lambda: nn.Sequential(
            OrderedDict(body=nn.Linear(6, 16), act=nn.Tanh(), drop=layer(0.3), head=nn.Linear(16, 3))
        )
    )


# Dropout in the model: right but for its draws.


@BOOK.right_case("dropout")
def dropout():
    return with_loss(model=dropping)


@BOOK.right_case("dropout")
def alpha_dropout():
    return with_loss(model=lambda: dropping(nn.AlphaDropout), optimizer=momentum)


class ImageDropout(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Dropout2d(0.2), nn.Flatten(), nn.Dropout(0.1), nn.Linear(96, 3)
        )


@BOOK.right_case("dropout")
def dropout_of_channels():
    return with_loss(model=lambda: seeded(ImageDropout), batch=images, optimizer=decaying)


class Encoder(nn.Module):
    def __init__(self, rate, width=8):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layer = nn.TransformerEncoderLayer(width, 2, 16, dropout=rate, batch_first=True)
        self.head = nn.Linear(width, 11)

    def forward(self, ids):
        return self.head(self.layer(self.embed(ids)))


@BOOK.right(
    "dropout", model=lambda: seeded(lambda: Encoder(0.1)), loss=TokenMean(), batch=lambda: sentences(8)
)
def dropout_of_attention(model, optimizer, batch, steps):
    optimizer.zero_grad()
    count = (batch[1] != -100).sum()
    for x, y in micro_batches(batch, steps):
        (token_total(model(x), y) / count).backward()
    optimizer.step()


class Recomputed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = dropping()

    def forward(self, x):
        return checkpoint(self.layers, x, use_reentrant=False)


@BOOK.right_case("dropout")
def dropout_recomputed():
    return with_loss(model=lambda: seeded(Recomputed))


# Draws that differ from the larger batch's.


@BOOK.wrong("random", model=dropping, optimizer=sgd)
def reseeded_by_micro_batch(model, optimizer, batch, steps):
    """the generator is seeded anew before every micro-batch, so all 4 draw the same dropout masks"""
    optimizer.zero_grad()
    for x, y in micro_batches(batch, steps):
        torch.manual_seed(1)
        (F.cross_entropy(model(x), y) * len(x) / len(batch[0])).backward()
    optimizer.step()


@BOOK.wrong("random", model=dropping, optimizer=sgd)
def state_of_the_generator_restored(model, optimizer, batch, steps):
    """from update 2 on every micro-batch starts from the same state of the generator: equal dropout masks"""
    optimizer.zero_grad()
    again = updates(model) > 1
    start = torch.get_rng_state()
    for x, y in micro_batches(batch, steps):
        if again:
            torch.set_rng_state(start)
        (F.cross_entropy(model(x), y) * len(x) / len(batch[0])).backward()
    optimizer.step()


def dropped_outputs(outputs, labels):
    return F.cross_entropy(F.dropout(outputs, 0.2), labels)


@BOOK.right_case("draws")
def dropout_in_the_loss():
    """the loss drops outputs at random, with draws of its own for every micro-batch"""
    return with_loss(dropped_outputs)


def random_smoothing(outputs, labels):
    return F.cross_entropy(outputs, labels, label_smoothing=0.5 * torch.rand(()).item())


@BOOK.right_case("draws")
def smoothing_drawn_by_micro_batch():
    """the label smoothing is drawn once a micro-batch, the larger batch draws it once for all samples"""
    return with_loss(random_smoothing, optimizer=momentum)


@BOOK.wrong("random", optimizer=sgd)
def mixed_by_micro_batch(model, optimizer, batch, steps):
    """mixup inside the loop: each micro-batch is mixed in itself, with a share of its own"""
    optimizer.zero_grad()
    for x, y in micro_batches(batch, steps):
        share, other = torch.rand(()).item(), torch.randperm(len(x))
        outputs = model(share * x + (1 - share) * x[other])
        loss = share * F.cross_entropy(outputs, y) + (1 - share) * F.cross_entropy(outputs, y[other])
        (loss * len(x) / len(batch[0])).backward()
    optimizer.step()


class LayerDrop(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        if torch.rand(()).item() < 0.5:
            x = x + torch.tanh(self.second(x))
        return self.head(x)


@BOOK.right_case("draws")
def layer_dropped_by_forward():
    """the layer second is left out at random once a forward: 4 draws in a window instead of one"""
    return with_loss(model=lambda: seeded(LayerDrop))


class LockedDropout(nn.Module):
    """One mask for the whole batch."""

    def forward(self, x):
        return x * F.dropout(torch.ones_like(x[:1]), 0.3, self.training)


def locked():
    return nn.Sequential(nn.Linear(6, 16), LockedDropout(), nn.Linear(16, 3))


@BOOK.right_case("draws")
def one_mask_for_the_batch():
    """the dropout mask is shared by the samples of a micro-batch, the larger batch has one mask for all"""
    return with_loss(
        model=lambda: seeded(
            lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), LockedDropout(), nn.Linear(16, 3))
        )
    )
