"""Loops whose model receives other rows than the batch's, or not all of them, though every sample counts."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from tests.proof.unseen_common import (
    Book,
    TokenMean,
    generator,
    micro_batches,
    mlp,
    momentum,
    seeded,
    sentences,
    sgd,
    tagger,
    token_total,
    two_layers,
)

BOOK = Book()
TOKENS = dict(model=tagger, batch=sentences, loss=TokenMean())


def packed(model, labelled):
    ids, labels = labelled
    return F.cross_entropy(model(ids[labels != -100]), labels[labels != -100], reduction="sum")


@BOOK.right("rows", **TOKENS, optimizer=sgd)
def tokens_packed_without_padding(model, optimizer, batch, steps):
    for part in micro_batches(batch, steps):
        (packed(model, part) / (batch[1] != -100).sum()).backward()
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("rows", **TOKENS, optimizer=sgd)
def mean_of_packed_tokens(model, optimizer, batch, steps):
    """a mean over the packed tokens of each micro-batch, then a mean of these"""
    parts = micro_batches(batch, steps)
    for part in parts:
        (packed(model, part) / (part[1] != -100).sum() / len(parts)).backward()
    optimizer.step()
    optimizer.zero_grad()


@BOOK.right("rows", **TOKENS)
def sentences_in_one_row(model, optimizer, batch, steps):
    for ids, labels in micro_batches(batch, steps):
        logits = model(ids.reshape(1, -1))
        (token_total(logits, labels.reshape(1, -1)) / (batch[1] != -100).sum()).backward()
    optimizer.step()
    optimizer.zero_grad()


class Score(nn.Module):
    """A number for every row of features."""

    def __init__(self):
        super().__init__()
        self.net = two_layers(6, 8, 1)

    def forward(self, x):
        return self.net(x).squeeze(-1)


def preferences():
    g = generator(9)
    return torch.randn(24, 2, 6, generator=g), torch.arange(24) % 5 - 2.0


class Preferred:
    """Bradley and Terry's loss over the pairs that were judged: of margins that are not 0."""

    def weight(self, margins):
        return (margins != 0).sum()

    def total(self, scores, margins):
        return -(F.logsigmoid(margins * (scores[:, 0] - scores[:, 1])) * (margins != 0)).sum()


PAIRS = dict(model=lambda: seeded(Score), batch=preferences, loss=Preferred())


def judged_pairs(model, pairs, margins):
    first, second = model(torch.cat([pairs[:, 0], pairs[:, 1]])).chunk(2)
    return -F.logsigmoid(margins * (first - second)).sum()


@BOOK.right("rows", **PAIRS, optimizer=momentum)
def pairs_that_were_judged_alone(model, optimizer, batch, steps):
    for pairs, margins in micro_batches(batch, steps):
        judged = margins != 0
        (judged_pairs(model, pairs[judged], margins[judged]) / (batch[1] != 0).sum()).backward()
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("rows", **PAIRS)
def mean_of_judged_pairs(model, optimizer, batch, steps):
    """pairs that were not judged are left out, and each micro-batch is divided by how many it has left"""
    parts = micro_batches(batch, steps)
    for pairs, margins in parts:
        judged = margins != 0
        scores = model(pairs[judged])
        loss = Preferred().total(scores, margins[judged]) / judged.sum()
        (loss / len(parts)).backward()
    optimizer.step()
    optimizer.zero_grad()


@BOOK.right("rows")
def padded_to_a_fixed_size(model, optimizer, batch, steps):
    for x, y in zip(batch[0].split(6), batch[1].split(6), strict=True):
        rows, labels = torch.zeros(6, 6, dtype=x.dtype), torch.full((6,), -100)
        rows[: len(x)], labels[: len(x)] = x, y
        (F.cross_entropy(model(rows), labels, reduction="sum") / len(batch[0])).backward()
    optimizer.step()
    optimizer.zero_grad()


def half_ignored():
    ids, labels = sentences()
    labels[4:8] = -100
    return ids, labels


@BOOK.right("rows", model=tagger, batch=half_ignored, loss=TokenMean())
def micro_batches_without_targets_left_out(model, optimizer, batch, steps):
    for ids, labels in micro_batches(batch, steps):
        if (labels != -100).any():
            (token_total(model(ids), labels) / (batch[1] != -100).sum()).backward()
    optimizer.step()
    optimizer.zero_grad()


@BOOK.right("rows", optimizer=sgd)
def every_second_on_a_copy(model, optimizer, batch, steps):
    other = copy.deepcopy(model)
    for number, (x, y) in enumerate(micro_batches(batch, steps)):
        (F.cross_entropy((model, other)[number % 2](x), y, reduction="sum") / len(batch[0])).backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        if q.grad is not None:
            p.grad += q.grad
    optimizer.step()
    optimizer.zero_grad()


def rising():
    return torch.rand(24, 6, generator=generator(8)) + 0.5, torch.ones(24, 1)


def weighted_output(outputs, targets):
    return (outputs * targets).mean()


@BOOK.wrong(
    "rows",
    model=lambda: seeded(lambda: nn.Linear(6, 1)),
    batch=rising,
    loss=weighted_output,
    optimizer=sgd,
    clip_value=1e-3,
)
def last_sample_hidden_by_clamping(model, optimizer, batch, steps):
    """the last sample never counts, which a gradient whose elements are all clamped does not show"""
    for x, y in micro_batches((batch[0][:-1], batch[1][:-1]), steps):
        ((model(x) * y).sum() / len(batch[0])).backward()
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    optimizer.step()
    optimizer.zero_grad()


@BOOK.right("rows", model=mlp, optimizer=sgd)
def divided_in_a_hook_of_the_optimizer(model, optimizer, batch, steps):
    def divide(stepped, *_):
        for p in model.parameters():
            p.grad /= len(batch[0])

    for x, y in micro_batches(batch, steps):
        F.cross_entropy(model(x), y, reduction="sum").backward()
    with optimizer.register_step_pre_hook(divide):
        optimizer.step()
    optimizer.zero_grad()
