"""Loops that take the gradient at moved weights."""

import torch
import torch.nn.functional as F

from tests.proof.unseen_common import (
    Book,
    micro_batches,
    momentum,
    sgd,
)

BOOK = Book()


def loss_of(model, x, y, batch):
    return F.cross_entropy(model(x), y) * len(x) / len(batch[0])


def accumulate(model, batch, steps):
    for x, y in micro_batches(batch, steps):
        loss_of(model, x, y, batch).backward()


def uphill(model):
    """The step of sharpness-aware minimisation: 0.05 along the gradient."""
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    for p in model.parameters():
        p.add_(p.grad * (0.05 / (norm + 1e-12)))


@BOOK.right("perturbed", perturb=uphill, optimizer=momentum)
def sharpness_aware(model, optimizer, batch, steps):
    optimizer.zero_grad()
    accumulate(model, batch, steps)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        uphill(model)
    optimizer.zero_grad()
    accumulate(model, batch, steps)
    with torch.no_grad():
        for p, old in zip(model.parameters(), before, strict=True):
            p.copy_(old)
    optimizer.step()


@BOOK.wrong("perturbed", perturb=uphill, optimizer=sgd)
def uphill_by_micro_batch(model, optimizer, batch, steps):
    """every micro-batch goes uphill along its own gradient, not along the window's"""
    total = [torch.zeros_like(p) for p in model.parameters()]
    before = [p.detach().clone() for p in model.parameters()]
    for x, y in micro_batches(batch, steps):
        optimizer.zero_grad()
        loss_of(model, x, y, batch).backward()
        with torch.no_grad():
            uphill(model)
        optimizer.zero_grad()
        loss_of(model, x, y, batch).backward()
        with torch.no_grad():
            for p, old, t in zip(model.parameters(), before, total, strict=True):
                p.copy_(old)
                t += p.grad
    for p, t in zip(model.parameters(), total, strict=True):
        p.grad = t
    optimizer.step()


@BOOK.wrong("perturbed", perturb=uphill, optimizer=sgd)
def not_brought_back(model, optimizer, batch, steps):
    """the update is applied to the moved weights, they are not brought back"""
    optimizer.zero_grad()
    accumulate(model, batch, steps)
    with torch.no_grad():
        uphill(model)
    optimizer.zero_grad()
    accumulate(model, batch, steps)
    optimizer.step()


@BOOK.wrong("perturbed", perturb=uphill, optimizer=momentum)
def first_gradient_kept(model, optimizer, batch, steps):
    """the gradient at the unmoved weights is not zeroed: the second pass adds to it"""
    optimizer.zero_grad()
    accumulate(model, batch, steps)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        uphill(model)
    accumulate(model, batch, steps)
    with torch.no_grad():
        for p, old in zip(model.parameters(), before, strict=True):
            p.copy_(old)
    optimizer.step()
