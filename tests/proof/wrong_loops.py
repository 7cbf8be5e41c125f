"""Hand-written loops, each with one bug that shipped somewhere, and the right ones they derive from.

Every loop is `train_window(model, optimizer, batch, steps[, schedule])` as a user would write it, with
micro-batches of a fixed size. `python -m tests.proof.mutants` certifies them all and prints who caught what.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, StepLR

MICRO = 4
STEPS = 4
SAMPLES = MICRO * STEPS
TrainWindow = Callable[..., Any]


@dataclass(frozen=True)
class Setting:
    """What a loop is certified on: the model, the larger batch's loss, the batch, and `certify`'s options."""

    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[], Any] = nn.CrossEntropyLoss
    steps: int = STEPS
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Loop:
    """One loop to certify.

    Attributes:
        name: the bug, or what is right about it.
        make: a fresh loop, without what an earlier one remembers.
        caught_by: how the check begins that has to fail; "" of a right loop.
        says: words that the verdict's line has to contain.
    """

    name: str
    setting: Setting
    make: Callable[[], TrainWindow]
    caught_by: str = ""
    says: str = ""


def classifier() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5))


def samples(count: int = SAMPLES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 6, generator=generator), torch.randint(0, 5, (count,), generator=generator)


class Words(nn.Module):
    """Tokens (n, length) to scores (n, classes, length)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(tokens))).transpose(1, 2)


def sentences() -> tuple[Tensor, Tensor]:
    """Every sentence has a padding of its own."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, 11, (SAMPLES, 8), generator=generator)
    targets = torch.randint(0, 7, (SAMPLES, 8), generator=generator)
    lengths = 1 + torch.arange(SAMPLES).unsqueeze(1) * 7 // (SAMPLES - 1)
    return tokens, targets.masked_fill(torch.arange(8) >= lengths, -100)


def split(batch: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    inputs, targets = batch
    return list(zip(inputs.split(MICRO), targets.split(MICRO), strict=True))


def groups(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    half = len(parameters) // 2
    return torch.optim.SGD([{"params": parameters[:half]}, {"params": parameters[half:], "lr": 0.01}], lr=0.1)


CLASSES = Setting(classifier, samples)
TOKENS = Setting(Words, sentences)
COSINE = Setting(classifier, samples, options={"scheduler": lambda o: CosineAnnealingLR(o, 40)})
WARM_UP = Setting(classifier, samples, options={"scheduler": lambda o: LambdaLR(o, lambda n: (n + 1) / 20)})
TWO_GROUPS = Setting(
    classifier, samples, options={"optimizer": groups, "scheduler": lambda o: StepLR(o, 3, 0.5)}
)
CLIPPED = Setting(classifier, samples, options={"clip_norm": 0.2})
ADAM = Setting(classifier, samples, options={"optimizer": lambda p: Adam(p, lr=1e-2)})
DECAYED = Setting(classifier, samples, options={"optimizer": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1)})


def right(model, optimizer, batch, steps, schedule=None):
    logged = 0.0
    for inputs, targets in split(batch):
        loss = cross_entropy(model(inputs), targets, reduction="sum") / len(batch[1])
        loss.backward()
        logged += loss.item()
    optimizer.step()
    if schedule is not None:
        schedule.step()
    optimizer.zero_grad()
    return logged


def right_tokens(model, optimizer, batch, steps):
    valid = (batch[1] != -100).sum()
    logged = 0.0
    for inputs, targets in split(batch):
        loss = cross_entropy(model(inputs), targets, reduction="sum") / valid
        loss.backward()
        logged += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    return logged


def right_clipped(model, optimizer, batch, steps):
    for inputs, targets in split(batch):
        (cross_entropy(model(inputs), targets, reduction="sum") / len(batch[1])).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.2)
    optimizer.step()
    optimizer.zero_grad()


def mean_of_means(model, optimizer, batch, steps):
    parts = split(batch)
    for inputs, targets in parts:
        (cross_entropy(model(inputs), targets) / len(parts)).backward()
    optimizer.step()
    optimizer.zero_grad()


def divided_twice(model, optimizer, batch, steps):
    valid = (batch[1] != -100).sum()
    for inputs, targets in split(batch):
        (cross_entropy(model(inputs), targets, reduction="sum") / valid / steps).backward()
    optimizer.step()
    optimizer.zero_grad()


def not_divided(model, optimizer, batch, steps):
    for inputs, targets in split(batch):
        cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    optimizer.zero_grad()


def tokens_not_divided(model, optimizer, batch, steps):
    for inputs, targets in split(batch):
        cross_entropy(model(inputs), targets, reduction="sum").backward()
    optimizer.step()
    optimizer.zero_grad()


def small_gradient(model, optimizer, batch, steps):
    logged = 0.0
    for inputs, targets in split(batch):
        loss = cross_entropy(model(inputs), targets, reduction="sum") / len(batch[1])
        (loss / steps).backward()
        logged += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    return logged


def always_by_steps(model, optimizer, batch, steps):
    for inputs, targets in split(batch):
        (cross_entropy(model(inputs), targets) / steps).backward()
    optimizer.step()
    optimizer.zero_grad()


def not_zeroed(model, optimizer, batch, steps):
    for inputs, targets in split(batch):
        (cross_entropy(model(inputs), targets, reduction="sum") / len(batch[1])).backward()
    optimizer.step()


def zeroed_inside(model, optimizer, batch, steps):
    for inputs, targets in split(batch):
        optimizer.zero_grad()
        (cross_entropy(model(inputs), targets, reduction="sum") / len(batch[1])).backward()
    optimizer.step()


def last_one_lost(model, optimizer, batch, steps):
    parts = split(batch)
    for number, (inputs, targets) in enumerate(parts):
        loss = cross_entropy(model(inputs), targets, reduction="sum") / len(batch[1])
        if number < len(parts) - 1:
            loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def last_one_left_over(model, optimizer, batch, steps):
    """Steps before the last backward, whose gradient goes into the next window."""
    parts = split(batch)
    for number, (inputs, targets) in enumerate(parts):
        if number == len(parts) - 1:
            optimizer.step()
            optimizer.zero_grad()
        (cross_entropy(model(inputs), targets, reduction="sum") / len(batch[1])).backward()


def partial_dropped(model, optimizer, batch, steps):
    parts = [part for part in split(batch) if len(part[1]) == MICRO]
    for inputs, targets in parts:
        (cross_entropy(model(inputs), targets) / len(parts)).backward()
    optimizer.step()
    optimizer.zero_grad()


def sample_doubled(model, optimizer, batch, steps):
    inputs, targets = batch
    for begin in range(0, len(targets), MICRO):
        rows = slice(max(0, begin - 1), begin + MICRO)
        (cross_entropy(model(inputs[rows]), targets[rows], reduction="sum") / len(targets)).backward()
    optimizer.step()
    optimizer.zero_grad()


def stepped_inside(model, optimizer, batch, steps):
    for inputs, targets in split(batch):
        (cross_entropy(model(inputs), targets, reduction="sum") / len(batch[1])).backward()
        optimizer.step()
        optimizer.zero_grad()


def graph_kept(model, optimizer, batch, steps):
    total: Any = 0.0
    for inputs, targets in split(batch):
        total = total + cross_entropy(model(inputs), targets, reduction="sum") / len(batch[1])
    total.backward()
    optimizer.step()
    optimizer.zero_grad()
    return total.item()


def outputs_kept(model, optimizer, batch, steps):
    """Keeps each micro-batch's outputs for a metric, and with them its graph until the next is there."""
    kept = []
    for inputs, targets in split(batch):
        kept.append(cross_entropy(model(inputs), targets, reduction="sum") / len(batch[1]))
        kept[-1].backward(retain_graph=True)
    optimizer.step()
    optimizer.zero_grad()
    return sum(loss.item() for loss in kept)


