"""Loops that clip, penalise or decay, once a window and wrongly."""

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from tests.proof.unseen_common import (
    Book,
    Counts,
    decaying,
    micro_batches,
    momentum,
    regressor,
    sgd,
    values,
)

BOOK = Book()
updates = Counts()


def loss_of(model, x, y, batch):
    return F.cross_entropy(model(x), y) * len(x) / len(batch[0])


def accumulate(model, batch, steps):
    for x, y in micro_batches(batch, steps):
        loss_of(model, x, y, batch).backward()


@BOOK.wrong("clip", clip_norm=0.1, optimizer=sgd)
def norm_by_micro_batch(model, optimizer, batch, steps):
    """the sum is clipped after every micro-batch, not once a window"""
    for x, y in micro_batches(batch, steps):
        loss_of(model, x, y, batch).backward()
        clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("clip", clip_value=0.02, optimizer=sgd)
def value_by_micro_batch(model, optimizer, batch, steps):
    """elements are clamped after every micro-batch, not once a window"""
    for x, y in micro_batches(batch, steps):
        loss_of(model, x, y, batch).backward()
        clip_grad_value_(model.parameters(), 0.02)
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("clip", clip_norm=0.1, optimizer=sgd)
def only_the_head_clipped(model, optimizer, batch, steps):
    """only the head is clipped, the norm should be that of all parameters"""
    accumulate(model, batch, steps)
    clip_grad_norm_(model.head.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("clip", clip_norm=0.1, optimizer=decaying)
def clipped_one_by_one(model, optimizer, batch, steps):
    """every parameter is clipped by its own norm"""
    accumulate(model, batch, steps)
    for p in model.parameters():
        clip_grad_norm_(p, 0.1)
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("clip", clip_norm=0.2, optimizer=sgd)
def clipped_before_the_division(model, optimizer, batch, steps):
    """the sum is clipped before it is divided by 4: the threshold is 4 times too low"""
    parts = micro_batches(batch, steps)
    for x, y in parts:
        (F.cross_entropy(model(x), y, reduction="sum") * len(parts) / len(batch[0])).backward()
    clip_grad_norm_(model.parameters(), 0.2)
    for p in model.parameters():
        p.grad /= len(parts)
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("clip", clip_norm=0.1, optimizer=momentum)
def third_update_not_clipped(model, optimizer, batch, steps):
    """every third update is not clipped"""
    accumulate(model, batch, steps)
    if updates(model) % 3:
        clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("clip", clip_norm=0.05, optimizer=sgd)
def largest_element_for_norm(model, optimizer, batch, steps):
    """the largest element is taken for the norm"""
    accumulate(model, batch, steps)
    clip_grad_norm_(model.parameters(), 0.05, norm_type=float("inf"))
    optimizer.step()
    optimizer.zero_grad()


def l2(model):
    for p in model.parameters():
        p.grad.add_(p.detach(), alpha=0.02)


def l1(model):
    for p in model.parameters():
        p.grad.add_(p.detach().sign(), alpha=0.01)


@BOOK.wrong("decay", transform_gradient=l2, optimizer=sgd)
def l2_by_micro_batch(model, optimizer, batch, steps):
    """the L2 penalty is added to the loss of every micro-batch undivided: 4 times too strong"""
    for x, y in micro_batches(batch, steps):
        penalty = sum(0.01 * p.square().sum() for p in model.parameters())
        (loss_of(model, x, y, batch) + penalty).backward()
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("decay", transform_gradient=l1, optimizer=momentum)
def l1_divided(model, optimizer, batch, steps):
    """the L1 penalty is in the first micro-batch alone and divided by 4 there: 4 times too weak"""
    parts = micro_batches(batch, steps)
    for i, (x, y) in enumerate(parts):
        loss = loss_of(model, x, y, batch)
        if i == 0:
            loss = loss + sum(0.01 * p.abs().sum() for p in model.parameters()) / len(parts)
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("decay", optimizer=decaying)
def shrunk_by_micro_batch(model, optimizer, batch, steps):
    """all weights shrink by hand after every micro-batch, beside AdamW's own decay"""
    for x, y in micro_batches(batch, steps):
        loss_of(model, x, y, batch).backward()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 - optimizer.param_groups[0]["lr"] * 0.1)
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("decay", batch=values, model=regressor, loss=F.mse_loss, steps=5, optimizer=sgd)
def decay_of_one_weight(model, optimizer, batch, steps):
    """the decay of head.weight is added to its gradient once a micro-batch"""
    for x, y in micro_batches(batch, steps):
        (F.mse_loss(model(x), y) * len(x) / len(batch[0])).backward()
        model.head.weight.grad += 0.01 * model.head.weight.detach()
    optimizer.step()
    optimizer.zero_grad()


