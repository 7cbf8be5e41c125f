"""Loops whose gradients or loss scales are wrong in low precision, and the right ones beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from accumexp.accum import Window
from accumexp.proof import Scaling

from .wrong_loops import CLASSES, MICRO, STEPS, Loop, Setting, TrainWindow, always, classifier, samples, split

INTERVAL = 4


def rounded(steps: int) -> Setting:
    """Parameters of bf16, in `steps` micro-batches of one size."""
    return Setting(
        classifier, lambda: samples(MICRO * steps), steps=steps, options={"precision": torch.bfloat16}
    )


def added_in_bf16(model, optimizer, batch, steps):
    for inputs, targets in split(batch):
        (cross_entropy(model(inputs).float(), targets, reduction="sum") / len(batch[1])).backward()
    optimizer.step()
    optimizer.zero_grad()


def added_in_fp32(model, optimizer, batch, steps):
    sums: dict[nn.Parameter, Tensor] = {}
    for inputs, targets in split(batch):
        (cross_entropy(model(inputs).float(), targets, reduction="sum") / len(batch[1])).backward()
        for parameter in model.parameters():
            given, parameter.grad = parameter.grad, None
            if parameter not in sums:
                sums[parameter] = torch.zeros_like(parameter, dtype=torch.float32)
            sums[parameter] += given
    for parameter, total in sums.items():
        parameter.grad = total.to(parameter.dtype)
    optimizer.step()
    optimizer.zero_grad()


def with_buffers(model, optimizer, batch, steps):
    result = Window(model, nn.CrossEntropyLoss(), steps, fp32_buffers=True).backward(
        *batch, steps=-(-len(batch[1]) // MICRO)
    )
    optimizer.step()
    optimizer.zero_grad()
    return result.loss.item()


def kept_in_fp16(model, optimizer, batch, steps):
    for inputs, targets in split(batch):
        (cross_entropy(model(inputs), targets, reduction="sum") / len(batch[1])).backward()
        for parameter in model.parameters():
            parameter.grad = parameter.grad.half().to(parameter.dtype)
    optimizer.step()
    optimizer.zero_grad()


class Scale:
    """A dynamic loss scale written by hand, with the bugs that its arguments name.

    Args:
        each: counts every micro-batch without an overflow instead of every window.
        last: checks the last micro-batch's gradient alone.
        lowered: lowers the scale once for every micro-batch that overflowed.
    """

    def __init__(self, each: bool, last: bool, lowered: bool) -> None:
        self.each, self.last, self.lowered = each, last, lowered
        self.value = 2.0**10
        self.good = 0

    def update(self, overflows: Sequence[bool]) -> bool:
        """Updates the scale after a window; returns whether its step is skipped."""
        overflow = overflows[-1] if self.last else any(overflows)
        if self.lowered:
            self.value *= 0.5 ** sum(overflows)
        elif overflow:
            self.value *= 0.5
        if overflow:
            self.good = 0
            return True
        self.good += len(overflows) if self.each else 1
        if self.good >= INTERVAL:
            self.value *= 2.0
            self.good = 0
        return False


def scaled(each: bool = False, last: bool = False, lowered: bool = False) -> Callable[[], TrainWindow]:
    def make() -> TrainWindow:
        scales: WeakKeyDictionary[nn.Module, Scale] = WeakKeyDictionary()

        def train_window(model, optimizer, batch, steps):
            scale = scales.setdefault(model, Scale(each, last, lowered))
            sums: dict[nn.Parameter, Tensor] = {}
            overflows = []
            for inputs, targets in split(batch):
                with torch.autocast("cpu", torch.float16):
                    loss = cross_entropy(model(inputs), targets, reduction="sum") / len(batch[1])
                (loss * scale.value).backward()
                overflows.append(not all(bool(p.grad.isfinite().all()) for p in model.parameters()))
                for parameter in model.parameters():
                    given, parameter.grad = parameter.grad / scale.value, None
                    sums[parameter] = sums[parameter] + given if parameter in sums else given
            for parameter, total in sums.items():
                parameter.grad = total
            if not scale.update(overflows):
                optimizer.step()
            optimizer.zero_grad()

        return train_window

    return make


def by_grad_scaler(updates_inside: bool) -> Callable[[], TrainWindow]:
    def make() -> TrainWindow:
        scalers: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()

        def train_window(model, optimizer, batch, steps):
            if model not in scalers:
                scalers[model] = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=INTERVAL)
            scaler = scalers[model]
            parts = split(batch)
            for number, (inputs, targets) in enumerate(parts):
                with torch.autocast("cpu", torch.float16):
                    loss = cross_entropy(model(inputs), targets, reduction="sum") / len(batch[1])
                scaler.scale(loss).backward()
                if number == len(parts) - 1:
                    scaler.step(optimizer)
                    scaler.update()
                elif updates_inside:
                    scaler._check_inf_per_device(optimizer)
                    scaler.update()
            optimizer.zero_grad()

        return train_window

    return make


SCALED = Setting(
    classifier,
    samples,
    options={"autocast": torch.float16, "loss_scale": Scaling(growth_interval=INTERVAL)},
)
BF16 = "addition, bf16"
LOOPS = [
    *(
        Loop(f"right: {n} bf16 gradients added in fp32", rounded(n), always(added_in_fp32))
        for n in (8, 32, 256)
    ),
    *(Loop(f"right: Window of {n} with fp32_buffers", rounded(n), always(with_buffers)) for n in (8, 256)),
    Loop("right: loss scale by hand", SCALED, scaled()),
    Loop("right: GradScaler", SCALED, by_grad_scaler(False)),
    *(
        Loop(f"{n} gradients added in bf16", rounded(n), always(added_in_bf16), BF16, f"{n} gradients")
        for n in (8, 32, 256)
    ),
    Loop("gradients kept in fp16", CLASSES, always(kept_in_fp16), "addition, fp32", "less than float32"),
    Loop("GradScaler updated every micro-batch", SCALED, by_grad_scaler(True), "loss scale by update"),
    Loop("scale grows every micro-batch", SCALED, scaled(each=True), "loss scale by update"),
    Loop("a late micro-batch hides an overflow", SCALED, scaled(last=True), "overflow in each"),
    Loop("scale lowered N times", SCALED, scaled(lowered=True), "loss scale after"),
]
assert STEPS == SCALED.steps
