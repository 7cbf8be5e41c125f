"""Loops with buffers, averages of the weights, momentum encoders and centres, kept rightly and wrongly."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tests.proof.unseen_common import (
    Book,
    Counts,
    decaying,
    generator,
    given,
    micro_batches,
    mlp,
    momentum,
    seeded,
    sgd,
    two_layers,
)

BOOK = Book()
updates = Counts()


def accumulate(model, batch, steps, loss=F.cross_entropy):
    for x, y in micro_batches(batch, steps):
        (loss(model(x), y) * len(x) / len(batch[0])).backward()


def step(optimizer):
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def follow(average, model, rate=0.1):
    for slow, p in zip(average.parameters(), model.parameters(), strict=True):
        slow.lerp_(p, rate)


@BOOK.right_case("average")
def average_once_a_window():
    model = mlp()
    average = copy.deepcopy(model).requires_grad_(False)

    def train_window(model, optimizer, batch, steps):
        accumulate(model, batch, steps)
        step(optimizer)
        follow(average, model)

    return given(train_window, model=lambda: model, optimizer=momentum, state={"average": average})


@BOOK.right_case("average")
def averaged_model():
    model = mlp()
    average = AveragedModel(model)

    def train_window(model, optimizer, batch, steps):
        accumulate(model, batch, steps)
        step(optimizer)
        average.update_parameters(model)

    return given(train_window, model=lambda: model, optimizer=decaying, state={"average": average})


@BOOK.wrong_case("average")
def average_by_micro_batch():
    """the average of the weights is moved after every micro-batch, so it runs 4 times too fast"""
    model = mlp()
    average = copy.deepcopy(model).requires_grad_(False)

    def train_window(model, optimizer, batch, steps):
        for x, y in micro_batches(batch, steps):
            (F.cross_entropy(model(x), y) * len(x) / len(batch[0])).backward()
            follow(average, model)
        step(optimizer)

    return given(train_window, model=lambda: model, optimizer=sgd, state={"average": average})


@BOOK.wrong_case("average")
def average_twice_from_update_3():
    """from update 3 on the average of the weights is moved once a micro-batch, after the step"""
    model = mlp()
    average = copy.deepcopy(model).requires_grad_(False)

    def train_window(model, optimizer, batch, steps):
        accumulate(model, batch, steps)
        step(optimizer)
        for _ in range(steps if updates(model) >= 3 else 1):
            follow(average, model)

    return given(train_window, model=lambda: model, optimizer=momentum, state={"average": average})


@BOOK.right_case("average")
def smoothed_loss():
    smooth = torch.zeros(())

    def train_window(model, optimizer, batch, steps):
        total = 0.0
        for x, y in micro_batches(batch, steps):
            loss = F.cross_entropy(model(x), y) * len(x) / len(batch[0])
            loss.backward()
            total += loss.item()
        step(optimizer)
        smooth.mul_(0.9).add_(0.1 * total)
        return total

    return given(train_window, optimizer=sgd, state={"smooth": smooth})


@BOOK.wrong_case("average")
def smoothed_loss_by_micro_batch():
    """the smoothed loss in the state is moved after every micro-batch"""
    smooth = torch.zeros(())

    def train_window(model, optimizer, batch, steps):
        for x, y in micro_batches(batch, steps):
            loss = F.cross_entropy(model(x), y)
            (loss * len(x) / len(batch[0])).backward()
            smooth.mul_(0.9).add_(0.1 * loss.item())
        step(optimizer)

    return given(train_window, optimizer=sgd, state={"smooth": smooth})


class Bootstrap(nn.Module):
    """A student that predicts what its slow copy says of another view."""

    def __init__(self):
        super().__init__()
        self.student = two_layers(6, 10, 4)
        self.predictor = nn.Linear(4, 4)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x, view):
        with torch.no_grad():
            target = self.teacher(view)
        return self.predictor(self.student(x)), target


def views(n=18):
    g = generator(21)
    x = torch.randn(n, 6, generator=g)
    return (x, x + 0.2 * torch.randn(n, 6, generator=g)), torch.zeros(n)


def agreement(outputs, _):
    return 1 - F.cosine_similarity(outputs[0], outputs[1], dim=-1).mean()


BOOTSTRAP = dict(model=lambda: seeded(Bootstrap), batch=views, loss=agreement, steps=3, optimizer=sgd)


@BOOK.right("momentum encoder", **BOOTSTRAP)
def teacher_once_a_window(model, optimizer, batch, steps):
    for inputs, unused in micro_batches(batch, steps):
        (agreement(model(*inputs), unused) * len(unused) / len(batch[1])).backward()
    step(optimizer)
    follow(model.teacher, model.student)


@BOOK.wrong("momentum encoder", **BOOTSTRAP)
def teacher_by_micro_batch(model, optimizer, batch, steps):
    """the teacher follows the student after every micro-batch: later micro-batches see another teacher"""
    for inputs, unused in micro_batches(batch, steps):
        (agreement(model(*inputs), unused) * len(unused) / len(batch[1])).backward()
        follow(model.teacher, model.student)
    step(optimizer)


class Contrast(nn.Module):
    """MoCo: a query against its key and a queue of older keys."""

    queue: torch.Tensor

    def __init__(self):
        super().__init__()
        self.student = two_layers(6, 10, 4)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(12, 4), dim=1))

    def keys(self, view):
        with torch.no_grad():
            return F.normalize(self.teacher(view), dim=1)

    def forward(self, x, view):
        query = F.normalize(self.student(x), dim=1)
        return torch.cat([(query * self.keys(view)).sum(1, keepdim=True), query @ self.queue.T], 1) / 0.5

    @torch.no_grad()
    def enqueue(self, keys):
        self.queue.copy_(torch.cat([self.queue, keys])[-len(self.queue) :])


def contrast(logits, _):
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


CONTRAST = dict(model=lambda: seeded(Contrast), batch=views, loss=contrast, steps=3, optimizer=sgd)


@BOOK.right("momentum encoder", **CONTRAST)
def queue_once_a_window(model, optimizer, batch, steps):
    keys = []
    for inputs, unused in micro_batches(batch, steps):
        (contrast(model(*inputs), unused) * len(unused) / len(batch[1])).backward()
        keys.append(model.keys(inputs[1]))
    step(optimizer)
    model.enqueue(torch.cat(keys))
    follow(model.teacher, model.student, 0.01)


@BOOK.wrong("momentum encoder", **CONTRAST)
def queue_by_micro_batch(model, optimizer, batch, steps):
    """keys enter the queue after every micro-batch, so later micro-batches see those of the same window"""
    for inputs, unused in micro_batches(batch, steps):
        (contrast(model(*inputs), unused) * len(unused) / len(batch[1])).backward()
        model.enqueue(model.keys(inputs[1]))
    step(optimizer)
    follow(model.teacher, model.student, 0.01)


class Distillation(nn.Module):
    """DINO's loss: the teacher's scores are centred before their softmax."""

    centre: torch.Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(4))

    def forward(self, outputs, _):
        target = ((outputs[1] - self.centre) / 0.5).softmax(-1)
        return -(target * outputs[0].log_softmax(-1)).sum(-1).mean()

    def follow(self, mean):
        self.centre.lerp_(mean, 0.1)


def distillation(loop):
    """The arguments of a loop that is given its loss as the fifth argument."""
    criterion = Distillation()

    def train_window(model, optimizer, batch, steps):
        return loop(model, optimizer, batch, steps, criterion)

    return given(train_window, **{**BOOTSTRAP, "loss": criterion}, state={"criterion": criterion})


@BOOK.right_case("centre")
def centre_once_a_window():
    def loop(model, optimizer, batch, steps, criterion):
        total = 0
        for inputs, unused in micro_batches(batch, steps):
            outputs = model(*inputs)
            (criterion(outputs, unused) * len(unused) / len(batch[1])).backward()
            total = total + outputs[1].sum(0)
        step(optimizer)
        follow(model.teacher, model.student)
        criterion.follow(total / len(batch[1]))

    return distillation(loop)


@BOOK.wrong_case("centre")
def centre_by_micro_batch():
    """the loss moves its centre after every micro-batch, so the next is centred otherwise"""

    def loop(model, optimizer, batch, steps, criterion):
        for inputs, unused in micro_batches(batch, steps):
            outputs = model(*inputs)
            (criterion(outputs, unused) * len(unused) / len(batch[1])).backward()
            criterion.follow(outputs[1].mean(0))
        step(optimizer)
        follow(model.teacher, model.student)

    return distillation(loop)


@BOOK.wrong_case("centre")
def centre_of_the_last():
    """the centre follows the mean of the last micro-batch alone"""

    def loop(model, optimizer, batch, steps, criterion):
        mean = criterion.centre
        for inputs, unused in micro_batches(batch, steps):
            outputs = model(*inputs)
            (criterion(outputs, unused) * len(unused) / len(batch[1])).backward()
            mean = outputs[1].mean(0)
        step(optimizer)
        follow(model.teacher, model.student)
        criterion.follow(mean)

    return distillation(loop)
