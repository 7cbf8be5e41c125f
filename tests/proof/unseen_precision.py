"""Loops in low precision: autocast, bf16 parameters, gradient scalers, sums in too few bits."""

from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from accumexp.proof import Scaling
from tests.proof.unseen_common import (
    Book,
    Counts,
    decaying,
    grouped,
    micro_batches,
    momentum,
    sgd,
)

BOOK = Book()
updates = Counts()
scalers = WeakKeyDictionary()
BF16 = dict(autocast=torch.bfloat16, optimizer=sgd)
FP16 = dict(autocast=torch.float16, loss_scale=Scaling(growth_interval=4), optimizer=sgd)


def scaler_of(model):
    if model not in scalers:
        scalers[model] = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    return scalers[model]


def loss_of(model, x, y, batch, dtype):
    with torch.autocast("cpu", dtype):
        return F.cross_entropy(model(x), y) * (len(x) / len(batch[0]))


def step(optimizer):
    optimizer.step()
    optimizer.zero_grad()


# Sums in bf16.


def rounded_sum(model, batch, steps, parameters, dtype=torch.bfloat16):
    """Accumulates what these parameters get in a buffer of this dtype."""
    sums = {p: torch.zeros_like(p, dtype=dtype) for p in parameters}
    for x, y in micro_batches(batch, steps):
        (F.cross_entropy(model(x), y) * len(x) / len(batch[0])).backward()
        for p in sums:
            sums[p] += p.grad.to(dtype)
            p.grad = None
    for p, total in sums.items():
        p.grad = total.to(p.dtype)


@BOOK.wrong("bf16", optimizer=sgd)
def head_summed_in_bf16(model, optimizer, batch, steps):
    """the gradient of the head is accumulated in bf16"""
    rounded_sum(model, batch, steps, list(model.head.parameters()))
    step(optimizer)


@BOOK.wrong("bf16", optimizer=momentum, steps=6)
def all_summed_in_half(model, optimizer, batch, steps):
    """gradients are accumulated in fp16"""
    rounded_sum(model, batch, steps, list(model.parameters()), torch.float16)
    step(optimizer)


@BOOK.wrong("bf16", optimizer=sgd)
def body_summed_in_bf16_later(model, optimizer, batch, steps):
    """from update 3 on body.weight is accumulated in bf16"""
    low = [model.body.weight] if updates(model) >= 3 else []
    rounded_sum(model, batch, steps, low)
    step(optimizer)


@BOOK.wrong("bf16", optimizer=sgd)
def compressed_by_micro_batch(model, optimizer, batch, steps):
    """after every micro-batch the gradients are rounded to bf16, as for a compressed exchange"""
    for x, y in micro_batches(batch, steps):
        (F.cross_entropy(model(x), y) * len(x) / len(batch[0])).backward()
        for p in model.parameters():
            p.grad = p.grad.bfloat16().to(p.dtype)
    step(optimizer)


# Wrong in the loop's own precision only.


@BOOK.wrong("own precision", optimizer=sgd, steps=6)
def half_buffers_for_single(model, optimizer, batch, steps):
    """to save memory fp32 gradients are accumulated in bf16 buffers"""
    lower = {torch.float32: torch.bfloat16}
    sums = [torch.zeros_like(p, dtype=lower.get(p.dtype, p.dtype)) for p in model.parameters()]
    for x, y in micro_batches(batch, steps):
        (F.cross_entropy(model(x), y) * len(x) / len(batch[0])).backward()
        for p, total in zip(model.parameters(), sums, strict=True):
            total += p.grad.to(total.dtype)
            p.grad = None
    for p, total in zip(model.parameters(), sums, strict=True):
        p.grad = total.to(p.dtype)
    step(optimizer)


@BOOK.wrong("own precision", **BF16)
def gradients_mixed_under_autocast(model, optimizer, batch, steps):
    """the micro-batches' gradients are weighted by a matrix product inside autocast, which rounds them to bf16"""
    mix_under_autocast(model, batch, steps)
    step(optimizer)


