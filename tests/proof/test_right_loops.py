"""Loops and models that are right in unusual ways are proved, and the same loops with a lost micro-batch are not."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy, dropout, mse_loss, normalize
from torch.optim import SGD, Adam, SparseAdam
from torch.utils.checkpoint import checkpoint

from accumexp.proof import Certificate, certify

STEPS, MICRO, SAMPLES, CLASSES = 4, 4, 16, 5
Loop = Callable[..., Any]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def numbers(count: int = SAMPLES, width: int = 6) -> Tensor:
    return torch.randn(count, width, generator=generator())


def labels(count: int = SAMPLES) -> Tensor:
    return torch.randint(0, CLASSES, (count,), generator=generator())


def tokens(count: int = SAMPLES, length: int = 3) -> Tensor:
    return torch.randint(0, 11, (count, length), generator=generator())


def classifier() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, CLASSES))


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


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, functional: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 9)
        self.block = nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Dropout(0.3), nn.Linear(9, 9))
        self.head = nn.Linear(9, CLASSES)
        self.reentrant, self.functional = reentrant, functional

    def inner(self, x: Tensor) -> Tensor:
        return dropout(self.block(x), 0.2) if self.functional else self.block(x)

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.inner, self.embed(x), use_reentrant=self.reentrant)
        hidden = checkpoint(self.block, hidden, use_reentrant=self.reentrant)
        return self.head(hidden)


class Forces(nn.Module):
    """Energies, and forces as their negative gradients by the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 1))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        positions.requires_grad_()
        energies = self.net(positions).squeeze(1)
        return energies, -torch.autograd.grad(energies.sum(), positions, create_graph=True)[0]


def energy_loss(outputs: Any, targets: Any) -> Tensor:
    return mse_loss(outputs[0], targets["energy"]) + mse_loss(outputs[1], targets["forces"])


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6, sparse=True)
        self.head = nn.Linear(6, CLASSES).requires_grad_(False)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.embedding(words).mean(1).tanh())


class InPlace(nn.Module):
    """Normalises its input in place, and each layer its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(inplace=True), nn.Linear(9, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5).div_(2.0)
        return self.net(x)


class Counted(nn.Module):
    """Takes much beside its samples, and returns its loss, divided by a count of the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = classifier()

    def forward(
        self, x: Tensor, y: Tensor, count: Tensor, scale: float, mode: str, cache: Any, mask: Any = None
    ) -> Any:
        assert mode == "train" and cache.keys == [] and mask is None
        cache.keys.append(x)
        logits = self.net(x) * scale
        return Output(loss=cross_entropy(logits, y, reduction="sum") / count, logits=logits)


class Cache:
    def __init__(self) -> None:
        self.keys: list[Tensor] = []


@dataclass
class Output:
    loss: Tensor
    logits: Tensor
    extra: Any = None
    time: float = 0.5


Named = namedtuple("Named", "logits extra")


class Returning(nn.Module):
    """Returns its scores in a container of the `kind`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = classifier(), kind

    def forward(self, x: Tensor) -> Any:
        out = self.net(x)
        if self.kind == "dict":
            return {"logits": out, "time": 0.5, "none": None}
        if self.kind == "ordered":
            return OrderedDict(logits=out, name="x")
        if self.kind == "object":
            holder = Cache()
            holder.keys = [out]
            return holder
        if self.kind == "named":
            return Named(out, None)
        return (None, out, 3) if self.kind == "tuple" else Output(out.sum(), out)


def scores(kind: str) -> Callable[[Any], Tensor]:
    return {
        "dict": lambda out: out["logits"],
        "ordered": lambda out: out["logits"],
        "object": lambda out: out.keys[0],
        "named": lambda out: out.logits,
        "tuple": lambda out: out[1],
        "dataclass": lambda out: out.logits,
    }[kind]


class WithLabels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None) -> dict[str, Any]:
        hidden = self.embedding(input_ids)
        if attention_mask is not None:
            hidden = hidden * attention_mask.unsqueeze(-1)
        logits = self.head(self.drop(hidden.sum(1)))
        return {"loss": None if labels is None else cross_entropy(logits, labels), "logits": logits}


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
    return mse_loss(outputs + 0.1 * torch.randn_like(outputs), nn.functional.one_hot(targets, CLASSES).float())


class Stored(nn.Module):
    """Keeps what it computed, as models with auxiliary losses do, and a constant that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = classifier()
        self.hidden: Any = None
        self.constant = torch.randn(6, 6, generator=generator())

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.net[0](x @ self.constant)
        return self.net[2](self.net[1](self.hidden))


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, CLASSES, dtype=torch.complex64, generator=generator()) / 3)
        self.scale = nn.Parameter(torch.ones(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.weight.dtype) @ self.weight).abs() * self.scale


class Images(nn.Module):
    """Takes bytes and a mask of bools."""

    def __init__(self) -> None:
        super().__init__()
        self.net = classifier()

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        return self.net(images.float() / 255 * mask)


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = classifier()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).view(-1, 1, CLASSES)[:, 0]


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = classifier()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x).float()


