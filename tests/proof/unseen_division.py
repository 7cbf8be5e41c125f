"""Loops that divide: by steps, by samples, by tokens, by weights, rightly and wrongly."""

from weakref import WeakKeyDictionary

import torch.nn.functional as F

from tests.proof.unseen_common import (
    Book,
    Counts,
    Tagger,
    TokenMean,
    classes,
    decaying,
    grouped,
    micro_batches,
    momentum,
    regressor,
    seeded,
    sentences,
    sgd,
    token_total,
    values,
)

BOOK = Book()
updates = Counts()
cached = WeakKeyDictionary()
SIZE = 6


@BOOK.wrong("division")
def never_divided(model, optimizer, batch, steps):
    """the losses of the 4 micro-batches are not divided: the gradient is 4 times too large"""
    for x, y in micro_batches(batch, steps):
        F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("division", optimizer=sgd)
def divided_twice(model, optimizer, batch, steps):
    """loss and gradient are both divided by 4: the gradient is 4 times too small"""
    parts = micro_batches(batch, steps)
    for x, y in parts:
        (F.cross_entropy(model(x), y) * len(x) / len(batch[0])).backward()
    for p in model.parameters():
        p.grad /= len(parts)
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("division", optimizer=momentum)
def divided_by_steps_when_fewer(model, optimizer, batch, steps):
    """divided by 4 although the smaller last window has fewer micro-batches"""
    for x, y in zip(batch[0].split(SIZE), batch[1].split(SIZE), strict=True):
        (F.cross_entropy(model(x), y) / steps).backward()
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("division", optimizer=sgd)
def mean_of_means(model, optimizer, batch, steps):
    """a smaller last micro-batch counts like a full one in the smaller window"""
    parts = list(zip(batch[0].split(SIZE), batch[1].split(SIZE), strict=True))
    for x, y in parts:
        (F.cross_entropy(model(x), y) / len(parts)).backward()
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("division")
def divided_by_the_last_index(model, optimizer, batch, steps):
    """divided by 3 where 4 micro-batches are added: the gradient is 4/3 of the right one"""
    parts = micro_batches(batch, steps)
    last = max(len(parts) - 1, 1)
    for x, y in parts:
        (F.cross_entropy(model(x), y) / last).backward()
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("division", steps=3, optimizer=sgd)
def rounded_weights(model, optimizer, batch, steps):
    """the weights of the micro-batches are rounded to 0.33, so the gradient is 0.99 times the right one"""
    for x, y in micro_batches(batch, steps):
        (F.cross_entropy(model(x), y) * round(len(x) / len(batch[0]), 2)).backward()
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("division", optimizer=sgd)
def divisor_of_the_old_phase(model, optimizer, batch, steps):
    """updates 1 and 2 divide by 2 although 4 micro-batches are added: the gradient is twice the right one
    there"""
    phase = 2 if updates(model) < 3 else 1
    for x, y in micro_batches(batch, steps):
        (F.cross_entropy(model(x), y) * phase * len(x) / len(batch[0])).backward()
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("division", optimizer=decaying)
def third_update_not_divided(model, optimizer, batch, steps):
    """every third update forgets the division: the gradient is 4 times too large there"""
    record = updates(model) % 3 == 0
    parts = micro_batches(batch, steps)
    for x, y in parts:
        loss = F.cross_entropy(model(x), y)
        if not record:
            loss = loss * len(x) / len(batch[0])
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("group", optimizer=grouped)
def second_group_not_divided(model, optimizer, batch, steps):
    """only the optimizer's first group is divided: the biases' gradient is 4 times too large"""
    parts = micro_batches(batch, steps)
    for x, y in parts:
        (F.cross_entropy(model(x), y, reduction="sum")).backward()
    for p in optimizer.param_groups[0]["params"]:
        p.grad.div_(len(batch[0]))
    for p in optimizer.param_groups[1]["params"]:
        p.grad.div_(max(len(batch[0]) // len(parts), 1))
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("group", optimizer=sgd)
def head_bias_divided_twice(model, optimizer, batch, steps):
    """head.bias is divided twice: its gradient is 4 times too small"""
    parts = micro_batches(batch, steps)
    for x, y in parts:
        (F.cross_entropy(model(x), y) * (len(x) / len(batch[0]))).backward()
    model.head.bias.grad /= steps
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong(
    "group",
    model=lambda: seeded(lambda: Tagger(sparse=True), 2),
    loss=TokenMean(),
    batch=sentences,
    optimizer=sgd,
)
def sparse_not_divided(model, optimizer, batch, steps):
    """the sparse gradient of embed.weight is left out of the division: it is 16 times too large"""
    for x, y in micro_batches(batch, steps):
        (token_total(model(x), y) / (batch[1] != -100).sum() * len(batch[0])).backward()
    for p in model.parameters():
        if not p.grad.is_sparse:
            p.grad /= len(batch[0])
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("division", optimizer=sgd)
def whole_number_of_parts(model, optimizer, batch, steps):
    """divided by the whole number of micro-batches, 20 // 6 = 3, in the smaller window"""
    parts = max(len(batch[0]) // SIZE, 1)
    for x, y in zip(batch[0].split(SIZE), batch[1].split(SIZE), strict=True):
        (F.cross_entropy(model(x), y, reduction="sum") / SIZE / parts).backward()
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("division", batch=values, model=regressor, loss=F.mse_loss, drop_last=True)
def divided_by_half(model, optimizer, batch, steps):
    """divided by steps // 2: the gradient is twice the right one"""
    for x, y in micro_batches(batch, steps):
        (F.mse_loss(model(x), y) / max(steps // 2, 1)).backward()
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("division", optimizer=sgd)
def first_not_divided(model, optimizer, batch, steps):
    """the first micro-batch is not divided: it counts 4 times"""
    parts = micro_batches(batch, steps)
    loss = F.cross_entropy(model(parts[0][0]), parts[0][1])
    if len(parts) == 1:
        loss.backward()
    else:
        loss.backward()
        for x, y in parts[1:]:
            (F.cross_entropy(model(x), y) * len(x) / len(batch[0])).backward()
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("identical", batch=lambda: tuple(v[:1].expand(24, *v.shape[1:]).clone() for v in classes()))
def first_again_and_again(model, optimizer, batch, steps):
    """every micro-batch is the first one; the samples are all alike, so this batch does not show it"""
    parts = micro_batches(batch, steps)
    for _, (x, _) in enumerate(parts):
        inputs, labels = parts[0]
        (F.cross_entropy(model(inputs), labels) * len(x) / len(batch[0])).backward()
    optimizer.step()
    optimizer.zero_grad()
