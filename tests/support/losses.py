"""Losses of several terms and coupled ones, each with its formula written again for one whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional as F

from accumexp.accum import Term
from accumexp.losses import (
    Cox,
    FromOutput,
    InfoNCE,
    LoadBalance,
    Sum,
    info_nce,
    load_balance,
    supervised_contrastive,
)

SAMPLES = 101
FEATURES, CLASSES, EXPERTS = 6, 4, 3


class Heads(nn.Module):
    """A tuple of outputs, one of each head."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Sequential(nn.Linear(FEATURES, 9), nn.Tanh()).double()
        self.heads = nn.ModuleList(nn.Linear(9, size, bias=False).double() for size in sizes)

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        hidden = self.first(features)
        return tuple(head(hidden) for head in self.heads)


class OneHead(Heads):
    def __init__(self, *shape: int) -> None:
        super().__init__(torch.Size(shape).numel())
        self.shape = shape

    def forward(self, features: Tensor) -> Tensor:  # type: ignore[override]
        # FSDP warns of views.
        return super().forward(features)[0].unflatten(1, self.shape).clone()


class OwnLoss(OneHead):
    """Returns its loss, a mean over the labels that are not -100, as a language model does."""

    def forward(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        logits = super().forward(features)
        return {"loss": F.cross_entropy(logits.movedim(-1, 1), labels), "logits": logits}


class ScaledCrossEntropy(nn.Module):
    """A cross entropy with a temperature of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs * self.temperature, targets)


class RoutedTokens:
    """Each expert's loss is the mean over the tokens that are routed to it: denominators of the outputs."""

    def terms(self, outputs: tuple[Tensor, Tensor], targets: Tensor) -> dict[str, Term]:
        probability, expert = outputs[1].softmax(1).max(1)
        losses = probability * F.cross_entropy(outputs[0], targets, reduction="none")
        return {
            f"expert_{e}": Term((losses * (expert == e)).sum(), (expert == e).sum(), 0.5 + e)
            for e in range(EXPERTS)
        }


def two_views(outputs: Tensor, targets: Any) -> Tensor:
    a, b = (F.normalize(outputs[:, view], dim=1) for view in (0, 1))
    exponentials = (a @ b.T / 0.1).exp()
    both = exponentials.diagonal() ** 2 / (exponentials.sum(0) * exponentials.sum(1))
    return -both.log().mean() / 2


def contrast_of_classes(outputs: Tensor, targets: Tensor) -> Tensor:
    z = outputs / outputs.norm(dim=1, keepdim=True)
    others = 1 - torch.eye(len(z), dtype=z.dtype)
    exponentials = (z @ z.T / 0.1).exp() * others
    alike = (targets[:, None] == targets).to(z.dtype) * others
    logarithms = (exponentials + (1 - others)).log() - exponentials.sum(1, keepdim=True).log()
    return -(alike * logarithms).sum(1).div(alike.sum(1)).mean()


def partial_likelihood(efron: bool) -> Callable[[Tensor, Any], Tensor]:
    """Event by event, with the set at risk written out."""

    def loss(outputs: Tensor, targets: Any) -> Tensor:
        hazards, (times, events) = outputs[:, 0], targets
        parts = []
        for time in times[events].unique():
            at_risk, died = hazards[times >= time].exp().sum(), events & (times == time)
            count = int(died.sum())
            for k in range(count):
                tied = k / count * hazards[died].exp().sum() if efron else 0.0
                parts.append((at_risk - tied).log())
            parts.append(-hazards[died].sum())
        return torch.stack(parts).sum() / events.sum()

    return loss


def balanced(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    logits, router = outputs
    losses = F.cross_entropy(logits, targets, ignore_index=0)
    shares = torch.stack([(router.argmax(1) == e).to(router.dtype).mean() for e in range(EXPERTS)])
    return losses + 0.3 * EXPERTS * torch.dot(shares, router.softmax(1).mean(0))


def three_terms(outputs: tuple[Tensor, ...], targets: Any) -> Tensor:
    first = F.cross_entropy(outputs[0], targets[0], ignore_index=0)
    second = F.cross_entropy(outputs[1], targets[1], torch.tensor([1.0, 0.2, 3.0], dtype=torch.float64))
    return first + 0.5 * second + 2.0 * F.mse_loss(outputs[2], targets[2])


def routed(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    expert = outputs[1].argmax(1)
    chosen = outputs[1].softmax(1)[torch.arange(len(expert)), expert]
    losses = chosen * F.cross_entropy(outputs[0], targets, reduction="none")
    return torch.stack([(0.5 + e) * losses[expert == e].mean() for e in range(EXPERTS)]).sum()


class Case(NamedTuple):
    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Any, Any]]
    loss: Any
    reference: Callable[[Any, Any], Tensor]
    passes: int


def features() -> Tensor:
    return torch.randn(SAMPLES, FEATURES, generator=generator(), dtype=torch.float64)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def labels(classes: int = CLASSES) -> Tensor:
    """Sorted, so that micro-batches hold unequal numbers of each."""
    return torch.randint(0, classes, (SAMPLES,), generator=generator()).sort().values


def survival() -> tuple[Tensor, Tensor]:
    """Times with ties, and whether they are events."""
    draws = torch.rand(2, SAMPLES, generator=generator())
    return (draws[0] * 30).long(), draws[1] < 0.6


def tokens() -> tuple[dict[str, Tensor], Tensor]:
    targets = torch.randint(0, CLASSES, (SAMPLES, 5), generator=generator())
    lengths = torch.randint(0, 6, (SAMPLES, 1), generator=generator())
    targets = targets.where(torch.arange(5) < lengths, -100)
    return {"features": features(), "labels": targets}, targets


def of_three() -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    return features(), (labels(), labels(3).flip(0), features()[:, :2])


CLASS_WEIGHTS = torch.tensor([1.0, 0.2, 3.0], dtype=torch.float64)
CASES = {
    "info nce": Case(lambda: OneHead(2, 5), lambda: (features(), labels()), info_nce, two_views, 2),
    "info nce of a pair": Case(
        lambda: Heads(5, 5),
        lambda: (features(), labels()),
        InfoNCE(),
        lambda outputs, targets: two_views(torch.stack(outputs, 1), targets),
        2,
    ),
    "supervised contrastive": Case(
        lambda: OneHead(5), lambda: (features(), labels()), supervised_contrastive, contrast_of_classes, 2
    ),
    "cox": Case(lambda: OneHead(1), lambda: (features(), survival()), Cox(), partial_likelihood(False), 2),
    "cox, efron": Case(
        lambda: OneHead(1), lambda: (features(), survival()), Cox("efron"), partial_likelihood(True), 2
    ),
    "balance": Case(
        lambda: Heads(CLASSES, EXPERTS),
        lambda: (features(), labels()),
        Sum(
            {
                "classes": {"loss": nn.CrossEntropyLoss(ignore_index=0), "output": 0},
                "balance": {"loss": load_balance, "output": 1, "coefficient": 0.3},
            }
        ),
        balanced,
        2,
    ),
    "routed tokens": Case(
        lambda: Heads(CLASSES, EXPERTS), lambda: (features(), labels()), RoutedTokens(), routed, 2
    ),
    "three terms": Case(
        lambda: Heads(CLASSES, 3, 2),
        of_three,
        Sum(
            {
                "a": {"loss": nn.CrossEntropyLoss(ignore_index=0), "output": 0, "target": 0},
                "b": {
                    "loss": nn.CrossEntropyLoss(CLASS_WEIGHTS),
                    "output": 1,
                    "target": 1,
                    "coefficient": 0.5,
                },
                "c": {"loss": nn.MSELoss(), "output": 2, "target": 2, "coefficient": 2.0},
            }
        ),
        three_terms,
        1,
    ),
    "of the model": Case(
        lambda: OwnLoss(5, CLASSES),
        tokens,
        FromOutput(over="labels"),
        lambda outputs, targets: outputs["loss"],
        1,
    ),
}
LAYERS = Case(
    lambda: Heads(EXPERTS, EXPERTS),
    lambda: (features(), labels()),
    LoadBalance(top_k=2),
    lambda outputs, targets: torch.stack([load_balance(router, None, 2) for router in outputs]).mean(),
    2,
)


def reference(case: Case) -> tuple[dict[str, Tensor], float]:
    """Gradient and loss of the whole batch, by torch.func."""
    model, (inputs, targets) = case.model(), case.batch()
    given = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return case.reference(functional_call(model, values, *given), targets)

    return grad(loss)(parameters), float(loss(parameters))
