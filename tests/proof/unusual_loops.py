"""Loops that are right in unusual ways, each with a variant that loses its last micro-batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import SGD, Adam, SparseAdam
from torch.utils.checkpoint import checkpoint

from .unusual_models import (
    CLASSES,
    Autocast,
    Bag,
    Cache,
    Checkpointed,
    Complex,
    Counted,
    Forces,
    Frozen,
    Images,
    InPlace,
    Keywords,
    Normalised,
    Recurrent,
    Returning,
    Stored,
    Twice,
    Views,
    WithLabels,
    classifier,
    generator,
    hooked,
    labels,
    numbers,
    tokens,
)

STEPS, MICRO = 4, 4


Loop = Callable[..., Any]


def part(value: Any, rows: slice) -> Any:
    """The samples `rows` of a batch, as a user writes it for his own batches."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() else value
    if isinstance(value, dict):
        return {key: part(each, rows) for key, each in value.items()}
    if hasattr(value, "_make"):
        return value._make(part(each, rows) for each in value)
    if isinstance(value, tuple | list):
        return type(value)(part(each, rows) for each in value)
    return value


def forward(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def loop(loss: Any, lose: bool = False, call: Loop = forward, before: Loop = lambda inputs: inputs) -> Loop:
    """Backward once a micro-batch, each weighted by its samples; `lose` leaves the last one out."""

    def train_window(model: nn.Module, optimizer: Any, batch: Any, steps: int) -> None:
        inputs, targets = batch
        optimizer.zero_grad()
        total = sample_count(batch)
        starts = list(range(0, total, MICRO))
        for start in starts[: len(starts) - lose]:
            rows = slice(start, start + MICRO)
            value = loss(call(model, before(part(inputs, rows))), part(targets, rows))
            (value * (min(MICRO, total - start) / total)).backward()
        optimizer.step()

    return train_window


def sample_count(value: Any) -> int:
    if isinstance(value, Tensor):
        return len(value) if value.dim() else 0
    values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return max((sample_count(each) for each in values), default=0)


def energy_loss(outputs: Any, targets: Any) -> Tensor:
    return mse_loss(outputs[0], targets["energy"]) + mse_loss(outputs[1], targets["forces"])


def scores(kind: str) -> Callable[[Any], Tensor]:
    return {
        "dict": lambda out: out["logits"],
        "ordered": lambda out: out["logits"],
        "object": lambda out: out.keys[0],
        "named": lambda out: out.logits,
        "tuple": lambda out: out[1],
        "dataclass": lambda out: out.logits,
    }[kind]


def of_output(outputs: Any, targets: Any) -> Tensor:
    return outputs["loss"] if isinstance(outputs, dict) else outputs.loss


class NoisyLoss(nn.Module):
    """Drops scores, and weighs each sample by a random number."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        each = cross_entropy(self.drop(outputs), targets, reduction="none")
        return (each * torch.rand(len(each), dtype=each.dtype)).mean()


def noisy_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return mse_loss(
        outputs + 0.1 * torch.randn_like(outputs), nn.functional.one_hot(targets, CLASSES).float()
    )


def in_parts(model: Any, x: Tensor) -> Tensor:
    """Calls the parts of a `Frozen` and never the model itself."""
    with torch.no_grad():
        features = model.backbone(x).tanh()
    return model.head(model.drop(features))


def summed(loss: Any, lose: bool = False) -> Loop:
    """Adds the losses up and goes back once."""

    def train_window(model: nn.Module, optimizer: Any, batch: Any, steps: int) -> None:
        x, y = batch
        optimizer.zero_grad()
        parts = list(zip(x.split(MICRO), y.split(MICRO), strict=True))
        parts = parts[: len(parts) - lose]
        torch.stack([loss(model(a), b) * len(a) / len(x) for a, b in parts]).sum().backward()
        optimizer.step()

    return train_window


def weighted_afterwards(lose: bool) -> Loop:
    """Means' gradients, each multiplied by its share of the samples after backward."""

    def train_window(model: nn.Module, optimizer: Any, batch: Any, steps: int) -> None:
        x, y = batch
        parameters = list(model.parameters())
        total = [torch.zeros_like(p) for p in parameters]
        parts = list(zip(x.split(MICRO), y.split(MICRO), strict=True))
        for a, b in parts[: len(parts) - lose]:
            for sum_of, g in zip(
                total, torch.autograd.grad(cross_entropy(model(a), b), parameters), strict=True
            ):
                sum_of.add_(g, alpha=len(a) / len(x))
        for parameter, gradient in zip(parameters, total, strict=True):
            parameter.grad = gradient
        optimizer.step()

    return train_window


def functional(lose: bool = False, per_sample: bool = False, single: bool = False) -> Loop:
    """Gradients of torch.func, of each sample by vmap if `per_sample`."""

    def train_window(model: nn.Module, optimizer: Any, batch: Any, steps: int) -> None:
        x, y = batch
        names = dict(model.named_parameters())
        weights = {name: p.detach() for name, p in names.items()}

        def value(weights: Any, x: Tensor, y: Tensor) -> Tensor:
            if per_sample and not single:
                x, y = x.unsqueeze(0), y.unsqueeze(0)
            return cross_entropy(functional_call(model, weights, (x,)), y, reduction="sum")

        gradient = vmap(grad(value), (None, 0, 0), randomness="different") if per_sample else grad(value)
        total = {name: torch.zeros_like(w) for name, w in weights.items()}
        parts = list(zip(x.split(MICRO), y.split(MICRO), strict=True))
        for a, b in parts[: len(parts) - lose]:
            for name, g in gradient(weights, a, b).items():
                total[name] += g.sum(0) if per_sample else g
        for name, p in names.items():
            p.grad = total[name] / len(x)
        optimizer.step()

    return train_window


def evaluating(lose: bool = False) -> Loop:
    """Evaluates before every third window, on the batch and on other samples, also without no_grad."""
    windows: dict[int, int] = {}

    def train_window(model: nn.Module, optimizer: Any, batch: Any, steps: int) -> None:
        number = windows[id(model)] = windows.get(id(model), 0) + 1
        if number % 3 == 0:
            model.eval()
            with torch.inference_mode():
                model(batch[0])
            with torch.no_grad():
                model(batch[0][:3])
            model(batch[0][:5] + 1).argmax(1)
            model.train()
        loop(cross_entropy, lose)(model, optimizer, batch, steps)

    return train_window


def teaching(lose: bool = False) -> Loop:
    """Copies the model as a teacher within the window, and calls the copy."""

    def train_window(model: nn.Module, optimizer: Any, batch: Any, steps: int) -> None:
        teacher = copy.deepcopy(model)
        teacher(batch[0] + 1)
        loop(cross_entropy, lose)(model, optimizer, batch, steps)

    return train_window


@dataclass(frozen=True)
class Case:
    """A right loop, made with `make(False)`, and with a lost micro-batch by `make(True)`."""

    model: Callable[[], nn.Module]
    make: Callable[[bool], Loop]
    batch: Callable[[], Any] = lambda: (numbers(), labels())
    loss: Any = cross_entropy
    verdict: str = "proved"
    options: dict[str, Any] = field(default_factory=dict)


def plain(loss: Any = cross_entropy, **options: Any) -> Callable[[bool], Loop]:
    return lambda lose: loop(loss, lose, **options)


def energies() -> Any:
    return numbers(), {"energy": numbers(width=1).squeeze(1), "forces": numbers()}


def counted() -> Any:
    inputs = {"x": numbers(), "y": labels(), "count": torch.tensor(16), "scale": 1.5, "mode": "train"}
    return {**inputs, "cache": Cache(), "mask": None}, labels()


DRAWS = "proved up to dropout draws"


CASES: dict[str, Case] = {
    **{
        f"checkpoint, reentrant={reentrant}, {'summed' if together else 'each'}{', inner' * inner}": Case(
            lambda r=reentrant, f=inner: Checkpointed(r, f),
            (lambda lose: summed(cross_entropy, lose)) if together else plain(),
            verdict="proved up to",
        )
        for reentrant in (False, True)
        for together, inner in ((False, True), (True, False))
    },
    **{
        f"checkpoint of the model, reentrant={r}": Case(
            lambda: nn.Sequential(classifier()[:2], nn.Dropout(0.2), nn.Linear(9, CLASSES)),
            plain(call=lambda model, x, r=r: checkpoint(model, x.requires_grad_(), use_reentrant=r)),
            verdict="proved up to",
        )
        for r in (False, True)
    },
    "weighted after backward": Case(classifier, weighted_afterwards),
    "torch.func": Case(classifier, lambda lose: functional(lose)),
    "torch.func by sample": Case(classifier, lambda lose: functional(lose, True)),
    "torch.func, single samples": Case(classifier, lambda lose: functional(lose, True, True)),
    "torch.func by sample, dropout": Case(
        lambda: nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.3), nn.Linear(9, CLASSES)),
        lambda lose: functional(lose, True),
        verdict=DRAWS,
    ),
    "forces": Case(Forces, plain(energy_loss), energies, energy_loss),
    "sparse SGD": Case(Bag, plain(), lambda: (tokens(), labels())),
    "sparse momentum": Case(
        Bag,
        plain(),
        lambda: (tokens(), labels()),
        options={"optimizer": lambda p: SGD(p, lr=0.1, momentum=0.9)},
    ),
    "sparse SGD without momentum": Case(
        Bag, plain(), lambda: (tokens(), labels()), options={"optimizer": lambda p: SGD(p, lr=0.1)}
    ),
    "sparse Adam": Case(
        Bag,
        plain(),
        lambda: (tokens(), labels()),
        options={"optimizer": lambda p: SparseAdam(p[:1], lr=0.01)},
    ),
    "in place": Case(InPlace, plain()),
    "in place before the call": Case(
        classifier, plain(before=lambda x: x.clamp_(-9, 9)), lambda: (numbers(), labels())
    ),
    "count, cache, words": Case(
        Counted,
        lambda lose: counted_loop(lose),
        counted,
        of_output,
    ),
    **{
        f"returns a {kind}": Case(
            lambda kind=kind: Returning(kind),
            plain(lambda out, y, kind=kind: cross_entropy(scores(kind)(out), y)),
            loss=lambda out, y, kind=kind: cross_entropy(scores(kind)(out), y),
        )
        for kind in ("dict", "ordered", "object", "named", "tuple", "dataclass")
    },
    "labels into the model": Case(
        WithLabels,
        plain(of_output),
        lambda: ({"input_ids": tokens(), "labels": labels()}, labels()),
        of_output,
        DRAWS,
    ),
    "more arguments than the batch": Case(
        WithLabels,
        plain(
            of_output,
            call=lambda model, inputs: model(
                **inputs, attention_mask=torch.ones_like(inputs["input_ids"]) > 0
            ),
        ),
        lambda: ({"input_ids": tokens(), "labels": labels()}, labels()),
        of_output,
        DRAWS,
    ),
    "fewer arguments, no targets": Case(
        WithLabels,
        plain(of_output, call=lambda model, inputs: model(inputs["input_ids"], labels=inputs["labels"])),
        lambda: (
            {
                "input_ids": tokens(),
                "attention_mask": torch.ones(16, 3, dtype=torch.int64),
                "labels": labels(),
            },
            None,
        ),
        of_output,
        DRAWS,
    ),
    "draws in the loss": Case(
        classifier, plain(criterion := NoisyLoss()), loss=criterion, verdict="proved up to"
    ),
    "draws in a loss function": Case(classifier, plain(noisy_loss), loss=noisy_loss, verdict="proved up to"),
    "draws in model and loss": Case(
        lambda: nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.3), nn.Linear(9, CLASSES)),
        plain(noisy_loss),
        loss=noisy_loss,
        verdict="proved up to",
    ),
    "keeps its activations": Case(Stored, plain()),
    "complex weights": Case(Complex, plain(), options={"optimizer": lambda p: Adam(p, lr=0.01)}),
    "bytes and masks": Case(
        Images,
        plain(),
        lambda: (
            (torch.randint(0, 256, (16, 6), generator=generator(), dtype=torch.uint8), numbers() > -0.5),
            labels(),
        ),
    ),
    "views": Case(Views, plain()),
    "autocast in the model": Case(Autocast, plain()),
    "two views and None": Case(
        Twice, plain(), lambda: ((numbers(), numbers() + 1, None), labels()), verdict=DRAWS
    ),
    "frozen backbone": Case(Frozen, plain(), verdict=DRAWS),
    "parts called by the loop": Case(Frozen, plain(call=in_parts), verdict=DRAWS),
    "keywords alone": Case(
        lambda: Keywords(),
        plain(call=lambda model, inputs: model(**inputs)),
        lambda: ({"features": numbers()}, labels()),
    ),
    "a hook of the user": Case(hooked, plain()),
    "evaluation": Case(classifier, lambda lose: evaluating(lose)),
    "a teacher": Case(
        lambda: nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.3), nn.Linear(9, CLASSES)),
        lambda lose: teaching(lose),
        verdict=DRAWS,
    ),
    "recurrent": Case(lambda: Recurrent(), plain(), lambda: (numbers(width=12).view(16, 4, 3), labels())),
    "normalised": Case(lambda: Normalised(), plain()),
}


def counted_loop(lose: bool) -> Loop:
    """The model divides by the count of the whole batch, so the parts are added."""

    def train_window(model: nn.Module, optimizer: Any, batch: Any, steps: int) -> None:
        inputs, _ = batch
        optimizer.zero_grad()
        starts = list(range(0, len(inputs["x"]), MICRO))
        for start in starts[: len(starts) - lose]:
            micro_batch = part(inputs, slice(start, start + MICRO))
            model(**{**micro_batch, "cache": Cache()}).loss.backward()
        optimizer.step()

    return train_window
