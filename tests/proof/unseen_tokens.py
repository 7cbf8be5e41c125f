"""Loops that divide by tokens, by weights, by boxes or by lengths instead of samples."""

from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

from tests.proof.unseen_common import (
    Book,
    Counts,
    TokenMean,
    decaying,
    generator,
    micro_batches,
    momentum,
    regressor,
    seeded,
    sentences,
    sgd,
    tagger,
    token_loss,
    token_total,
    two_layers,
    values,
)

BOOK = Book()
updates = Counts()
cached = WeakKeyDictionary()

TOKENS = dict(model=tagger, batch=sentences, loss=TokenMean())
PLAIN = dict(model=tagger, batch=sentences, loss=token_loss)


@BOOK.wrong("tokens", **PLAIN)
def token_mean_of_means(model, optimizer, batch, steps):
    """a mean over the tokens of each micro-batch, then a mean of these: micro-batches with few tokens
    count too much"""
    for x, y in micro_batches(batch, steps):
        (token_loss(model(x), y) * len(x) / len(batch[0])).backward()
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("tokens", **TOKENS, optimizer=sgd)
def padding_counted(model, optimizer, batch, steps):
    """the denominator counts the padding too"""
    for x, y in micro_batches(batch, steps):
        (token_total(model(x), y) / batch[1].numel()).backward()
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("tokens", **TOKENS)
def tokens_of_the_last(model, optimizer, batch, steps):
    """divided by 4 times the last micro-batch's tokens instead of the window's tokens"""
    parts = micro_batches(batch, steps)
    count = (parts[-1][1] != -100).sum() * len(parts)
    for x, y in parts:
        (token_total(model(x), y) / count).backward()
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("tokens", **TOKENS, optimizer=sgd)
def tokens_and_steps(model, optimizer, batch, steps):
    """counts the window's tokens and divides by 4 as well: 4 times too small"""
    count = (batch[1] != -100).sum()
    parts = micro_batches(batch, steps)
    for x, y in parts:
        (token_total(model(x), y) / count / len(parts)).backward()
    optimizer.step()
    optimizer.zero_grad()


def shifted(logits, labels):
    return token_loss(logits[:, :-1], labels[:, 1:])


@BOOK.wrong("tokens", model=tagger, batch=sentences, loss=shifted)
def counted_before_the_shift(model, optimizer, batch, steps):
    """the tokens are counted before the shift by one: the first label of each sentence counts in the
    denominator but has no loss"""
    count = (batch[1] != -100).sum()
    for x, y in micro_batches(batch, steps):
        (token_total(model(x)[:, :-1], y[:, 1:]) / count).backward()
    optimizer.step()
    optimizer.zero_grad()


def class_weights(like):
    return torch.tensor([0.2, 1.0, 3.0], dtype=like.dtype, device=like.device)


def weighted(logits, labels):
    return F.cross_entropy(logits, labels, weight=class_weights(logits))


@BOOK.wrong("tokens", loss=weighted, optimizer=sgd)
def class_weights_by_micro_batch(model, optimizer, batch, steps):
    """class weights: each micro-batch is divided by its own sum of weights, not by the window's"""
    for x, y in micro_batches(batch, steps):
        (weighted(model(x), y) * len(x) / len(batch[0])).backward()
    optimizer.step()
    optimizer.zero_grad()


def weighted_samples(n=20):
    x, y = values(n)
    return x, (y, torch.rand(n, 1, generator=generator(8)) + 0.1)


def by_sample(outputs, targets):
    y, w = targets
    return (w * (outputs - y) ** 2).sum() / w.sum()


