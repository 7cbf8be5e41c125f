"""Loops of several ranks, each with one bug, and the right ones: certified in real processes of one group.

Every rank is given the update's whole batch and takes its share of each micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR

from accumexp.accum import Window, data_parallel, fully_sharded, map_tensors, rank_share
from accumexp.proof import Scaling

from .wrong_loops import MICRO, Loop, Setting, TrainWindow, Words, always, classifier, samples, sentences
from .wrong_terms import ThreeTerms, balanced, next_sample, ragged, right_share, value_of

Part = tuple[Tensor, Tensor]


def shares(batch: Part, micro: int = MICRO) -> list[tuple[Part, bool]]:
    """(this rank's rows of a micro-batch, whether it is the window's last) for each micro-batch."""
    rank, size = dist.get_rank(), dist.get_world_size()
    parts = zip(batch[0].split(micro), batch[1].split(micro), strict=True)
    local_parts = [(inputs[rank::size], targets[rank::size]) for inputs, targets in parts]
    return [(part, number == len(local_parts) - 1) for number, part in enumerate(local_parts)]


def right(model, optimizer, batch, steps, schedule=None):
    logged = torch.zeros(())
    for (inputs, targets), last in shares(batch):
        with nullcontext() if last else model.no_sync():
            loss = cross_entropy(model(inputs), targets, reduction="sum") / len(batch[1])
            (loss * dist.get_world_size()).backward()
        logged += loss.detach()
    dist.all_reduce(logged)
    optimizer.step()
    if schedule is not None:
        schedule.step()
    optimizer.zero_grad()
    return logged.item()


def right_tokens(model, optimizer, batch, steps):
    counts = [(targets != -100).sum() for (_, targets), _ in shares(batch)]
    valid = torch.stack(counts).sum()
    dist.all_reduce(valid)
    for (inputs, targets), last in shares(batch):
        with nullcontext() if last else model.no_sync():
            loss = cross_entropy(model(inputs), targets, reduction="sum") / valid
            (loss * dist.get_world_size()).backward()
    optimizer.step()
    optimizer.zero_grad()


def right_by_hand(model, optimizer, batch, steps):
    """Without a wrapper: one sum over the ranks of each parameter's gradient."""
    for (inputs, targets), _ in shares(batch):
        (cross_entropy(model(inputs), targets, reduction="sum") / len(batch[1])).backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    optimizer.step()
    optimizer.zero_grad()


def with_window(model, optimizer, batch, steps):
    return window_of(nn.CrossEntropyLoss())(model, optimizer, batch, steps)


def window_of(loss: Any) -> TrainWindow:
    """A loop of `Window` with this loss."""

    def train_window(model, optimizer, batch, steps):
        return by_window(loss, model, optimizer, batch, steps)

    return train_window


def by_window(loss, model, optimizer, batch, steps):
    count = len(batch[1])
    steps = -(-count // MICRO)
    rows = [n for part in rank_share(count, steps, dist.get_rank(), dist.get_world_size()) for n in part]
    window = Window(model, loss, steps)
    inputs, targets = (map_tensors(lambda t: t[rows], part) for part in batch)
    result = window.backward(inputs, targets)
    optimizer.step()
    optimizer.zero_grad(set_to_none=not window.sync.keeps_gradients)
    return result.loss.item()


def too_small(model, optimizer, batch, steps):
    for (inputs, targets), last in shares(batch):
        with nullcontext() if last else model.no_sync():
            (cross_entropy(model(inputs), targets, reduction="sum") / len(batch[1])).backward()
    optimizer.step()
    optimizer.zero_grad()


def ranks_alike(model, optimizer, batch, steps):
    """Each rank divides by its own tokens."""
    valid = sum((targets != -100).sum() for (_, targets), _ in shares(batch))
    for (inputs, targets), last in shares(batch):
        with nullcontext() if last else model.no_sync():
            (cross_entropy(model(inputs), targets, reduction="sum") / valid).backward()
    optimizer.step()
    optimizer.zero_grad()


def ragged_alike(model, optimizer, batch, steps):
    """Each rank's mean of its rows counts alike, whatever its share."""
    for (inputs, targets), last in shares(batch, 5):
        with nullcontext() if last else model.no_sync():
            (cross_entropy(model(inputs), targets) * min(5, len(batch[1])) / len(batch[1])).backward()
    optimizer.step()
    optimizer.zero_grad()


def synchronised_always(model, optimizer, batch, steps):
    for (inputs, targets), _ in shares(batch):
        loss = cross_entropy(model(inputs), targets, reduction="sum") / len(batch[1])
        (loss * dist.get_world_size()).backward()
    optimizer.step()
    optimizer.zero_grad()


def no_sync_around_backward(model, optimizer, batch, steps):
    for (inputs, targets), last in shares(batch):
        loss = cross_entropy(model(inputs), targets, reduction="sum") / len(batch[1])
        with nullcontext() if last else model.no_sync():
            (loss * dist.get_world_size()).backward()
    optimizer.step()
    optimizer.zero_grad()


def flag_after_forward(model, optimizer, batch, steps):
    """The flag that says whether to synchronise is read by the forward, and set after it."""
    for (inputs, targets), last in shares(batch):
        loss = cross_entropy(model(inputs), targets, reduction="sum") / len(batch[1])
        model.require_backward_grad_sync = last
        (loss * dist.get_world_size()).backward()
    optimizer.step()
    optimizer.zero_grad()


def scheduled_by_ranks(model, optimizer, batch, steps, schedule):
    right(model, optimizer, batch, steps)
    for _ in range(dist.get_world_size()):
        schedule.step()


def balance_of_ranks(model, optimizer, batch, steps):
    """Each rank balances the experts of its own samples: two passes, and the loss of this rank's outputs."""
    parts = shares(batch)
    with torch.no_grad():
        outputs = [model(inputs) for (inputs, _), _ in parts]
    leaf = torch.cat(outputs).requires_grad_()
    targets = torch.cat([targets for (_, targets), _ in parts])
    share = len(targets) * dist.get_world_size() / len(batch[1])
    slopes = torch.autograd.grad(value_of(balanced, leaf, targets) * share, leaf)[0]
    start = 0
    for (inputs, few), last in parts:
        with nullcontext() if last else model.no_sync():
            model(inputs).backward(slopes[start : start + len(few)])
        start += len(few)
    optimizer.step()
    optimizer.zero_grad()


def denominators_of_ranks(model, optimizer, batch, steps):
    """The masked term is divided by each rank's own number of targets."""
    loss, parts = ThreeTerms(), shares(batch)
    with torch.no_grad():
        every = [loss.terms(model(inputs), targets) for (inputs, targets), _ in parts]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, every)
    window = [terms for of_rank in gathered for terms in of_rank]
    for k, ((inputs, targets), last) in enumerate(parts):
        with nullcontext() if last else model.no_sync():
            terms = loss.terms(model(inputs), targets)
            values = [
                right_share(name, term, k, every)
                if name == "masked"
                else right_share(name, term, k, window) * dist.get_world_size()
                for name, term in terms.items()
            ]
            torch.stack(values).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def scaled(shared: bool) -> Callable[[], TrainWindow]:
    """A loss scale by hand; each rank looks for overflows in its own gradients."""

    def make() -> TrainWindow:
        scales: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()

        def train_window(model, optimizer, batch, steps):
            scale = scales.setdefault(model, 2.0**8)
            for (inputs, targets), _ in shares(batch):
                loss = cross_entropy(model(inputs), targets, reduction="sum") / len(batch[1])
                (loss * scale).backward()
            finite = torch.tensor(all(bool(p.grad.isfinite().all()) for p in model.parameters())).int()
            if shared:
                dist.all_reduce(finite, dist.ReduceOp.MIN)
            for parameter in model.parameters():
                parameter.grad.nan_to_num_(0, 0, 0).div_(scale)
                dist.all_reduce(parameter.grad)
            if finite:
                optimizer.step()
            else:
                scales[model] = scale / 2
            optimizer.zero_grad()

        return train_window

    return make


