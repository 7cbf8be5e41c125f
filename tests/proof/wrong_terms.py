"""Loops with losses of several terms, or that couple samples, each with one fault, and the right ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, normalize, one_hot

from accumexp.accum import Term, Window
from accumexp.accum.batch import steps_for

from .wrong_loops import MICRO, SAMPLES, STEPS, Loop, Setting, TrainWindow, always, classifier, samples, split

# What term `name` of micro-batch `k` adds to the loss, given the terms of all micro-batches of the window.
Share = Callable[[str, Term, int, list[dict[str, Term]]], Tensor]


class ThreeTerms:
    """A mean over samples, one over some targets, and one over samples that the outputs choose."""

    def weights(self, targets: Tensor) -> dict[str, Tensor]:
        return {"masked": (targets > 1).sum()}

    def terms(self, outputs: Tensor, targets: Tensor) -> dict[str, Term]:
        losses = cross_entropy(outputs, targets, reduction="none")
        routed = outputs.argmax(1) < 3
        return {
            "classes": Term(losses.sum(), len(targets)),
            "masked": Term((losses * (targets > 1)).sum(), (targets > 1).sum(), 0.5),
            "balance": Term((outputs.square().sum(1) * routed).sum(), routed.sum(), 0.3),
        }


def weight(name: str, every: list[dict[str, Term]]) -> float:
    return sum(float(terms[name].weight) for terms in every) or 1.0


def right_share(name: str, term: Term, k: int, every: list[dict[str, Term]]) -> Tensor:
    return term.coefficient * term.total / weight(name, every)


def changed(fault: Callable[..., Tensor], wrong: str = "balance") -> Callable[[], TrainWindow]:
    """A loop in which term `wrong` adds what `fault` makes of (term, k, its terms in all micro-batches)."""

    def share(name: str, term: Term, k: int, every: list[dict[str, Term]]) -> Tensor:
        named_terms = [terms[name] for terms in every]
        return fault(term, k, named_terms) if name == wrong else right_share(name, term, k, every)

    return always(by_terms(share))


def by_terms(share: Share) -> TrainWindow:
    def train_window(model, optimizer, batch, steps):
        loss = ThreeTerms()
        parts = split(batch)
        with torch.no_grad():
            every = [loss.terms(model(inputs), targets) for inputs, targets in parts]
        logged = 0.0
        for k, (inputs, targets) in enumerate(parts):
            terms = loss.terms(model(inputs), targets)
            value = torch.stack([share(name, term, k, every) for name, term in terms.items()]).sum()
            value.backward()
            logged += value.item()
        optimizer.step()
        optimizer.zero_grad()
        return logged

    return train_window


def summed(every: list[Term]) -> float:
    return sum(float(term.weight) for term in every) or 1.0


def by_steps(term: Term, k: int, every: list[Term]) -> Tensor:
    return term.coefficient * term.total / summed(every) / STEPS


def by_last(term: Term, k: int, every: list[Term]) -> Tensor:
    return term.coefficient * term.total / max(1, every[-1].weight)


def by_each(term: Term, k: int, every: list[Term]) -> Tensor:
    return term.coefficient * term.total / max(1, term.weight) / len(every)


def as_sum(term: Term, k: int, every: list[Term]) -> Tensor:
    return term.coefficient * term.total


def in_the_last_alone(term: Term, k: int, every: list[Term]) -> Tensor:
    return term.coefficient * term.total / summed(every) * (k == len(every) - 1)


def next_sample(outputs: Tensor, _: Tensor) -> Tensor:
    """InfoNCE of every sample with the next one in the batch as its positive."""
    normed = normalize(outputs, dim=1)
    similarities = normed @ normed.T / 0.3 - 1e6 * torch.eye(len(normed), dtype=normed.dtype)
    return cross_entropy(similarities, torch.arange(1, len(normed) + 1) % len(normed))


def balanced(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Cross entropy, and the balance of experts: a product of two means over the batch."""
    chosen = one_hot(outputs.argmax(1), outputs.shape[1]).to(outputs.dtype).mean(0)
    return {
        "classes": cross_entropy(outputs, targets),
        "balance": 0.5 * (chosen * outputs.softmax(1).mean(0)).sum(),
    }


def rewarded(outputs: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
    """A policy gradient with advantages: rewards less their mean, over their deviation."""
    actions, rewards = targets
    advantages = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-3)
    chosen = log_softmax(outputs, 1).gather(1, actions.unsqueeze(1))[:, 0]
    return -(advantages.to(outputs.dtype) * chosen).mean()


for coupled in (next_sample, balanced, rewarded):
    coupled.couples = True  # type: ignore[attr-defined]


def value_of(loss: Callable[..., Any], outputs: Tensor, targets: Any) -> Tensor:
    value = loss(outputs, targets)
    return value if isinstance(value, Tensor) else torch.stack(list(value.values())).sum()


def split_pairs(batch: Any) -> list[tuple[Tensor, Any]]:
    """`split` of a batch whose targets may be a pair."""
    inputs, targets = batch
    if isinstance(targets, Tensor):
        return split(batch)
    pairs = zip(*[each.split(MICRO) for each in targets], strict=True)
    return list(zip(inputs.split(MICRO), pairs, strict=True))