@BOOK.right("clip", clip_norm=0.1, optimizer=momentum)
def norm_once_a_window(model, optimizer, batch, steps):
    optimizer.zero_grad()
    accumulate(model, batch, steps)
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


@BOOK.right("clip", clip_norm=0.1, optimizer=sgd)
def norm_of_the_groups(model, optimizer, batch, steps):
    optimizer.zero_grad()
    accumulate(model, batch, steps)
    clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.1, foreach=False)
    optimizer.step()


@BOOK.right("clip", clip_value=0.02, optimizer=decaying)
def value_once_a_window(model, optimizer, batch, steps):
    optimizer.zero_grad()
    accumulate(model, batch, steps)
    clip_grad_value_(model.parameters(), 0.02)
    optimizer.step()


@BOOK.right("clip", clip_norm=0.2, clip_value=0.02, optimizer=sgd)
def norm_then_value(model, optimizer, batch, steps):
    optimizer.zero_grad()
    accumulate(model, batch, steps)
    clip_grad_norm_(model.parameters(), 0.2)
    clip_grad_value_(model.parameters(), 0.02)
    optimizer.step()


def adaptive(model):
    """Adaptive gradient clipping: a row's gradient is at most a twentieth of the row."""
    for p in model.parameters():
        dim = tuple(range(1, p.dim()))
        largest = 0.05 * torch.linalg.vector_norm(p.detach(), dim=dim or None, keepdim=True).clamp(min=1e-3)
        norm = torch.linalg.vector_norm(p.grad, dim=dim or None, keepdim=True)
        p.grad.mul_((largest / norm.clamp(min=1e-6)).clamp(max=1))


@BOOK.right("clip", transform_gradient=adaptive, optimizer=sgd)
def adaptive_once_a_window(model, optimizer, batch, steps):
    optimizer.zero_grad()
    accumulate(model, batch, steps)
    adaptive(model)
    optimizer.step()


@BOOK.wrong("clip", transform_gradient=adaptive, optimizer=sgd)
def adaptive_by_micro_batch(model, optimizer, batch, steps):
    """adaptive clipping runs after every micro-batch instead of once a window"""
    optimizer.zero_grad()
    for x, y in micro_batches(batch, steps):
        loss_of(model, x, y, batch).backward()
        adaptive(model)
    optimizer.step()


def centred(model):
    for p in model.parameters():
        if p.dim() > 1:
            p.grad.sub_(p.grad.mean(dim=tuple(range(1, p.dim())), keepdim=True))


@BOOK.right("clip", transform_gradient=centred, clip_norm=0.1, optimizer=momentum)
def centralised_then_clipped(model, optimizer, batch, steps):
    optimizer.zero_grad()
    accumulate(model, batch, steps)
    centred(model)
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


@BOOK.right("decay", transform_gradient=l2, clip_norm=0.3, optimizer=sgd)
def l2_once_a_window(model, optimizer, batch, steps):
    optimizer.zero_grad()
    accumulate(model, batch, steps)
    torch.stack([0.01 * p.square().sum() for p in model.parameters()]).sum().backward()
    clip_grad_norm_(model.parameters(), 0.3)
    optimizer.step()


@BOOK.right("decay", transform_gradient=l2, optimizer=momentum)
def l2_in_every_share(model, optimizer, batch, steps):
    """The penalty is part of the loss that is divided, so its shares add up to one."""
    optimizer.zero_grad()
    for x, y in micro_batches(batch, steps):
        loss = F.cross_entropy(model(x), y) + sum(0.01 * p.square().sum() for p in model.parameters())
        (loss * len(x) / len(batch[0])).backward()
    optimizer.step()


@BOOK.right("decay", transform_gradient=l1, optimizer=sgd)
def l1_in_the_first_micro_batch(model, optimizer, batch, steps):
    optimizer.zero_grad()
    for i, (x, y) in enumerate(micro_batches(batch, steps)):
        loss = loss_of(model, x, y, batch)
        if i == 0:
            loss = loss + sum(0.01 * p.abs().sum() for p in model.parameters())
        loss.backward()
    optimizer.step()


@BOOK.wrong("decay", transform_gradient=l2, optimizer=sgd)
def l2_forgotten_in_small_windows(model, optimizer, batch, steps):
    """the L2 penalty is left out in the smaller windows"""
    optimizer.zero_grad()
    accumulate(model, batch, steps)
    if len(batch[0]) == 24:
        l2(model)
    optimizer.step()