class Twice(nn.Module):
    """Encodes two views of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.3), nn.Linear(9, CLASSES))

    def forward(self, one: Tensor, other: Any, third: Any = None) -> Tensor:
        return self.encoder(one) - self.encoder(other).tanh()


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(6, 9).requires_grad_(False)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.backbone(x).tanh()
        return self.head(self.drop(features))


def in_parts(model: Any, x: Tensor) -> Tensor:
    """Calls the parts of a `Frozen` and never the model itself."""
    with torch.no_grad():
        features = model.backbone(x).tanh()
    return model.head(model.drop(features))


def hooked() -> nn.Module:
    """Its user's hook changes what it receives."""
    model = classifier()
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2 - 1,))
    return model


def summed(loss: Any, lose: bool = False) -> Loop:
    """Adds the losses up and goes back once."""

    def train_window(model: nn.Module, optimizer: Any, batch: Any, steps: int) -> None:
        x, y = batch
        optimizer.zero_grad()
        parts = list(zip(x.split(MICRO), y.split(MICRO), strict=True))
        parts = parts[: len(parts) - lose]
        sum(loss(model(a), b) * len(a) / len(x) for a, b in parts).backward()
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
    import copy

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


def with_fresh_cache(inputs: Any) -> Any:
    return {**inputs, "cache": Cache()}


DRAWS = "proved up to dropout draws"
CASES: dict[str, Case] = {
    **{
        f"checkpoint, reentrant={reentrant}, {'summed' if together else 'one by one'}{', functional' * inner}": Case(
            lambda r=reentrant, f=inner: Checkpointed(r, f),
            (lambda lose: summed(cross_entropy, lose)) if together else plain(),
            verdict="proved up to",
        )
        for reentrant in (False, True)
        for together in (False, True)
        for inner in (False, True)
    },
    **{
        f"checkpoint of the model, reentrant={r}": Case(
            lambda: nn.Sequential(classifier()[:2], nn.Dropout(0.2), nn.Linear(9, CLASSES)),
            plain(call=lambda model, x, r=r: checkpoint(model, x.requires_grad_(), use_reentrant=r)),
            verdict="proved up to",
        )
        for r in (False, True)
    },
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
        Bag, plain(), lambda: (tokens(), labels()), options={"optimizer": lambda p: SGD(p, lr=0.1, momentum=0.9)}
    ),
    "sparse SGD without momentum": Case(
        Bag, plain(), lambda: (tokens(), labels()), options={"optimizer": lambda p: SGD(p, lr=0.1)}
    ),
    "sparse Adam": Case(
        Bag, plain(), lambda: (tokens(), labels()), options={"optimizer": lambda p: SparseAdam(p[:1], lr=0.01)}
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
            call=lambda model, inputs: model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]) > 0),
        ),
        lambda: ({"input_ids": tokens(), "labels": labels()}, labels()),
        of_output,
        DRAWS,
    ),
    "fewer arguments, no targets": Case(
        WithLabels,
        plain(of_output, call=lambda model, inputs: model(inputs["input_ids"], labels=inputs["labels"])),
        lambda: (
            {"input_ids": tokens(), "attention_mask": torch.ones(16, 3, dtype=torch.int64), "labels": labels()},
            None,
        ),
        of_output,
        DRAWS,
    ),
    "draws in the loss": Case(classifier, plain(criterion := NoisyLoss()), loss=criterion, verdict="proved up to"),
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
    "two views and None": Case(Twice, plain(), lambda: ((numbers(), numbers() + 1, None), labels()), verdict=DRAWS),
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
    "recurrent": Case(
        lambda: Recurrent(), plain(), lambda: (numbers(width=12).view(16, 4, 3), labels())
    ),
    "normalised": Case(lambda: Normalised(), plain()),
}


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = classifier()

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.net(inputs["features"])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(3, 5, batch_first=True), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(lambda x: self.cell(x)[0][:, -1], x, use_reentrant=False))


class Normalised(nn.Module):
    """A weight norm of either kind."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.utils.parametrizations.weight_norm(nn.Linear(6, 9))
        self.head = nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(normalize(self.one(x), dim=1))


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


def certified(case: Case, lose: bool = False, updates: int = 3) -> Certificate:
    torch.manual_seed(1)
    return certify(
        case.make(lose), case.model(), case.loss, case.batch(), STEPS, updates=updates, **case.options
    )


def explained(certificate: Certificate) -> str:
    failed = [f"{c.name}: {c.figure:.3g} > {c.bound:.3g} ({c.detail})" for c in certificate.failed]
    return "\n".join([str(certificate), *failed])


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_right_loops_are_proved_and_a_lost_micro_batch_is_not(name: str) -> None:
    case = CASES[name]
    certificate = certified(case)
    only_memory = {check.name for check in certificate.failed} == {"saved activations"}
    assert str(certificate).startswith(case.verdict) or only_memory, explained(certificate)
    wrong = certified(case, lose=True, updates=1)
    assert not wrong.proved, explained(wrong)