def by_micro_batch(loss: Callable[..., Any]) -> Callable[[], TrainWindow]:
    """The loss of each micro-batch by itself, weighed by its samples."""

    def train_window(model, optimizer, batch, steps):
        for inputs, targets in split_pairs(batch):
            (value_of(loss, model(inputs), targets) * len(inputs) / len(batch[0])).backward()
        optimizer.step()
        optimizer.zero_grad()

    return always(train_window)


def two_passes(
    loss: Callable[..., Any], replayed: bool = True, restored: bool = True
) -> Callable[[], TrainWindow]:
    """All outputs without a graph, the loss of them, and each micro-batch again with its gradient.

    Args:
        replayed: whether the second pass draws what the first did.
        restored: whether the first pass leaves buffers as they were.
    """

    def train_window(model, optimizer, batch, steps):
        parts = split_pairs(batch)
        states, outputs = [], []
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with torch.no_grad():
            for inputs, _ in parts:
                states.append(torch.get_rng_state())
                outputs.append(model(inputs))
        if restored:
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        leaf = torch.cat(outputs).requires_grad_()
        value = value_of(loss, leaf, batch[1])
        slopes = torch.autograd.grad(value, leaf)[0].split([len(inputs) for inputs, _ in parts])
        for (inputs, _), state, slope in zip(parts, states, slopes, strict=True):
            if replayed:
                torch.set_rng_state(state)
            model(inputs).backward(slope)
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return always(train_window)


def with_window(loss: Callable[[], Any]) -> Callable[[], TrainWindow]:
    def train_window(model, optimizer, batch, steps):
        result = Window(model, loss(), steps_for(len(batch[1]), SAMPLES, steps)).backward(*batch)
        optimizer.step()
        optimizer.zero_grad()
        return result.loss.item()

    return always(train_window)


class Followed(nn.Module):
    """Keeps a running mean of its inputs, which does not enter its output."""

    def __init__(self) -> None:
        super().__init__()
        self.momentum = 0.1
        self.register_buffer("running_mean", torch.zeros(9))
        self.running_mean: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.running_mean.lerp_(inputs.mean(0), self.momentum)
        return inputs


def dropped() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Dropout(0.3), nn.Linear(9, 5))


def followed() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 9), Followed(), nn.ReLU(), nn.Linear(9, 5))


def ragged() -> tuple[Tensor, Tensor]:
    """Samples of which 4, 1, 4 and 2 in a micro-batch have a target above 1."""
    return samples()[0], torch.tensor([3, 2, 3, 4, 2, 1, 0, 1, 4, 3, 2, 2, 0, 1, 3, 2])


def rewards() -> Any:
    inputs, actions = samples()
    return inputs, (actions, inputs[:, 0] + inputs[:, 1].square())


def setting(loss: Callable[[], Any], model: Any = classifier, batch: Any = samples) -> Setting:
    return Setting(model, batch, loss, options={"updates": 4})


TERMS = setting(ThreeTerms, batch=ragged)
CONTRAST = setting(lambda: next_sample)
BALANCE = setting(lambda: balanced)
REWARDS = setting(lambda: rewarded, batch=rewards)
DROPPED = setting(lambda: next_sample, dropped)
FOLLOWED = setting(lambda: next_sample, followed)
LOOPS = [
    Loop("right: three terms", TERMS, always(by_terms(right_share))),
    Loop("right: InfoNCE in two passes", CONTRAST, two_passes(next_sample)),
    Loop("right: rewards in two passes", REWARDS, two_passes(rewarded)),
    Loop(
        "coefficient divided by steps",
        TERMS,
        changed(by_steps),
        "gradient, fp64",
        "term 'balance' counts 0.25 times: it is divided by 4 steps once more",
    ),
    Loop(
        "denominator of the last micro-batch",
        TERMS,
        changed(by_last, "masked"),
        "gradient, fp64",
        "it is divided by the last micro-batch's weight",
    ),
    Loop(
        "denominator of each micro-batch",
        TERMS,
        changed(by_each, "masked"),
        "gradient, fp64",
        "term 'masked' is divided by each micro-batch's own weight",
    ),
    Loop(
        "a sum taken as a mean",
        TERMS,
        changed(as_sum),
        "gradient, fp64",
        "its sum is taken, not its mean",
    ),
    Loop(
        "a term in the last micro-batch alone",
        TERMS,
        changed(in_the_last_alone),
        "gradient, fp64",
        "term 'balance' of micro-batch 0, 1, 2 does not count",
    ),
    Loop(
        "negatives of one micro-batch",
        CONTRAST,
        by_micro_batch(next_sample),
        "gradient, fp64",
        "loss (next_sample): couples samples: it is computed on each micro-batch's samples",
    ),
    Loop(
        "balance of each micro-batch",
        BALANCE,
        by_micro_batch(balanced),
        "gradient, fp64",
        "couples samples: term 'balance' is computed on each micro-batch's samples",
    ),
    Loop(
        "rewards normalised by micro-batch",
        REWARDS,
        by_micro_batch(rewarded),
        "gradient, fp64",
        "coupled by their targets alone, as by rewards",
    ),
    Loop(
        "second pass with other dropout draws",
        DROPPED,
        two_passes(next_sample, replayed=False),
        "second forward pass",
        "draws otherwise",
    ),
    Loop(
        "running statistics of both passes",
        FOLLOWED,
        two_passes(next_sample, restored=False),
        "buffers",
        "updated 8 times an update",
    ),
]
assert MICRO * STEPS == SAMPLES
