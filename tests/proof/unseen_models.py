"""Right loops on models of many forms: the loop is plain, the model or its inputs are not."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tests.proof.unseen_common import (
    Book,
    TokenMean,
    adam,
    classes,
    decaying,
    generator,
    given,
    grouped,
    micro_batches,
    momentum,
    samples,
    seeded,
    sentences,
    sgd,
    token_loss,
    token_total,
    two_layers,
)

BOOK = Book()


def call(model, inputs):
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def plain(model, loss=F.cross_entropy, **arguments):
    """The arguments of the plain loop on this model: losses weighted by the samples of their micro-batch."""

    def train_window(model, optimizer, batch, steps):
        optimizer.zero_grad()
        n = samples(batch[0])
        for x, y in micro_batches(batch, steps):
            (loss(call(model, x), y) * (samples(x) / n)).backward()
        optimizer.step()

    return given(train_window, model=lambda: seeded(model), loss=loss, **{"optimizer": sgd, **arguments})


class Recomputing(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.reentrant = reentrant

    def block(self, x):
        return x + torch.tanh(self.second(x))

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.head(checkpoint(self.block, x, use_reentrant=self.reentrant))


@BOOK.right_case("model")
def checkpoint_reentrant():
    return plain(lambda: Recomputing(True), optimizer=momentum)


@BOOK.right_case("model")
def checkpoint_without_reentry():
    return plain(lambda: Recomputing(False), optimizer=decaying)


class Molecules(nn.Module):
    """Energies, and forces as their gradient by the positions."""

    def __init__(self):
        super().__init__()
        self.layers = two_layers(3, 10, 1)

    def forward(self, positions):
        positions.requires_grad_()
        distances = (positions[:, :, None] - positions[:, None]).square().sum(-1)
        energy = self.layers(distances).sum((1, 2))
        (slope,) = torch.autograd.grad(energy.sum(), positions, create_graph=True)
        return dict(energy=energy, forces=-slope)


def atoms(n=12):
    g = generator(41)
    targets = dict(energy=torch.randn(n, generator=g), forces=torch.randn(n, 3, 3, generator=g))
    return torch.randn(n, 3, 3, generator=g), targets


def energies_and_forces_loss(outputs, targets):
    return F.mse_loss(outputs["energy"], targets["energy"]) + F.l1_loss(outputs["forces"], targets["forces"])


@BOOK.right_case("model")
def energies_and_forces():
    return plain(Molecules, energies_and_forces_loss, batch=atoms, steps=3, optimizer=adam)


def tokens_to_class(n=16):
    ids, labels = sentences(n)
    return ids, labels[:, 0] % 3


class Bag(nn.Module):
    def __init__(self, frozen_head=False):
        super().__init__()
        self.bag = nn.EmbeddingBag(11, 8, mode="sum", sparse=True)
        self.head = nn.Linear(8, 3).requires_grad_(not frozen_head)

    def forward(self, ids):
        return self.head(self.bag(ids))


@BOOK.right_case("model")
def sparse_with_sgd():
    return plain(Bag, batch=tokens_to_class)


def sparse_adam(parameters):
    return torch.optim.SparseAdam([p for p in parameters if p.requires_grad], lr=0.01)


@BOOK.right_case("model")
def sparse_with_sparse_adam():
    return plain(lambda: Bag(True), batch=tokens_to_class, optimizer=sparse_adam)


class InPlace(nn.Module):
    """Normalises each sample of its input in place."""

    def __init__(self):
        super().__init__()
        self.layers = two_layers(6, 12, 3)

    def forward(self, x):
        x.sub_(0.5).div_(1.5)
        return self.layers(x)


@BOOK.right_case("model")
def input_normalised_in_place():
    return plain(InPlace)


@dataclass
class Output:
    logits: torch.Tensor
    cache: object = None
    scale: float = 1.0
    hidden: tuple | None = None


class Options(nn.Module):
    """Takes a temperature without dimensions, flags, and gives a dataclass with a cache."""

    def __init__(self):
        super().__init__()
        self.layers = two_layers(6, 12, 3)

    def forward(self, x, temperature, use_cache=False, mode="logits", mask=None):
        hidden = self.layers.act(self.layers.body(x if mask is None else x * mask))
        cache = SimpleNamespace(length=len(x)) if use_cache else None
        return Output(self.layers.head(hidden) / temperature, cache, 0.5, (hidden, None))


def options():
    x, y = classes()
    return dict(x=x, temperature=torch.tensor(1.5), use_cache=True, mode="logits", mask=None), y


@BOOK.right_case("arguments")
def keywords_without_samples():
    return plain(Options, lambda out, y: F.cross_entropy(out.logits, y), batch=options)


class ReturnsLoss(nn.Module):
    """As in transformers: labels go in, the loss comes out with the logits."""

    def __init__(self):
        super().__init__()
        self.layers = two_layers(6, 12, 3)

    def forward(self, features, labels=None):
        logits = self.layers(features)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits, past=None)


def labelled():
    x, y = classes()
    return dict(features=x, labels=y), y


@BOOK.right_case("arguments")
def labels_into_the_model():
    return plain(ReturnsLoss, lambda out, _: out.loss, batch=labelled, optimizer=momentum)


class Causal(nn.Module):
    """A tied language model that divides by a number of tokens if it gets one."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mix = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids, labels=None, num_items=None):
        logits = self.head(self.mix(self.embed(ids))[0])
        loss = None
        if labels is not None:
            loss = (
                token_loss(logits, labels) if num_items is None else token_total(logits, labels) / num_items
            )
        return loss, logits


class LogitsMean(TokenMean):
    def total(self, logits, labels):
        return token_total(logits[1], labels)


def causal():
    ids, labels = sentences()
    return dict(ids=ids, labels=labels, num_items=(labels != -100).sum()), labels


@BOOK.right("arguments", model=lambda: seeded(Causal), batch=causal, loss=LogitsMean(), optimizer=decaying)
def number_of_items_into_the_model(model, optimizer, batch, steps):
    optimizer.zero_grad()
    inputs, labels = batch
    inputs = {**inputs, "num_items": (labels != -100).sum()}
    for x, _ in micro_batches((inputs, labels), steps):
        model(**x)[0].backward()
    optimizer.step()


@BOOK.wrong("tokens", model=lambda: seeded(Causal), batch=causal, loss=LogitsMean(), optimizer=sgd)
def number_of_items_ignored(model, optimizer, batch, steps):
    """the number of tokens is not passed on: the mean of each micro-batch is taken and divided by 4"""
    optimizer.zero_grad()
    parts = micro_batches(batch, steps)
    for x, _ in parts:
        (model(ids=x["ids"], labels=x["labels"])[0] / len(parts)).backward()
    optimizer.step()


def weight_normed():
    model = two_layers(6, 12, 3)
    parametrizations.weight_norm(model.body)
    return model


@BOOK.right_case("model")
def weight_norm():
    return plain(weight_normed, optimizer=momentum)


def spectral():
    model = two_layers(6, 12, 3)
    parametrizations.spectral_norm(model.body)
    return model


@BOOK.wrong_case("buffer")
def spectral_norm():
    """the spectral norm of body.weight iterates at every forward: micro-batch 2 has another weight than 1"""
    return plain(spectral)


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).mT


def symmetric():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Symmetric())
    return model


@BOOK.right_case("model")
def symmetric_weight():
    return plain(symmetric, optimizer=grouped)
