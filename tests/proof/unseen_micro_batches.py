"""Loops in which micro-batches are lost, doubled, mixed up or not made, and loops that log the wrong loss."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.proof.unseen_common import (
    Book,
    Counts,
    classes,
    decaying,
    micro_batches,
    momentum,
    regressor,
    seeded,
    sgd,
    two_layers,
    values,
)

BOOK = Book()
updates = Counts()
SIZE = 6


def share(loss, x, batch):
    return loss * len(x) / len(batch[0])


def step(optimizer):
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("lost")
def last_lost(model, optimizer, batch, steps):
    """micro-batch 4 is never computed: range stops one too early"""
    parts = micro_batches(batch, steps)
    for i in range(max(len(parts) - 1, 1)):
        x, y = parts[i]
        share(F.cross_entropy(model(x), y), x, batch).backward()
    step(optimizer)


@BOOK.wrong("lost", optimizer=sgd)
def partial_micro_batch_dropped(model, optimizer, batch, steps):
    """the smaller last micro-batch of a smaller window is dropped"""
    n = len(batch[0])
    count = max(n // SIZE, 1)
    for i in range(count):
        x, y = batch[0][i * SIZE : (i + 1) * SIZE], batch[1][i * SIZE : (i + 1) * SIZE]
        (F.cross_entropy(model(x), y) / count).backward()
    step(optimizer)


@BOOK.wrong("lost", optimizer=momentum)
def warm_up_kept(model, optimizer, batch, steps):
    """micro-batch 1 counts twice in update 1, because its warm-up backward is not cleared"""
    parts = micro_batches(batch, steps)
    if updates(model) == 1:
        x, y = parts[0]
        share(F.cross_entropy(model(x), y), x, batch).backward()
    for x, y in parts:
        share(F.cross_entropy(model(x), y), x, batch).backward()
    step(optimizer)


@BOOK.wrong("lost", optimizer=sgd)
def overlapping(model, optimizer, batch, steps):
    """micro-batches overlap: they start every 5 samples but hold 6, so some samples count twice and the
    last ones never"""
    n = len(batch[0])
    size = -(-n // steps)
    stride = max(size - 1, 1)
    starts = range(0, min(steps * stride, n), stride)
    parts = [(batch[0][i : i + size], batch[1][i : i + size]) for i in starts]
    total = sum(len(x) for x, _ in parts)
    for x, y in parts:
        (F.cross_entropy(model(x), y, reduction="sum") / total).backward()
    step(optimizer)


@BOOK.wrong("lost", optimizer=sgd)
def last_doubled(model, optimizer, batch, steps):
    """the last micro-batch runs twice, once without and once with the exchange of gradients"""
    parts = micro_batches(batch, steps)
    for x, y in parts:
        share(F.cross_entropy(model(x), y), x, batch).backward()
    x, y = parts[-1]  # with gradients exchanged
    share(F.cross_entropy(model(x), y), x, batch).backward()
    step(optimizer)


@BOOK.wrong("lost", optimizer=sgd)
def first_peeked_at(model, optimizer, batch, steps):
    """in every third update the first micro-batch is taken by the logging and lost"""
    parts = iter(micro_batches(batch, steps))
    if updates(model) % 3 == 0:
        with torch.no_grad():
            x, y = next(parts)
            F.cross_entropy(model(x), y)
    for x, y in parts:
        share(F.cross_entropy(model(x), y), x, batch).backward()
    step(optimizer)


@BOOK.wrong("lost", batch=values, model=regressor, loss=F.mse_loss, optimizer=decaying)
def remainder_lost(model, optimizer, batch, steps):
    """the samples beyond 4 equal micro-batches are lost in a window that 4 does not divide"""
    n = len(batch[0])
    size = max(n // steps, 1)
    count = min(steps, n)
    for i in range(count):
        x, y = batch[0][i * size : (i + 1) * size], batch[1][i * size : (i + 1) * size]
        (F.mse_loss(model(x), y) / count).backward()
    step(optimizer)


@BOOK.wrong("lost", optimizer=sgd)
def labels_of_others(model, optimizer, batch, steps):
    """inputs are interleaved and labels are not: samples meet the labels of others"""
    n = len(batch[0])
    order = torch.arange(n)
    order = torch.cat([order[k::steps] for k in range(steps)])
    for x, y in micro_batches((batch[0][order], batch[1]), steps):
        share(F.cross_entropy(model(x), y), x, batch).backward()
    step(optimizer)


@BOOK.wrong("lost")
def zeroed_every_time(model, optimizer, batch, steps):
    """gradients are zeroed before every micro-batch, so only the last one counts"""
    for x, y in micro_batches(batch, steps):
        optimizer.zero_grad()
        share(F.cross_entropy(model(x), y), x, batch).backward()
    optimizer.step()


@BOOK.wrong("lost", optimizer=sgd)
def zeroed_after_the_first(model, optimizer, batch, steps):
    """gradients are zeroed after the first micro-batch, which is lost, from update 2 on"""
    first = updates(model) == 1
    for i, (x, y) in enumerate(micro_batches(batch, steps)):
        share(F.cross_entropy(model(x), y), x, batch).backward()
        if i == 0 and not first:
            optimizer.zero_grad(set_to_none=False)
    step(optimizer)


@BOOK.wrong("lost", optimizer=sgd)
def skipped_when_easy(model, optimizer, batch, steps):
    """a micro-batch is skipped where the loss of the one before is below 1.1"""
    before = float("inf")
    for x, y in micro_batches(batch, steps):
        loss = F.cross_entropy(model(x), y)
        if before > 1.1:
            share(loss, x, batch).backward()
        before = loss.item()
    step(optimizer)


def hardest(outputs, labels):
    each = F.cross_entropy(outputs, labels, reduction="none")
    return each.topk(-(-len(labels) // 2)).values.mean()


@BOOK.wrong("coupled", loss=hardest, optimizer=sgd)
def hardest_half(model, optimizer, batch, steps):
    """each micro-batch keeps the hardest half of its samples, the larger batch would keep the hardest half
    of all"""
    for x, y in micro_batches(batch, steps):
        share(hardest(model(x), y), x, batch).backward()
    step(optimizer)


@BOOK.wrong("identical", batch=lambda: tuple(torch.cat([v, v]) for v in classes(12)), optimizer=sgd)
def first_half_twice(model, optimizer, batch, steps):
    """the second half of the window is never computed; this batch holds every sample twice"""
    parts = micro_batches(batch, steps)
    parts = parts[: max(len(parts) // 2, 1)]
    total = sum(len(x) for x, _ in parts)
    for x, y in parts:
        (F.cross_entropy(model(x), y, reduction="sum") / total).backward()
    step(optimizer)


@BOOK.wrong("identical", batch=lambda: tuple(torch.cat([v, v[12:]]) for v in classes(18)), optimizer=sgd)
def third_twice(model, optimizer, batch, steps):
    """micro-batch 3 is computed twice and 4 never; they are equal in this batch"""
    parts = micro_batches(batch, steps)
    order = [0, 1, 2, 2][: len(parts)]
    total = sum(len(parts[i][0]) for i in order)
    for i in order:
        x, y = parts[i]
        (F.cross_entropy(model(x), y, reduction="sum") / total).backward()
    step(optimizer)


def zero_head():
    model = seeded(lambda: two_layers(5, 8, 1))
    nn.init.zeros_(model.head.weight)
    return model


@BOOK.wrong("identical", model=zero_head, batch=values, loss=F.mse_loss, optimizer=sgd)
def frozen_but_in_the_last(model, optimizer, batch, steps):
    """body gets the gradient of the last micro-batch alone; the head starts at zero, so update 1 does not
    show it"""
    parts = micro_batches(batch, steps)
    for i, (x, y) in enumerate(parts):
        with torch.set_grad_enabled(i == len(parts) - 1):
            features = model.act(model.body(x))
        share(F.mse_loss(model.head(features), y), x, batch).backward()
    step(optimizer)


# Not made: the update is right, the memory is not that of a micro-batch.


@BOOK.wrong("not made", optimizer=momentum)
def whole_batch(model, optimizer, batch, steps):
    """the whole batch is computed at once although 4 micro-batches are asked for"""
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    step(optimizer)


@BOOK.wrong("not made", optimizer=sgd)
def half_as_many(model, optimizer, batch, steps):
    """2 micro-batches of 12 samples are made, not 4 of 6"""
    for x, y in micro_batches(batch, max(steps // 2, 1)):
        share(F.cross_entropy(model(x), y), x, batch).backward()
    step(optimizer)


@BOOK.wrong("not made", optimizer=sgd)
def twice_as_many(model, optimizer, batch, steps):
    """8 micro-batches of 3 samples are made, not 4 of 6"""
    for x, y in micro_batches(batch, 2 * steps):
        share(F.cross_entropy(model(x), y), x, batch).backward()
    step(optimizer)


@BOOK.wrong("not made", optimizer=sgd)
def whole_batch_later(model, optimizer, batch, steps):
    """from update 3 on the whole batch is computed at once"""
    steps = steps if updates(model) < 3 else 1
    for x, y in micro_batches(batch, steps):
        share(F.cross_entropy(model(x), y), x, batch).backward()
    step(optimizer)


@BOOK.wrong("not made", optimizer=sgd)
def only_the_head_by_micro_batch(model, optimizer, batch, steps):
    """the body runs on the whole batch, only the head and the loss run by micro-batch"""
    features = model.act(model.body(batch[0]))
    leaf = features.detach().requires_grad_()
    for h, y in micro_batches((leaf, batch[1]), steps):
        (F.cross_entropy(model.head(h), y, reduction="sum") / len(batch[0])).backward()
    features.backward(leaf.grad)
    step(optimizer)


# Logged: the update is right, the loss that is returned is not the window's.


def logged(name, cause, pick):
    def train_window(model, optimizer, batch, steps):
        losses = []
        for x, y in micro_batches(batch, steps):
            loss = F.cross_entropy(model(x), y)
            share(loss, x, batch).backward()
            losses.append(loss.detach())
        step(optimizer)
        return pick(losses, updates(model))

    train_window.__name__ = name
    train_window.__doc__ = cause
    BOOK.wrong("log", optimizer=sgd)(train_window)


logged("log_of_the_last", "the loss that is logged is the last micro-batch's", lambda losses, _: losses[-1])
logged("log_of_the_last_divided", "the loss that is logged is a quarter of the last micro-batch's",
       lambda losses, _: losses[-1] / len(losses))  # fmt: skip
logged(
    "log_of_the_sum",
    "the loss that is logged is the sum over the 4 micro-batches",
    lambda losses, _: sum(losses),
)
logged(
    "log_of_the_first",
    "the loss that is logged is the first micro-batch's",
    lambda losses, _: losses[0].item(),
)
logged("log_of_the_third_update", "the loss that is logged in every third update is the last micro-batch's",
       lambda losses, n: losses[-1] if n % 3 == 0 else torch.stack(losses).mean())  # fmt: skip


@BOOK.right("logged", optimizer=sgd)
def log_of_the_window(model, optimizer, batch, steps):
    total = 0.0
    for x, y in micro_batches(batch, steps):
        loss = share(F.cross_entropy(model(x), y), x, batch)
        loss.backward()
        total += loss.item()
    step(optimizer)
    return total


@BOOK.right("logged", optimizer=decaying)
def log_as_a_tensor(model, optimizer, batch, steps):
    total = batch[0].new_zeros(())
    for x, y in micro_batches(batch, steps):
        loss = F.cross_entropy(model(x), y, reduction="sum")
        (loss / len(batch[0])).backward()
        total += loss.detach()
    step(optimizer)
    return total / len(batch[0])
