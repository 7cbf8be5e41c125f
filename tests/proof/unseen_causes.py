"""Loops whose cause is hard to tell: kept gradients, modes, losses that are no mean, gradients of nothing."""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.proof.unseen_common import (
    Book,
    TokenMean,
    classes,
    given,
    micro_batches,
    momentum,
    seeded,
    sentences,
    sgd,
    token_total,
    two_layers,
)

BOOK = Book()


def accumulate(model, batch, steps, loss=F.cross_entropy):
    for x, y in micro_batches(batch, steps):
        (loss(model(x), y) * len(y) / len(batch[1])).backward()


def late(optimizer, model, windows):
    """Gives the optimizer the gradient of some windows before."""
    queue = optimizer.__dict__.setdefault("queue", [])
    queue.append([p.grad.clone() for p in model.parameters()])
    if len(queue) > windows:
        for p, old in zip(model.parameters(), queue[-1 - windows], strict=True):
            p.grad.copy_(old)


@BOOK.wrong("state", optimizer=momentum)
def gradient_of_the_window_before(model, optimizer, batch, steps):
    """the optimizer receives the gradient of the window before"""
    optimizer.zero_grad()
    accumulate(model, batch, steps)
    late(optimizer, model, 1)
    optimizer.step()


@BOOK.wrong("state", optimizer=momentum)
def gradient_two_windows_late(model, optimizer, batch, steps):
    """the optimizer receives the gradient of two windows before"""
    optimizer.zero_grad()
    accumulate(model, batch, steps)
    late(optimizer, model, 2)
    optimizer.step()


def dropping():
    return seeded(lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 3)))


@BOOK.wrong("draws", model=dropping, optimizer=sgd)
def dropout_in_the_first_alone(model, optimizer, batch, steps):
    """all micro-batches but the first are computed in eval mode, without dropout"""
    optimizer.zero_grad()
    for number, (x, y) in enumerate(micro_batches(batch, steps)):
        model.train(number == 0)
        (F.cross_entropy(model(x), y) * len(x) / len(batch[0])).backward()
    model.train()
    optimizer.step()


def half_of_the_largest(outputs, targets):
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return losses.topk(max(1, len(losses) // 2)).values.mean()


@BOOK.wrong("coupled", loss=half_of_the_largest, optimizer=sgd)
def hardest_of_each_micro_batch(model, optimizer, batch, steps):
    """the hardest half is that of each micro-batch"""
    optimizer.zero_grad()
    accumulate(model, batch, steps, half_of_the_largest)
    optimizer.step()


def by_frequency(outputs, targets):
    number = torch.bincount(targets, minlength=3).clamp(min=1)
    return (F.cross_entropy(outputs, targets, reduction="none") / number[targets]).sum() / 3


@BOOK.wrong("coupled", loss=by_frequency, optimizer=sgd)
def frequencies_of_each_micro_batch(model, optimizer, batch, steps):
    """classes are weighed by how often they are in the micro-batch"""
    optimizer.zero_grad()
    accumulate(model, batch, steps, by_frequency)
    optimizer.step()


class WithInputs(nn.Module):
    """Returns its inputs too, so that a loss can differentiate by them."""

    def __init__(self):
        super().__init__()
        self.net = two_layers(6, 16, 3)

    def forward(self, x):
        x = x.detach().requires_grad_()
        return x, self.net(x)


def with_inputs():
    return seeded(WithInputs)


def slopes(outputs):
    inputs, logits = outputs
    return torch.autograd.grad(logits.sum(), inputs, create_graph=True)[0]


def norm_of_all_slopes(outputs, targets):
    return F.cross_entropy(outputs[1], targets) + 0.1 * slopes(outputs).norm()


def mean_of_slopes(outputs, targets):
    return F.cross_entropy(outputs[1], targets) + 0.1 * slopes(outputs).norm(dim=1).mean()


@BOOK.wrong("coupled", model=with_inputs, loss=norm_of_all_slopes, optimizer=sgd)
def slopes_of_each_micro_batch(model, optimizer, batch, steps):
    """the norm of the gradients by the inputs is that of each micro-batch"""
    optimizer.zero_grad()
    accumulate(model, batch, steps, norm_of_all_slopes)
    optimizer.step()


@BOOK.right("plain", model=with_inputs, loss=mean_of_slopes, optimizer=sgd)
def slopes_by_sample(model, optimizer, batch, steps):
    optimizer.zero_grad()
    accumulate(model, batch, steps, mean_of_slopes)
    optimizer.step()


@BOOK.right("memory", model=with_inputs, loss=mean_of_slopes, optimizer=sgd)
def slopes_in_one_backward(model, optimizer, batch, steps):
    optimizer.zero_grad()
    shares = [mean_of_slopes(model(x), y) * len(y) / len(batch[1]) for x, y in micro_batches(batch, steps)]
    torch.stack(shares).sum().backward()
    optimizer.step()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.mix(self.embed(ids))))


