"""Loops whose micro-batches count by their place, and models and losses that couple samples out of sight."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.proof.unseen_common import (
    Book,
    Tagger,
    TokenMean,
    given,
    micro_batches,
    momentum,
    regressor,
    seeded,
    sentences,
    sgd,
    tagger,
    token_total,
    two_layers,
    values,
)

BOOK = Book()


@BOOK.wrong("tokens", model=tagger, batch=sentences, loss=TokenMean(), optimizer=sgd)
def tokens_so_far(model, optimizer, batch, steps):
    """divided by the tokens that the window has had so far, not by all of its tokens"""
    count = 0
    for ids, labels in micro_batches(batch, steps):
        count += (labels != -100).sum()
        (token_total(model(ids), labels) / count).backward()
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("average", optimizer=sgd, drop_last=True)
def moving_average_of_gradients(model, optimizer, batch, steps):
    """a moving average of the micro-batches' gradients instead of their mean"""
    parameters, kept = list(model.parameters()), None
    for x, y in micro_batches(batch, steps):
        new = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
        kept = new if kept is None else [0.7 * a + 0.3 * b for a, b in zip(kept, new, strict=True)]
    for p, g in zip(parameters, kept or (), strict=True):
        p.grad = g
    optimizer.step()


@BOOK.wrong("scale", optimizer=sgd)
def unscaled_by_1024_each_time(model, optimizer, batch, steps):
    """what .grad holds is divided by the loss scale after every micro-batch"""
    optimizer.zero_grad()
    for x, y in micro_batches(batch, steps):
        (1024 * F.cross_entropy(model(x), y, reduction="sum") / len(batch[0])).backward()
        for p in model.parameters():
            p.grad /= 1024
    optimizer.step()


class Root(nn.Module):
    """The root of the mean square error."""

    couples = True

    def forward(self, outputs, targets):
        return (outputs - targets).square().mean().sqrt()


@BOOK.wrong("coupled", model=regressor, batch=values, loss=Root(), optimizer=momentum)
def root_of_each_micro_batch(model, optimizer, batch, steps):
    """the root is taken of each micro-batch's mean square, not of the window's"""
    optimizer.zero_grad()
    for x, y in micro_batches(batch, steps):
        (Root()(model(x), y) * len(x) / len(batch[0])).backward()
    optimizer.step()


class Hardest(nn.Module):
    couples = True

    def forward(self, outputs, targets):
        losses = F.cross_entropy(outputs, targets, reduction="none")
        return losses.topk(max(1, len(losses) // 2)).values.mean()


@BOOK.wrong("coupled", loss=Hardest(), optimizer=sgd)
def declared_half_of_the_largest(model, optimizer, batch, steps):
    """the harder half of each micro-batch, not of the window"""
    optimizer.zero_grad()
    for x, y in micro_batches(batch, steps):
        (Hardest()(model(x), y) * len(x) / len(batch[0])).backward()
    optimizer.step()


def by_frequency():
    model = seeded(Tagger)
    model.embed.scale_grad_by_freq = True
    return model


@BOOK.wrong("coupled", model=by_frequency, batch=sentences, loss=TokenMean(), optimizer=sgd)
def words_scaled_by_frequency(model, optimizer, batch, steps):
    """the embedding divides a word's gradient by how often the micro-batch has it, not the window"""
    optimizer.zero_grad()
    for ids, labels in micro_batches(batch, steps):
        (token_total(model(ids), labels) / (batch[1] != -100).sum()).backward()
    optimizer.step()


class Normalise(torch.autograd.Function):
    """Gives the gradient of a batch a length of 1."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients):
        return gradients[0] / gradients[0].norm()


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(Normalise.apply(torch.tanh(self.body(x))))


@BOOK.wrong("coupled", model=lambda: seeded(Normalised), optimizer=sgd)
def gradient_normalised_in_backward(model, optimizer, batch, steps):
    """the gradient between two layers is normalised over the micro-batch, not over the window"""
    optimizer.zero_grad()
    for x, y in micro_batches(batch, steps):
        (F.cross_entropy(model(x), y, reduction="sum") / len(batch[0])).backward()
    optimizer.step()


def with_penalty(outputs, targets):
    return {"loss": F.cross_entropy(outputs, targets), "z": 0.1 * outputs.logsumexp(1).square().mean()}


@BOOK.wrong("terms", loss=with_penalty, optimizer=sgd, drop_last=True)
def penalty_in_the_last_alone(model, optimizer, batch, steps):
    """the penalty is that of the last micro-batch alone"""
    parts = micro_batches(batch, steps)
    for number, (x, y) in enumerate(parts):
        terms = with_penalty(model(x), y)
        (terms["loss"] / len(parts)).backward(retain_graph=True)
        if number == len(parts) - 1:
            terms["z"].backward()
    optimizer.step()
    optimizer.zero_grad()


class Queue(nn.Module):
    """Contrast of two halves of an output with keys of windows before."""

    couples = True
    keys: Any

    def __init__(self):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(8, 4), dim=1))

    def forward(self, outputs, targets):
        one, other = F.normalize(outputs[:, :4], dim=1), F.normalize(outputs[:, 4:], dim=1)
        logits = torch.cat([(one * other).sum(1, keepdim=True), one @ self.keys.T.to(one)], 1)
        return F.cross_entropy(logits / 0.3, torch.zeros(len(one), dtype=torch.long))

    def put(self, outputs):
        keys = F.normalize(outputs[:, 4:].detach(), dim=1)
        self.keys.copy_(torch.cat([keys, self.keys.to(keys)])[:8])


def queued(loop):
    queue = seeded(Queue)

    def model():
        return seeded(lambda: two_layers(6, 16, 8))

    return given(loop(queue), model=model, loss=queue, optimizer=sgd, state={"queue": queue})


@BOOK.wrong_case("state")
def queue_filled_by_micro_batch():
    """the queue of negatives is filled after every micro-batch, and the next one is contrasted with it"""

    def loop(queue):
        def train_window(model, optimizer, batch, steps):
            optimizer.zero_grad()
            for x, y in micro_batches(batch, steps):
                outputs = model(x)
                (queue(outputs, y) * len(x) / len(batch[0])).backward()
                queue.put(outputs)
            optimizer.step()

        return train_window

    return queued(loop)


@BOOK.right_case("state")
def queue_filled_by_window():
    def loop(queue):
        def train_window(model, optimizer, batch, steps):
            optimizer.zero_grad()
            made = []
            for x, y in micro_batches(batch, steps):
                made.append(model(x))
                (queue(made[-1], y) * len(x) / len(batch[0])).backward()
            queue.put(torch.cat(made))
            optimizer.step()

        return train_window

    return queued(loop)


def squares(outputs, targets):
    return (outputs - targets).square().mean()


def last_is_large():
    x, y = values()
    y[-1] += 9
    return x, y


@BOOK.wrong("samples", model=regressor, batch=last_is_large, loss=squares, optimizer=sgd, drop_last=True)
def stops_when_the_loss_is_large(model, optimizer, batch, steps):
    """the window ends after a micro-batch with a large loss, which was the last one only by chance"""
    optimizer.zero_grad()
    for x, y in micro_batches(batch, steps):
        loss = squares(model(x), y)
        (loss * len(x) / len(batch[0])).backward()
        if loss.item() > 8:
            break
    optimizer.step()