def on_ranks(**options: Any) -> Setting:
    return Setting(classifier, samples, options={"prepare": DistributedDataParallel, **options})


WRAPPED = on_ranks()
PLAIN = on_ranks(prepare=None)
TOKENS = Setting(Words, sentences, options={"prepare": DistributedDataParallel})
UNEVEN = Setting(classifier, lambda: samples(15), steps=3, options={"prepare": DistributedDataParallel})
COSINE = on_ranks(scheduler=lambda o: CosineAnnealingLR(o, 40))
SCALED = on_ranks(prepare=None, loss_scale=Scaling())
BALANCE = Setting(classifier, samples, lambda: balanced, options={"prepare": DistributedDataParallel})
TERMS = Setting(classifier, ragged, ThreeTerms, options={"prepare": DistributedDataParallel})
LOOPS = [
    Loop("right: DistributedDataParallel", WRAPPED, always(right)),
    Loop("right: DistributedDataParallel, tokens", TOKENS, always(right_tokens)),
    Loop("right: DistributedDataParallel, cosine", COSINE, always(right)),
    Loop("right: summed by hand", PLAIN, always(right_by_hand)),
    Loop("right: Window on data_parallel", on_ranks(prepare=data_parallel), always(with_window)),
    Loop("right: Window on DistributedDataParallel", WRAPPED, always(with_window)),
    Loop(
        "right: Window on fully_sharded",
        on_ranks(prepare=lambda m: fully_sharded(m, torch.device("cpu"))),
        always(with_window),
    ),
    Loop("right: overflow shared", SCALED, scaled(shared=True)),
    Loop("right: Window, three terms on ranks", TERMS, always(window_of(ThreeTerms()))),
    Loop(
        "right: Window, InfoNCE on ranks",
        Setting(classifier, samples, lambda: next_sample, options={"prepare": DistributedDataParallel}),
        always(window_of(next_sample)),
    ),
    Loop("right: Window, balance of experts on ranks", BALANCE, always(window_of(balanced))),
    Loop(
        "balance of each rank",
        BALANCE,
        always(balance_of_ranks),
        "gradient, fp64",
        "term 'balance' is computed on each rank's samples",
    ),
    Loop(
        "denominators of each rank",
        TERMS,
        always(denominators_of_ranks),
        "gradient, fp64",
        "term 'masked' is divided by each rank's own weight",
    ),
    Loop("gradients divided by the ranks", WRAPPED, always(too_small), "gradient, fp64", "0.5 times"),
    Loop("ranks count alike, token counts", TOKENS, always(ranks_alike), "gradient, fp64", "count"),
    Loop("ranks count alike, ragged shares", UNEVEN, always(ragged_alike), "gradient, fp64", "count"),
    Loop("reduced in every micro-batch", WRAPPED, always(synchronised_always), "gradient reductions"),
    Loop(
        "no_sync around the backward alone", WRAPPED, always(no_sync_around_backward), "gradient reductions"
    ),
    Loop("synchronised by a late flag", WRAPPED, always(flag_after_forward), "ranks agree"),
    Loop("schedule stepped by every rank", COSINE, always(scheduled_by_ranks), "learning rate"),
    Loop("overflow not shared", SCALED, scaled(shared=False), "overflow in each"),
]