def tied():
    return seeded(Tied)


@BOOK.wrong("division", model=tied, loss=TokenMean(), batch=sentences, optimizer=sgd)
def tied_weight_divided_by_module(model, optimizer, batch, steps):
    """the tied weight is divided by the number of tokens in both of its modules"""
    optimizer.zero_grad()
    for ids, labels in micro_batches(batch, steps):
        token_total(model(ids), labels).backward()
    for module in model.modules():
        for p in module.parameters(recurse=False):
            p.grad /= (batch[1] != -100).sum()
    optimizer.step()


@BOOK.wrong("division", optimizer=sgd)
def unscaled_after_every_micro_batch(model, optimizer, batch, steps):
    """the sum so far is divided by the loss scale after every micro-batch"""
    optimizer.zero_grad()
    for x, y in micro_batches(batch, steps):
        (16 * F.cross_entropy(model(x), y) * len(x) / len(batch[0])).backward()
        for p in model.parameters():
            p.grad /= 16
    optimizer.step()


class Reentrant(nn.Module):
    """A checkpoint of the kind that gives no gradient where its inputs need none."""

    def __init__(self):
        super().__init__()
        self.net = two_layers(6, 16, 3)

    def forward(self, x):
        return self.net.head(torch.tanh(checkpoint(self.net.body, x, use_reentrant=True)))


def reentrant():
    return seeded(Reentrant)


@BOOK.wrong("checkpoint", model=reentrant, optimizer=sgd)
def inputs_with_a_gradient(model, optimizer, batch, steps):
    """a checkpointed layer is trained in the loop, where the inputs need a gradient, and not otherwise"""
    optimizer.zero_grad()
    for x, y in micro_batches(batch, steps):
        x = x.clone().requires_grad_()
        (F.cross_entropy(model(x), y) * len(x) / len(batch[0])).backward()
    optimizer.step()


class Masked(nn.Module):
    """Hands its mask on to the loss."""

    def __init__(self):
        super().__init__()
        self.net = two_layers(6, 16, 3)

    def forward(self, x, mask):
        return {"logits": self.net(x), "mask": mask, "hidden": None}


def masked_mean(outputs, targets):
    losses = F.cross_entropy(outputs["logits"], targets, reduction="none")
    return (losses * outputs["mask"]).sum() / outputs["mask"].sum()


@BOOK.wrong_case("tokens")
def mask_of_each_micro_batch():
    """the loss of each micro-batch is divided by its own mask"""

    def train_window(model, optimizer, batch, steps):
        optimizer.zero_grad()
        for x, y in micro_batches(batch, steps):
            (masked_mean(model(**x), y) * len(y) / len(batch[1])).backward()
        optimizer.step()

    def masked():
        x, y = classes()
        mask = (torch.arange(len(y)) % 3 != 0).float().index_fill(0, torch.arange(7), 1.0)
        return {"x": x, "mask": mask}, y

    return given(train_window, functools.partial(seeded, Masked), masked_mean, masked, optimizer=sgd)


class Remembering(nn.Module):
    """Starts from the hidden state that the pass before left."""

    def __init__(self):
        super().__init__()
        self.cell, self.head, self.hidden = nn.GRUCell(6, 8), nn.Linear(8, 3), None

    def forward(self, x):
        hidden = x.new_zeros(len(x), 8) if self.hidden is None else self.hidden[:1].expand(len(x), -1)
        hidden = self.cell(x, hidden)
        self.hidden = hidden.detach()
        return self.head(hidden)


def remembering():
    return seeded(Remembering)


@BOOK.wrong("state", model=remembering, optimizer=sgd)
def hidden_state_kept_in_the_window(model, optimizer, batch, steps):
    """micro-batches begin with the hidden state of the one before"""
    optimizer.zero_grad()
    model.hidden = None
    accumulate(model, batch, steps)
    optimizer.step()
    model.hidden = None
