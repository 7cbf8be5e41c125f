"""Loops with a gradient scaler, in autocast to fp16."""

from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from accumexp.proof import Scaling
from tests.proof.unseen_common import (
    Book,
    decaying,
    grouped,
    micro_batches,
    sgd,
)

BOOK = Book()
scalers = WeakKeyDictionary()
FP16 = dict(autocast=torch.float16, loss_scale=Scaling(growth_interval=4), optimizer=sgd)


def scaler_of(model):
    if model not in scalers:
        scalers[model] = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    return scalers[model]


def loss_of(model, x, y, batch, dtype):
    with torch.autocast("cpu", dtype):
        return F.cross_entropy(model(x), y) * (len(x) / len(batch[0]))


def scaled(model, batch, steps):
    scaler = scaler_of(model)
    for x, y in micro_batches(batch, steps):
        scaler.scale(loss_of(model, x, y, batch, torch.float16)).backward()
    return scaler


@BOOK.right("scaler", **FP16)
def scaler_once_a_window(model, optimizer, batch, steps):
    scaler = scaled(model, batch, steps)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@BOOK.right("scaler", clip_norm=0.1, **{**FP16, "optimizer": decaying})
def scaler_and_clipping(model, optimizer, batch, steps):
    optimizer.zero_grad()
    scaler = scaled(model, batch, steps)
    scaler.unscale_(optimizer)
    clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update()


@BOOK.right("scaler", **{**FP16, "optimizer": grouped})
def scaler_divides_afterwards(model, optimizer, batch, steps):
    scaler = scaler_of(model)
    for x, y in micro_batches(batch, steps):
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss * len(x)).backward()
    scaler.unscale_(optimizer)
    for p in model.parameters():
        p.grad /= len(batch[0])
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@BOOK.wrong("scaler", clip_norm=0.1, **FP16)
def clipped_while_scaled(model, optimizer, batch, steps):
    """the gradient is clipped before it is unscaled: the threshold is a thousand times too low"""
    scaler = scaled(model, batch, steps)
    clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@BOOK.wrong("scaler", **FP16)
def scaler_steps_by_micro_batch(model, optimizer, batch, steps):
    """the scaler steps and is updated after every micro-batch: 4 updates, the scale grows 4 times too fast"""
    scaler = scaler_of(model)
    for x, y in micro_batches(batch, steps):
        scaler.scale(loss_of(model, x, y, batch, torch.float16)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


@BOOK.wrong("scaler", clip_norm=1.0, **FP16)
def overflow_ignored(model, optimizer, batch, steps):
    """the optimizer steps itself and not through the scaler, so an overflow is not skipped"""
    scaler = scaled(model, batch, steps)
    scaler.unscale_(optimizer)
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scaler.update()
    optimizer.zero_grad()


@BOOK.wrong("scaler", **FP16)
def overflow_hidden(model, optimizer, batch, steps):
    """inf and nan become zero after every micro-batch, so the update goes on without those of an overflow"""
    scaler = scaler_of(model)
    for x, y in micro_batches(batch, steps):
        scaler.scale(loss_of(model, x, y, batch, torch.float16)).backward()
        for p in model.parameters():
            torch.nan_to_num_(p.grad, 0.0, 0.0, 0.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@BOOK.wrong("scaler", **FP16)
def unscaled_after_the_first(model, optimizer, batch, steps):
    """the gradient is unscaled after the first micro-batch, the others are added with their scale"""
    scaler = scaler_of(model)
    for i, (x, y) in enumerate(micro_batches(batch, steps)):
        scaler.scale(loss_of(model, x, y, batch, torch.float16)).backward()
        if i == 0:
            scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@BOOK.wrong("scaler", **FP16)
def new_scaler_every_window(model, optimizer, batch, steps):
    """every window makes a new scaler, so the scale never grows and forgets an overflow"""
    scalers.pop(model, None)
    scaler = scaled(model, batch, steps)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@BOOK.wrong("scaler", **FP16)
def scaled_and_not_divided(model, optimizer, batch, steps):
    """the scaled losses of the 4 micro-batches are not divided: the gradient is 4 times too large"""
    scaler = scaler_of(model)
    for x, y in micro_batches(batch, steps):
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@BOOK.wrong("scaler", **FP16)
def last_micro_batch_not_scaled(model, optimizer, batch, steps):
    """the last micro-batch's loss is not scaled, so it counts a thousand times too little"""
    scaler = scaler_of(model)
    parts = micro_batches(batch, steps)
    for i, (x, y) in enumerate(parts):
        loss = loss_of(model, x, y, batch, torch.float16)
        (scaler.scale(loss) if i < len(parts) - 1 or i == 0 else loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