@BOOK.wrong("tokens", loss=by_sample, model=regressor, batch=weighted_samples, steps=5)
def sample_weights_by_micro_batch(model, optimizer, batch, steps):
    """sample weights: micro-batches are divided by the sum of their own weights"""
    parts = micro_batches(batch, steps)
    for x, targets in parts:
        (by_sample(model(x), targets) / len(parts)).backward()
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong(
    "tokens", model=tagger, loss=TokenMean(), batch=lambda: [sentences(), sentences(seed=16)], optimizer=sgd
)
def cached_count(model, optimizer, batch, steps):
    """from update 3 on the number of tokens is that of update 2's window, because it is cached"""
    if updates(model) < 3:
        cached[model] = int((batch[1] != -100).sum())
    for x, y in micro_batches(batch, steps):
        (token_total(model(x), y) / cached[model]).backward()
    optimizer.step()
    optimizer.zero_grad()


@BOOK.wrong("tokens", **PLAIN)
def mean_of_sentences(model, optimizer, batch, steps):
    """a mean over each sentence, then over sentences, where the loss is a mean over tokens"""
    for x, y in micro_batches(batch, steps):
        each = F.cross_entropy(model(x).transpose(1, 2), y, ignore_index=-100, reduction="none").sum(1)
        (each / (y != -100).sum(1)).sum().div(len(batch[0])).backward()
    optimizer.step()
    optimizer.zero_grad()


@BOOK.right("tokens", **TOKENS)
def by_the_tokens_of_the_window(model, optimizer, batch, steps):
    optimizer.zero_grad()
    count = (batch[1] != -100).sum()
    for x, y in micro_batches(batch, steps):
        (token_total(model(x), y) / count).backward()
    optimizer.step()


@BOOK.right("tokens", **PLAIN, optimizer=decaying)
def means_weighted_by_tokens(model, optimizer, batch, steps):
    optimizer.zero_grad()
    count = (batch[1] != -100).sum()
    for x, y in micro_batches(batch, steps):
        (token_loss(model(x), y) * (int((y != -100).sum()) / int(count))).backward()
    optimizer.step()


@BOOK.right("tokens", **PLAIN, optimizer=sgd)
def share_of_tokens_as_a_tensor(model, optimizer, batch, steps):
    """The quotient of two counts is a float32 tensor of no dimensions, whatever the model's precision."""
    optimizer.zero_grad()
    count = (batch[1] != -100).sum()
    for x, y in micro_batches(batch, steps):
        (token_loss(model(x), y) * ((y != -100).sum() / count)).backward()
    optimizer.step()


@BOOK.right("tokens", **TOKENS, optimizer=momentum)
def divided_by_tokens_at_the_end(model, optimizer, batch, steps):
    """The count is known only after the last micro-batch."""
    optimizer.zero_grad()
    count = 0
    for x, y in micro_batches(batch, steps):
        token_total(model(x), y).backward()
        count += int((y != -100).sum())
    for p in model.parameters():
        p.grad /= count
    optimizer.step()


@BOOK.right("tokens", model=tagger, batch=sentences, loss=shifted)
def counted_after_the_shift(model, optimizer, batch, steps):
    optimizer.zero_grad()
    count = (batch[1][:, 1:] != -100).sum()
    for x, y in micro_batches(batch, steps):
        (token_total(model(x)[:, :-1], y[:, 1:]) / count).backward()
    optimizer.step()


@BOOK.right("tokens", loss=weighted, optimizer=sgd)
def class_weights_of_the_window(model, optimizer, batch, steps):
    optimizer.zero_grad()
    weights = class_weights(batch[0])
    total = weights[batch[1]].sum()
    for x, y in micro_batches(batch, steps):
        (F.cross_entropy(model(x), y, weight=weights, reduction="sum") / total).backward()
    optimizer.step()


class BySample:
    def weight(self, targets):
        return targets[1].sum()

    def total(self, outputs, targets):
        return (targets[1] * (outputs - targets[0]) ** 2).sum()


@BOOK.right("tokens", loss=BySample(), model=regressor, batch=weighted_samples, steps=5)
def sample_weights_of_the_window(model, optimizer, batch, steps):
    optimizer.zero_grad()
    loss = BySample()
    for x, targets in micro_batches(batch, steps):
        (loss.total(model(x), targets) / loss.weight(batch[1])).backward()
    optimizer.step()


