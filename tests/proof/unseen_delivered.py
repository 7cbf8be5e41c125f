"""Loops in which some micro-batches deliver another gradient than their own, or none, to some parameters."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.proof.unseen_common import (
    Book,
    Tagger,
    TokenMean,
    micro_batches,
    seeded,
    sentences,
    sgd,
    token_total,
)

BOOK = Book()


class Adapter(nn.Module):
    """A frozen layer with two factors of low rank, which are trained."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(3, 2))

    def forward(self, x):
        return self.layer(x) + x @ self.a.T @ self.b.T


@BOOK.wrong("parameters", model=lambda: seeded(Adapter), optimizer=sgd)
def factors_in_turn(model, optimizer, batch, steps):
    """each factor has the gradient of every other micro-batch alone"""
    optimizer.zero_grad()
    for number, (x, y) in enumerate(micro_batches(batch, steps)):
        model.a.requires_grad_(number % 2 == 0)
        model.b.requires_grad_(number % 2 == 1)
        (F.cross_entropy(model(x), y, reduction="sum") / len(batch[0])).backward()
    model.a.requires_grad_(True)
    model.b.requires_grad_(True)
    optimizer.step()


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x):
        hidden = torch.tanh(self.body(x))
        return self.first(hidden), self.second(hidden)


def of_both(outputs, targets):
    return F.cross_entropy(outputs[0], targets) + 0.3 * F.cross_entropy(outputs[1], targets)


@BOOK.wrong("parameters", model=lambda: seeded(TwoHeads), loss=of_both, optimizer=sgd)
def second_head_every_other_time(model, optimizer, batch, steps):
    """the second head's loss is added in every other micro-batch alone"""
    optimizer.zero_grad()
    for number, (x, y) in enumerate(micro_batches(batch, steps)):
        outputs = model(x)
        loss = F.cross_entropy(outputs[0], y) if number % 2 else of_both(outputs, y)
        (loss * len(x) / len(batch[0])).backward()
    optimizer.step()


class Detachable(TwoHeads):
    detached = False

    def forward(self, x):
        hidden = torch.tanh(self.body(x))
        return self.first(hidden), self.second(hidden.detach() if self.detached else hidden)


@BOOK.wrong("parameters", model=lambda: seeded(Detachable), loss=of_both, optimizer=sgd)
def second_head_detached_later(model, optimizer, batch, steps):
    """the second head gives the body no gradient in all micro-batches but the first"""
    optimizer.zero_grad()
    for number, (x, y) in enumerate(micro_batches(batch, steps)):
        model.detached = number > 0
        (of_both(model(x), y) * len(x) / len(batch[0])).backward()
    model.detached = False
    optimizer.step()


@BOOK.wrong("buffer", optimizer=sgd)
def inputs_in_one_buffer(model, optimizer, batch, steps):
    """all micro-batches pass through one buffer, which is overwritten before the only backward pass"""
    parts = micro_batches(batch, steps)
    buffer, total = torch.empty_like(parts[0][0]), torch.zeros(())
    for x, y in parts:
        buffer.data[: len(x)] = x
        outputs = model(buffer.detach()[: len(x)])
        total = total + F.cross_entropy(outputs, y, reduction="sum") / len(batch[0])
    optimizer.zero_grad()
    total.backward()
    optimizer.step()


def many_words():
    return seeded(lambda: Tagger(words=60, sparse=True))


def rare_words():
    ids, labels = sentences(words=60)
    return ids, labels


@BOOK.wrong("sparse", model=many_words, batch=rare_words, loss=TokenMean(), optimizer=sgd)
def rows_overwritten(model: Any, optimizer, batch, steps):
    """a word's row of the gradient is that of the last micro-batch that has it, not the sum"""
    rows = torch.zeros_like(model.embed.weight)
    for ids, labels in micro_batches(batch, steps):
        (token_total(model(ids), labels) / (batch[1] != -100).sum()).backward()
        gradient: Any = model.embed.weight.grad
        gradient = gradient.coalesce()
        rows[gradient.indices()[0]] = gradient.values()
        model.embed.weight.grad = None
    model.embed.weight.grad = rows
    optimizer.step()
    optimizer.zero_grad()