@BOOK.wrong("own precision", **BF16)
def mixed_under_autocast_every_third(model, optimizer, batch, steps):
    """in every third update the gradients are weighted inside autocast, which rounds them to bf16"""
    mix_under_autocast(model, batch, steps, enabled=updates(model) % 3 == 0)
    step(optimizer)


def mix_under_autocast(model, batch, steps, enabled=True):
    parts, rows = micro_batches(batch, steps), []
    parameters = list(model.parameters())
    for x, y in parts:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        grads = torch.autograd.grad(loss, parameters)
        rows.append(torch.cat([g.flatten() for g in grads]))
    shares = rows[0].new_tensor([[len(x) / len(batch[0]) for x, _ in parts]])
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        mean = (shares @ torch.stack(rows))[0].to(rows[0].dtype)
    for p, g in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
        p.grad = g.view_as(p).clone()


@BOOK.wrong("own precision", autocast=torch.float16, optimizer=sgd)
def divided_too_early(model, optimizer, batch, steps):
    """losses are divided by a million before the backward, so most gradients are zero in fp16"""
    for x, y in micro_batches(batch, steps):
        (loss_of(model, x, y, batch, torch.float16) / 1e6).backward()
    for p in model.parameters():
        p.grad *= 1e6
    step(optimizer)


@BOOK.wrong("own precision", precision=torch.bfloat16, optimizer=sgd, steps=6)
def shares_of_the_step_in_bf16(model, optimizer, batch, steps):
    """every micro-batch's gradient is divided in bf16 by 1000 and multiplied again, and added in bf16 to a sum that \
starts at 1"""
    sums = [torch.ones_like(p) for p in model.parameters()]
    for x, y in micro_batches(batch, steps):
        (F.cross_entropy(model(x), y) * len(x) / len(batch[0])).backward()
        for p, total in zip(model.parameters(), sums, strict=True):
            total += p.grad / 1000
            p.grad = None
    for p, total in zip(model.parameters(), sums, strict=True):
        p.grad = (total - 1) * 1000
    step(optimizer)


@BOOK.right("own precision", **BF16)
def autocast(model, optimizer, batch, steps):
    for x, y in micro_batches(batch, steps):
        loss_of(model, x, y, batch, torch.bfloat16).backward()
    step(optimizer)


@BOOK.right("own precision", autocast=torch.bfloat16, optimizer=decaying, clip_norm=0.2)
def autocast_and_clipping(model, optimizer, batch, steps):
    for x, y in micro_batches(batch, steps):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(x)
        (F.cross_entropy(outputs.to(x.dtype), y) * (len(x) / len(batch[0]))).backward()
    clip_grad_norm_(model.parameters(), 0.2)
    step(optimizer)


def upcast(outputs, labels):
    return F.cross_entropy(outputs.float(), labels)


@BOOK.right("own precision", loss=upcast, **BF16)
def loss_in_float32(model, optimizer, batch, steps):
    """The outputs are taken to float32, as many models do, also where they were float64."""
    for x, y in micro_batches(batch, steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = upcast(model(x), y)
        (loss * (len(x) / len(batch[0]))).backward()
    step(optimizer)


@BOOK.right("own precision", precision=torch.bfloat16, optimizer=sgd)
def bf16_parameters_with_float32_sums(model, optimizer, batch, steps):
    sums = [
        torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in model.parameters()
    ]
    for x, y in micro_batches(batch, steps):
        (F.cross_entropy(model(x), y) * (len(x) / len(batch[0]))).backward()
        for p, total in zip(model.parameters(), sums, strict=True):
            total += p.grad
            p.grad = None
    for p, total in zip(model.parameters(), sums, strict=True):
        p.grad = total.to(p.dtype)
    step(optimizer)


# Gradient scalers.


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
    """the scaler steps and is updated after every micro-batch: 4 updates, and the scale grows 4 times too fast"""
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