def boxes(n=12, queries=4):
    """Features, and a dict of targets as in detection: which queries hold a box, its class and its place."""
    g = generator(11)
    x = torch.randn(n, 6, generator=g)
    present = torch.rand(n, queries, generator=g) < 0.4
    present[:, 0] |= ~present.any(1)
    places = torch.rand(n, queries, 4, generator=g)
    return x, dict(present=present, labels=torch.randint(0, 3, (n, queries), generator=g), boxes=places)


class Detector(nn.Module):
    def __init__(self, queries=4):
        super().__init__()
        self.body = nn.Linear(6, 16)
        self.queries = nn.Parameter(torch.randn(queries, 16))
        self.classes = nn.Linear(16, 4)
        self.boxes = nn.Linear(16, 4)

    def forward(self, x):
        hidden = torch.relu(self.body(x)[:, None] + self.queries)
        return dict(logits=self.classes(hidden), boxes=self.boxes(hidden).sigmoid())


def detection_parts(outputs, targets):
    """The sums over queries and over boxes."""
    present = targets["present"]
    labels = targets["labels"].masked_fill(~present, 3)
    classes = F.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten(), reduction="sum")
    places = (outputs["boxes"] - targets["boxes"]).abs().sum(-1)
    return classes / present.shape[1], (places * present).sum()


def detection(outputs, targets):
    classes, places = detection_parts(outputs, targets)
    return classes / len(targets["present"]) + 5 * places / targets["present"].sum()


DETECTION = dict(model=lambda: seeded(Detector), batch=boxes, loss=detection, steps=3)


@BOOK.right("tokens", **DETECTION)
def boxes_of_the_window(model, optimizer, batch, steps):
    optimizer.zero_grad()
    count = batch[1]["present"].sum()
    for x, targets in micro_batches(batch, steps):
        classes, places = detection_parts(model(x), targets)
        (classes / len(batch[0]) + 5 * places / count).backward()
    optimizer.step()


@BOOK.wrong("tokens", **DETECTION)
def boxes_of_the_micro_batch(model, optimizer, batch, steps):
    """the box loss is divided by the boxes of each micro-batch and then by 3, not by the window's boxes"""
    optimizer.zero_grad()
    parts = micro_batches(batch, steps)
    for x, targets in parts:
        (detection(model(x), targets) * len(x) / len(batch[0])).backward()
    optimizer.step()


def speech(n=10, frames=9):
    g = generator(12)
    lengths = torch.randint(1, 4, (n,), generator=g)
    return torch.randn(n, frames, 5, generator=g), (torch.randint(1, 5, (n, 3), generator=g), lengths)


def ctc(outputs, targets, reduction="mean"):
    labels, lengths = targets
    frames = torch.full_like(lengths, outputs.shape[1])
    return F.ctc_loss(outputs.log_softmax(-1).transpose(0, 1), labels, frames, lengths, reduction=reduction)


SPEECH = dict(model=lambda: seeded(lambda: two_layers(5, 12, 5)), batch=speech, steps=5, optimizer=sgd)


@BOOK.right("tokens", loss=ctc, **SPEECH)
def ctc_by_sample(model, optimizer, batch, steps):
    """torch's mean divides each sample by its length and then by the number of samples."""
    optimizer.zero_grad()
    for x, targets in micro_batches(batch, steps):
        (ctc(model(x), targets) * (len(x) / len(batch[0]))).backward()
    optimizer.step()


@BOOK.wrong("tokens", loss=ctc, **SPEECH)
def ctc_by_all_lengths(model, optimizer, batch, steps):
    """CTC's sum is divided by all label lengths together, its mean divides every sample by its own length"""
    optimizer.zero_grad()
    for x, targets in micro_batches(batch, steps):
        (ctc(model(x), targets, "sum") / batch[1][1].sum()).backward()
    optimizer.step()
