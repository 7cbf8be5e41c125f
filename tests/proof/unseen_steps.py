"""Loops around the optimizer: steps, gradients that are carried over, rates and schedules."""

import torch
import torch.nn.functional as F

from tests.proof.unseen_common import (
    Book,
    Counts,
    decaying,
    grouped,
    micro_batches,
    mlp,
    momentum,
    sgd,
)

BOOK = Book()
updates = Counts()
SIZE = 6


def loss_of(model, x, y, batch):
    return F.cross_entropy(model(x), y) * len(x) / len(batch[0])


def accumulate(model, batch, steps):
    for x, y in micro_batches(batch, steps):
        loss_of(model, x, y, batch).backward()


@BOOK.wrong("step")
def step_by_micro_batch(model, optimizer, batch, steps):
    """the optimizer steps after every micro-batch: 4 updates instead of one"""
    for x, y in micro_batches(batch, steps):
        loss_of(model, x, y, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


@BOOK.wrong("step", optimizer=momentum)
def step_at_half_time(model, optimizer, batch, steps):
    """the optimizer also steps after micro-batch 2"""
    for i, (x, y) in enumerate(micro_batches(batch, steps), 1):
        loss_of(model, x, y, batch).backward()
        if i % 2 == 0 and i < steps:
            optimizer.step()
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("step", optimizer=sgd)
def first_update_left_out(model, optimizer, batch, steps):
    """update 1 is left out: the optimizer does not step"""
    accumulate(model, batch, steps)
    if updates(model) > 1:
        optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("step", optimizer=momentum)
def third_update_twice(model, optimizer, batch, steps):
    """every third update steps twice with the same gradient"""
    accumulate(model, batch, steps)
    optimizer.step()
    if updates(model) % 3 == 0:
        optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("step", optimizer=sgd)
def smaller_window_never_steps(model, optimizer, batch, steps):
    """a smaller window with fewer than 4 micro-batches never steps, and its gradient stays for the next"""
    for i, (x, y) in enumerate(zip(batch[0].split(SIZE), batch[1].split(SIZE), strict=True), 1):
        loss_of(model, x, y, batch).backward()
        if i % (24 // SIZE) == 0:
            optimizer.step()
            optimizer.zero_grad()


@BOOK.wrong("step", optimizer=decaying)
def step_too_early(model, optimizer, batch, steps):
    """the optimizer steps before the last micro-batch, whose gradient is thrown away"""
    parts = micro_batches(batch, steps)
    for i, (x, y) in enumerate(parts, 1):
        if i == len(parts) and i > 1:
            optimizer.step()
        loss_of(model, x, y, batch).backward()
    if len(parts) == 1:
        optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("carried over")
def never_zeroed(model, optimizer, batch, steps):
    """gradients are never zeroed: each window starts with the sum of all before"""
    accumulate(model, batch, steps)
    optimizer.step()


@BOOK.wrong("carried over", optimizer=sgd)
def carried_over_the_epoch(model, optimizer, batch, steps):
    """the gradient of a smaller window stays for the window after it"""
    accumulate(model, batch, steps)
    optimizer.step()
    if len(batch[0]) == 24:
        optimizer.zero_grad()


@BOOK.wrong("carried over", optimizer=momentum)
def zeroed_every_second(model, optimizer, batch, steps):
    """gradients are zeroed in every second window only"""
    accumulate(model, batch, steps)
    optimizer.step()
    if updates(model) % 2 == 0:
        optimizer.zero_grad()


@BOOK.wrong("carried over", optimizer=sgd)
def zeroed_at_first(model, optimizer, batch, steps):
    """from update 3 on gradients are not zeroed any more"""
    if updates(model) <= 3:
        optimizer.zero_grad()
    accumulate(model, batch, steps)
    optimizer.step()


@BOOK.wrong("carried over", optimizer=sgd)
def a_tenth_kept(model, optimizer, batch, steps):
    """a tenth of the last window's gradient is kept"""
    accumulate(model, batch, steps)
    optimizer.step()
    for p in model.parameters():
        p.grad.mul_(0.1)


@BOOK.wrong("zero_grad", optimizer=sgd)
def only_the_head_zeroed(model, optimizer, batch, steps):
    """only the head is zeroed: the body's gradient is carried over"""
    accumulate(model, batch, steps)
    optimizer.step()
    model.head.zero_grad()


@BOOK.wrong("zero_grad", optimizer=grouped)
def second_group_not_zeroed(model, optimizer, batch, steps):
    """the optimizer's second group, the biases, is not zeroed"""
    accumulate(model, batch, steps)
    optimizer.step()
    for p in optimizer.param_groups[0]["params"]:
        p.grad = None


@BOOK.wrong("zero_grad", optimizer=sgd)
def one_bias_kept_once(model, optimizer, batch, steps):
    """head.bias is not zeroed after the second window"""
    accumulate(model, batch, steps)
    optimizer.step()
    kept = model.head.bias.grad if updates(model) == 2 else None
    optimizer.zero_grad()
    model.head.bias.grad = kept


@BOOK.wrong("schedule", optimizer=sgd)
def rate_by_steps(model, optimizer, batch, steps):
    """the learning rate is multiplied by the 4 micro-batches"""
    accumulate(model, batch, steps)
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * steps
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("schedule", optimizer=grouped)
def half_rate_for_the_biases(model, optimizer, batch, steps):
    """from update 4 on the biases learn at half their rate"""
    accumulate(model, batch, steps)
    if updates(model) == 4:
        optimizer.param_groups[1]["lr"] *= 0.5
    optimizer.step()
    optimizer.zero_grad()


def falling(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


SCHEDULED = dict(scheduler=falling, model=mlp)


@BOOK.wrong("schedule", optimizer=sgd, **SCHEDULED)
def schedule_by_micro_batch(model, optimizer, batch, steps, schedule):
    """the schedule steps once a micro-batch: 4 times too fast"""
    parts = micro_batches(batch, steps)
    for i, (x, y) in enumerate(parts, 1):
        loss_of(model, x, y, batch).backward()
        if i == len(parts):
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()


@BOOK.wrong("schedule", optimizer=momentum, **SCHEDULED)
def schedule_never(model, optimizer, batch, steps, schedule):
    """the schedule never steps"""
    accumulate(model, batch, steps)
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("schedule", optimizer=sgd, **SCHEDULED)
def schedule_twice_after_the_epoch(model, optimizer, batch, steps, schedule):
    """the schedule steps twice after a smaller window"""
    accumulate(model, batch, steps)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    if len(batch[0]) < 24:
        schedule.step()


@BOOK.wrong("by hand", optimizer=momentum)
def momentum_thrown_away(model, optimizer, batch, steps):
    """the optimizer's momentum is thrown away before every update"""
    optimizer.state.clear()
    accumulate(model, batch, steps)
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("by hand", optimizer=sgd)
def weight_clamped(model, optimizer, batch, steps):
    """head.weight is clamped to 0.2 by hand after every update"""
    accumulate(model, batch, steps)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        model.head.weight.clamp_(-0.2, 0.2)


@BOOK.wrong("by hand", optimizer=sgd)
def bias_moved_in_between(model, optimizer, batch, steps):
    """body.bias moves during the window: 0.1 % of its gradient after micro-batch 1"""
    for i, (x, y) in enumerate(micro_batches(batch, steps)):
        loss_of(model, x, y, batch).backward()
        if i == 0:
            with torch.no_grad():
                model.body.bias.sub_(model.body.bias.grad, alpha=0.001)
    optimizer.step()
    optimizer.zero_grad()


def waiting(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=200)


@BOOK.right("schedule", optimizer=sgd, **SCHEDULED)
def schedule_once_a_window(model, optimizer, batch, steps, schedule):
    accumulate(model, batch, steps)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()


@BOOK.right("schedule", optimizer=grouped, scheduler=waiting)
def one_cycle_once_a_window(model, optimizer, batch, steps, schedule):
    parts = micro_batches(batch, steps)
    for i, (x, y) in enumerate(parts, 1):
        loss_of(model, x, y, batch).backward()
        if i == len(parts):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


@BOOK.right("zero_grad", optimizer=grouped)
def zeroed_group_by_group(model, optimizer, batch, steps):
    accumulate(model, batch, steps)
    optimizer.step()
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None
