"""Right loops on larger designs (experts, adapters, heads, diffusion)."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.proof.unseen_common import (
    Book,
    adam,
    classes,
    generator,
    micro_batches,
    momentum,
    seeded,
    sgd,
    two_layers,
)
from tests.proof.unseen_models import plain

BOOK = Book()


class Experts(nn.Module):
    """Each sample goes to one expert, so some micro-batches leave experts without samples."""

    def __init__(self, experts=5):
        super().__init__()
        self.router = nn.Linear(6, experts)
        self.experts = nn.ModuleList(nn.Linear(6, 8) for _ in range(experts))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        chances = self.router(x).softmax(-1)
        best, chosen = chances.max(-1)
        hidden = x.new_zeros(len(x), 8)
        for k, expert in enumerate(self.experts):
            rows = (chosen == k).nonzero().flatten()
            if len(rows):
                hidden = hidden.index_add(0, rows, best[rows, None] * expert(x[rows]))
        return self.head(torch.tanh(hidden)), chances


def routed(outputs, labels):
    """With the router's z-loss, a mean over samples."""
    return F.cross_entropy(outputs[0], labels) + 0.1 * outputs[1].square().sum(-1).mean()


def balanced(outputs, labels):
    """With the balance loss, a product of two means over the batch."""
    share = F.one_hot(outputs[1].argmax(-1), outputs[1].shape[1]).to(outputs[1].dtype).mean(0)
    return F.cross_entropy(outputs[0], labels) + 0.1 * 5 * (share * outputs[1].mean(0)).sum()


@BOOK.right_case("model")
def experts():
    return plain(Experts, routed, optimizer=momentum)


@BOOK.wrong_case("coupled")
def experts_balanced_by_micro_batch():
    """the experts' balance loss multiplies means over 6 samples of a micro-batch, not over all 24"""
    return plain(Experts, balanced)


@BOOK.right("model", model=lambda: seeded(Experts), loss=routed, optimizer=sgd)
def experts_by_autograd(model, optimizer, batch, steps):
    """torch.autograd.grad with unused parameters allowed."""
    parameters = list(model.parameters())
    sums = [None] * len(parameters)
    for x, y in micro_batches(batch, steps):
        loss = routed(model(x), y) * (len(x) / len(batch[0]))
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        sums = [s if g is None else g if s is None else s + g for s, g in zip(sums, grads, strict=True)]
    for p, total in zip(parameters, sums, strict=True):
        p.grad = total
    optimizer.step()


class Adapted(nn.Module):
    """A frozen layer with a trained low-rank adapter; the head is trained."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(6, 12).requires_grad_(False)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 12, bias=False)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.base(x) + 2.0 * self.up(self.down(x))))


def trained_adamw(parameters):
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=0.01)


@BOOK.right_case("model")
def low_rank_adapter():
    return plain(Adapted, optimizer=trained_adamw)


class Heads(nn.Module):
    """Two tasks, and a parameter that is never used."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 12)
        self.kind, self.size = nn.Linear(12, 3), nn.Linear(12, 1)
        self.spare = nn.Parameter(torch.zeros(4))

    def forward(self, x, extra=None):
        hidden = F.gelu(self.body(x))
        return dict(kind=self.kind(hidden), size=self.size(hidden), attention=None)


def tasks():
    x, y = classes()
    return x, dict(kind=y, size=x[:, :1].abs())


def both(outputs, targets):
    size = F.huber_loss(outputs["size"], targets["size"])
    return F.cross_entropy(outputs["kind"], targets["kind"]) + 0.5 * size


@BOOK.right_case("model")
def two_heads():
    return plain(Heads, both, batch=tasks, optimizer=momentum)


@BOOK.right("model", model=lambda: seeded(Heads), batch=tasks, loss=both, optimizer=sgd)
def two_heads_two_backwards(model, optimizer, batch, steps):
    """Each task has a backward of its own through the same graph."""
    optimizer.zero_grad()
    for x, targets in micro_batches(batch, steps):
        outputs, share = model(x), len(x) / len(batch[0])
        (F.cross_entropy(outputs["kind"], targets["kind"]) * share).backward(retain_graph=True)
        (0.5 * F.huber_loss(outputs["size"], targets["size"]) * share).backward()
    optimizer.step()


class Denoiser(nn.Module):
    kept: torch.Tensor

    def __init__(self):
        super().__init__()
        self.time = nn.Embedding(10, 8)
        self.enter, self.leave = nn.Linear(5, 8), nn.Linear(8, 5)
        self.register_buffer("kept", torch.linspace(0.95, 0.1, 10))

    def forward(self, x, noise, times):
        kept = self.kept[times][:, None]
        noisy = kept.sqrt() * x + (1 - kept).sqrt() * noise
        return self.leave(F.silu(self.enter(noisy) + self.time(times)))


def noisy(n=20):
    g = generator(51)
    noise = torch.randn(n, 5, generator=g)
    return (torch.randn(n, 5, generator=g), noise, torch.randint(0, 10, (n,), generator=g)), noise


@BOOK.right_case("model")
def diffusion():
    return plain(Denoiser, F.mse_loss, batch=noisy, steps=5, optimizer=adam)


class Taught(nn.Module):
    def __init__(self):
        super().__init__()
        self.student = two_layers(6, 8, 3)
        self.teacher = two_layers(6, 16, 3).requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            wanted = self.teacher(x)
        return self.student(x), wanted


def taught(outputs, labels):
    student, teacher = outputs
    soft = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    return F.cross_entropy(student, labels) + soft


@BOOK.right_case("model")
def distillation_from_a_frozen_teacher():
    return plain(Taught, taught, optimizer=trained_adamw)


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return -0.3 * grad


class Adversarial(nn.Module):
    """Weights rounded straight through, and a domain head behind a reversed gradient."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 12)
        self.kind, self.domain = nn.Linear(12, 3), nn.Linear(12, 2)

    def forward(self, x):
        hidden = torch.tanh(F.linear(x, Round.apply(self.body.weight), self.body.bias))
        return self.kind(hidden), self.domain(Reverse.apply(hidden))


def kind_and_domain(outputs, labels):
    return F.cross_entropy(outputs[0], labels) + F.cross_entropy(outputs[1], labels % 2)


@BOOK.right_case("model")
def reversed_gradient():
    return plain(Adversarial, kind_and_domain, optimizer=momentum)


class Fourier(nn.Module):
    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.randn(5, dtype=torch.float32))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.fft.irfft(torch.fft.rfft(x, dim=-1) * self.filter, n=8, dim=-1))


@BOOK.right_case("model")
def fourier_layer():
    return plain(Fourier, batch=lambda: classes(18, 8), steps=3)