def decayed_inside(model, optimizer, batch, steps):
    group = optimizer.param_groups[0]
    decay = group["weight_decay"] or group.get("own_decay", 0.0)
    group["weight_decay"], group["own_decay"] = 0.0, decay
    for inputs, targets in split(batch):
        (cross_entropy(model(inputs), targets, reduction="sum") / len(batch[1])).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 - group["lr"] * decay)
    optimizer.step()
    optimizer.zero_grad()


def decayed_n_times(model, optimizer, batch, steps):
    """Decays after the window, but once for every micro-batch."""
    right(model, optimizer, batch, steps)
    group = optimizer.param_groups[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_((1 - group["lr"] * group["weight_decay"]) ** (steps - 1))


def one_rate_for_all(model, optimizer, batch, steps, schedule):
    right(model, optimizer, batch, steps, schedule)
    for group in optimizer.param_groups:
        group["lr"] = schedule.get_last_lr()[0]


def scheduled_inside(model, optimizer, batch, steps, schedule):
    parts = split(batch)
    for number, (inputs, targets) in enumerate(parts):
        (cross_entropy(model(inputs), targets, reduction="sum") / len(batch[1])).backward()
        if number == len(parts) - 1:
            optimizer.step()
        schedule.step()
    optimizer.zero_grad()


def logs_the_last(model, optimizer, batch, steps):
    loss = torch.zeros(())
    for inputs, targets in split(batch):
        loss = cross_entropy(model(inputs), targets)
        (loss * len(targets) / len(batch[1])).backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def logs_the_sum(model, optimizer, batch, steps):
    logged = 0.0
    for inputs, targets in split(batch):
        loss = cross_entropy(model(inputs), targets)
        (loss * len(targets) / len(batch[1])).backward()
        logged += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    return logged


def clipped_inside(model, optimizer, batch, steps):
    for inputs, targets in split(batch):
        (cross_entropy(model(inputs), targets, reduction="sum") / len(batch[1])).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.2)
    optimizer.step()
    optimizer.zero_grad()


