"""Wrong loops that cut or change the gradient of some parameters in some micro-batches."""

import copy

import torch
import torch.nn.functional as F

from tests.proof.unseen_common import (
    Book,
    micro_batches,
    momentum,
    sgd,
)

BOOK = Book()


def cutting(name, cause, cut, **arguments):
    """A loop that does something to the model before micro-batch i of n."""

    def train_window(model, optimizer, batch, steps):
        optimizer.zero_grad()
        parts = micro_batches(batch, steps)
        for i, (x, y) in enumerate(parts):
            undo = cut(model, i, len(parts))
            (F.cross_entropy(model(x), y) * (len(x) / len(batch[0]))).backward()
            undo()
        optimizer.step()

    train_window.__name__, train_window.__doc__ = name, cause
    BOOK.wrong("cut", **{"optimizer": sgd, **arguments})(train_window)


def only_in_the_last(pick):
    def cut(model, i, n):
        for p in pick(model):
            p.requires_grad_(i == n - 1)
        return lambda: [p.requires_grad_() for p in pick(model)]

    return cut


def hooked(change, pick=lambda model: model.head.weight, when=lambda i, n: True):
    def cut(model, i, n):
        hook = pick(model).register_hook(change if when(i, n) else lambda g: g)
        return hook.remove

    return cut


cutting("bias_from_the_last_alone", "head.bias has its gradient from the last micro-batch alone",
        only_in_the_last(lambda model: [model.head.bias]))  # fmt: skip
cutting("body_from_the_last_alone", "the body is frozen but in the last micro-batch",
        only_in_the_last(lambda model: list(model.body.parameters())), optimizer=momentum)  # fmt: skip
cutting("hook_scales_one_weight", "a hook that was left on head.weight multiplies its gradient by 1.01",
        hooked(lambda g: 1.01 * g))  # fmt: skip
cutting("hook_zeroes_in_micro_batch_2", "a hook on body.weight returns zeros in micro-batch 2",
        hooked(torch.zeros_like, lambda model: model.body.weight, lambda i, n: i == 1))  # fmt: skip
cutting("hook_clamps_by_micro_batch", "a hook clamps head.weight's gradient to 0.01 in every micro-batch",
        hooked(lambda g: g.clamp(-0.01, 0.01)))  # fmt: skip


@BOOK.wrong("cut", optimizer=momentum)
def head_overwritten(model, optimizer, batch, steps):
    """the gradient of head.weight is assigned and not added, so only the last micro-batch counts"""
    optimizer.zero_grad()
    for x, y in micro_batches(batch, steps):
        loss = F.cross_entropy(model(x), y) * (len(x) / len(batch[0]))
        (grad,) = torch.autograd.grad(loss, model.head.weight, retain_graph=True)
        loss.backward()
        model.head.weight.grad = grad
    optimizer.step()


@BOOK.wrong("cut", optimizer=sgd)
def weights_of_a_copy(model, optimizer, batch, steps):
    """later micro-batches run on a copy of the model, and its body's gradient is not brought back"""
    optimizer.zero_grad()
    worker = copy.deepcopy(model)
    for i, (x, y) in enumerate(micro_batches(batch, steps)):
        runs = model if i == 0 else worker
        (F.cross_entropy(runs(x), y) * (len(x) / len(batch[0]))).backward()
    for p, q in zip(model.head.parameters(), worker.head.parameters(), strict=True):
        if q.grad is not None:
            p.grad += q.grad
    optimizer.step()
