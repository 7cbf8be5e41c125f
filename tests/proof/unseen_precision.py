"""Loops in low precision: autocast, bf16 parameters, sums in too few bits."""

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from tests.proof.unseen_common import (
    Book,
    Counts,
    decaying,
    micro_batches,
    momentum,
    sgd,
)

BOOK = Book()
updates = Counts()
BF16 = dict(autocast=torch.bfloat16, optimizer=sgd)


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


@BOOK.wrong("own precision", optimizer=sgd)
def gradients_mixed_under_autocast(model, optimizer, batch, steps):
    """fp32 gradients are weighted by a matrix product inside autocast, which rounds them to bf16"""
    mix_under_autocast(model, batch, steps)
    step(optimizer)


@BOOK.wrong("own precision", optimizer=momentum)
def mixed_under_autocast_every_third(model, optimizer, batch, steps):
    """in every third update the gradients are weighted inside autocast, which rounds them to bf16"""
    mix_under_autocast(model, batch, steps, enabled=updates(model) % 3 == 0)
    step(optimizer)


def mix_under_autocast(model, batch, steps, enabled=True):
    parts, rows = micro_batches(batch, steps), []
    parameters = list(model.parameters())
    for x, y in parts:
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
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