def clipped_too_early(model, optimizer, batch, steps):
    parts = split(batch)
    for number, (inputs, targets) in enumerate(parts):
        (cross_entropy(model(inputs), targets, reduction="sum") / len(batch[1])).backward()
        if number == len(parts) - 2:
            nn.utils.clip_grad_norm_(model.parameters(), 0.2)
    optimizer.step()
    optimizer.zero_grad()


def counted_by_itself() -> TrainWindow:
    """Sets the warm-up's rate from its own count, which no checkpoint holds."""
    counts: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()

    def train_window(model, optimizer, batch, steps, schedule):
        number = counts.get(model, 0)
        for group, rate in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
            group["lr"] = group["initial_lr"] * rate(number)
        counts[model] = number + 1
        return right(model, optimizer, batch, steps)

    return train_window


def lost_on_resume() -> TrainWindow:
    """After a resume it skips the micro-batches before the checkpoint, whose gradients were not saved."""
    models: WeakSet[nn.Module] = WeakSet()

    def train_window(model, optimizer, batch, steps):
        resumed = model not in models and bool(optimizer.state)
        models.add(model)
        for inputs, targets in split(batch)[steps // 2 if resumed else 0 :]:
            (cross_entropy(model(inputs), targets, reduction="sum") / len(batch[1])).backward()
        optimizer.step()
        optimizer.zero_grad()

    return train_window


def always(train_window: TrainWindow) -> Callable[[], TrainWindow]:
    """Makes a loop that remembers nothing."""
    return lambda: train_window


LOOPS = [
    Loop("right: classes", CLASSES, always(right)),
    Loop("right: tokens", TOKENS, always(right_tokens)),
    Loop("right: clipped", CLIPPED, always(right_clipped)),
    Loop("right: cosine", COSINE, always(right)),
    Loop("right: warm-up", WARM_UP, always(right)),
    Loop("right: two groups", TWO_GROUPS, always(right)),
    Loop("right: Adam", ADAM, always(right)),
    Loop("right: AdamW", DECAYED, always(right)),
    Loop(
        "mean of micro means, ragged window",
        CLASSES,
        always(mean_of_means),
        "gradient, ragged",
        "count alike",
    ),
    Loop("mean of micro means, token counts", TOKENS, always(mean_of_means), "gradient, fp64", "count alike"),
    Loop("token sums divided twice", TOKENS, always(divided_twice), "gradient, fp64", "divided by 4 twice"),
    Loop("micro means not divided", CLASSES, always(not_divided), "gradient, fp64", "4 times the larger"),
    Loop("token sums not divided", TOKENS, always(tokens_not_divided), "gradient, fp64", "times the larger"),
    Loop(
        "loss right, gradient N times too small",
        CLASSES,
        always(small_gradient),
        "gradient, fp64",
        "0.25 times",
    ),
    Loop("last window divided by N", CLASSES, always(always_by_steps), "gradient, ragged", "divided by 4"),
    Loop("buffer not zeroed", CLASSES, always(not_zeroed), "gradient, {updates}", "window before"),
    Loop("zeroed in every micro-batch", CLASSES, always(zeroed_inside), "gradient, fp64", "does not count"),
    Loop(
        "last micro-batch's gradient lost", CLASSES, always(last_one_lost), "gradient, fp64", "micro-batch 3"
    ),
    Loop(
        "last micro-batch's left over",
        CLASSES,
        always(last_one_left_over),
        "gradient, fp64",
        "does not count",
    ),
    Loop("last partial micro-batch dropped", CLASSES, always(partial_dropped), "samples"),
    Loop("a sample doubled", CLASSES, always(sample_doubled), "gradient, fp64"),
    Loop("stepped in every micro-batch", CLASSES, always(stepped_inside), "number of updates"),
    Loop("losses summed, one backward", CLASSES, always(graph_kept), "saved activations"),
    Loop("losses kept with their graphs", CLASSES, always(outputs_kept), "saved activations"),
    Loop("decayed in every micro-batch", DECAYED, always(decayed_inside), "parameters"),
    Loop("decayed N times a window", DECAYED, always(decayed_n_times), "parameters"),
    Loop("one rate for two groups", TWO_GROUPS, always(one_rate_for_all), "learning rate"),
    Loop("schedule stepped every micro-batch", COSINE, always(scheduled_inside), "learning rate"),
    Loop("clipped in every micro-batch", CLIPPED, always(clipped_inside), "gradient, fp64"),
    Loop("clipped before the last micro-batch", CLIPPED, always(clipped_too_early), "gradient, fp64"),
    Loop("logs the last micro-batch's loss", CLASSES, always(logs_the_last), "logged loss"),
    Loop("logs the sum of the micro means", CLASSES, always(logs_the_sum), "logged loss"),
    Loop("a factor N hidden by Adam", ADAM, always(not_divided), "gradient, fp64", "4 times the larger"),
    Loop("warm-up counted outside the state", WARM_UP, counted_by_itself, "resume"),
    Loop("gradient before a checkpoint lost", CLASSES, lost_on_resume, "resume"),
]
