"""Training loops as `accumexp.proof.audit` takes them: right ones, and wrong ones of every kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from accumexp.proof import audit

Batch = tuple[Tensor, Tensor]
EPOCH = 84  # micro-batches of 8: 4, 4, and 8, 8, 4 samples


def network(dropout: float = 0.0, norm: bool = False) -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Linear(6, 16), nn.BatchNorm1d(16) if norm else nn.Identity(), nn.Tanh()]
    return nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(16, 3))


def classes(samples: int, dtype: torch.dtype) -> Batch:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, 6, generator=generator, dtype=dtype)
    return inputs, torch.randint(0, 3, (samples,), generator=generator)


def windows(batch: Batch, steps: int, micro: int) -> Iterator[list[Batch]]:
    """The windows of an epoch, each a list of micro-batches."""
    parts = list(zip(*(tensor.split(micro) for tensor in batch), strict=True))
    for start in range(0, len(parts), steps):
        yield parts[start : start + steps]


@dataclass(frozen=True)
class Loop:
    """A plain loop that accumulates as documented, but for what its fields change."""

    divide: Callable[[list[Batch], int], float] = lambda window, _: sum(len(x) for x, _ in window)
    mean: bool = False
    epochs: int = 2
    dropout: float = 0.0
    norm: bool = False
    clip: float | None = None
    clip_each: bool = False
    zero: bool = True
    step_for_each: bool = False
    schedule: str = ""
    unscaled_head: bool = False
    logged: Callable[[float, int], float] | None = None
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD

    def __call__(self, watch: Any, steps: int, micro: int, samples: int = EPOCH) -> None:
        model = watch(network(self.dropout, self.norm).to(watch.dtype))
        groups = [{"params": model[0].parameters()}, {"params": model[4].parameters(), "lr": 0.05}]
        if self.norm:
            groups[0]["params"] = [*model[0].parameters(), *model[1].parameters()]
        optimizer = self.optimizer(groups, lr=0.1)  # type: ignore[call-arg]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1 / (1 + update))
        for _ in range(self.epochs):
            for window in windows(classes(samples, watch.dtype), steps, micro):
                if self.zero:
                    optimizer.zero_grad()
                total = 0.0
                for inputs, targets in window:
                    loss = cross_entropy(model(inputs), targets, reduction="mean" if self.mean else "sum")
                    loss = loss / self.divide(window, steps)
                    loss.backward()
                    total += loss.item()
                    if self.clip_each and self.clip is not None:
                        nn.utils.clip_grad_norm_(model.parameters(), self.clip)
                    if self.schedule == "micro-batch":
                        schedule.step()
                if self.unscaled_head and len(window) > 1:
                    for parameter in model[4].parameters():
                        parameter.grad *= len(window)  # type: ignore[operator]
                if self.clip is not None and not self.clip_each:
                    nn.utils.clip_grad_norm_(model.parameters(), self.clip)
                for _ in window if self.step_for_each else window[:1]:
                    optimizer.step()
                if self.schedule == "update":
                    schedule.step()
                if self.logged is not None:
                    watch.loss(self.logged(total, len(window)))


def by_steps(window: list[Batch], steps: int) -> float:
    return steps


def by_number(window: list[Batch], steps: int) -> float:
    return len(window)


def by_nothing(window: list[Batch], steps: int) -> float:
    return 1.0


class TokenModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20)

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(input_ids)))


def tokens(mean_of_means: bool) -> Callable[..., None]:
    """A loop over ragged sequences, padded to the longest of each micro-batch; labels of -100 are ignored."""

    def fit(watch: Any, steps: int, micro: int) -> None:
        torch.manual_seed(0)
        model = watch(TokenModel().to(watch.dtype))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        lengths = torch.randint(3, 12, (64,))
        rows = [torch.randint(1, 20, (int(length),)) for length in lengths]

        def collate(part: list[Tensor]) -> dict[str, Tensor]:
            padded = nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=1)
            mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in part], batch_first=True)
            return {
                "input_ids": padded,
                "labels": padded.masked_fill(mask == 0, -100),
                "attention_mask": mask,
            }

        parts = [collate(rows[start : start + micro]) for start in range(0, 64, micro)]
        for start in range(0, len(parts), steps):
            window = parts[start : start + steps]
            count = sum(int((part["labels"] != -100).sum()) for part in window)
            optimizer.zero_grad()
            for part in window:
                outputs, labels = model(**part).flatten(0, 1), part["labels"].flatten()
                if mean_of_means:
                    loss = cross_entropy(outputs, labels) / len(window)
                else:
                    loss = cross_entropy(outputs, labels, reduction="sum") / count
                loss.backward()
            optimizer.step()

    return fit


def stream(kind: str) -> Callable[..., None]:
    """A loop that steps by a count of micro-batches: over epochs' ends, too early, or not at the end."""

    def fit(watch: Any, steps: int, micro: int, samples: int = EPOCH) -> None:
        model = watch(network().to(watch.dtype))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        count = 0
        for _ in range(2):
            parts = list(zip(*(tensor.split(micro) for tensor in classes(samples, watch.dtype)), strict=True))
            if kind != "over the end":
                count = 0
            if kind == "reset":
                optimizer.zero_grad()
            for inputs, targets in parts:
                start = len(parts) // steps * steps
                size = steps if count < start or kind != "tail" else len(parts) - start
                (cross_entropy(model(inputs), targets) / size).backward()
                count += 1
                last = count == len(parts)
                tail = last if kind in ("tail", "early") else False
                early = kind == "early" and steps > 1 and count == len(parts) - 1
                if count % steps == 0 or tail or early:
                    optimizer.step()
                    optimizer.zero_grad()

    return fit


def shuffled(watch: Any, steps: int, micro: int) -> None:
    """A loop whose order of samples depends on the micro-batch size."""
    model = watch(network().to(watch.dtype))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs, targets = classes(64, watch.dtype)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(micro))
    for window in windows((inputs[order], targets[order]), steps, micro):
        optimizer.zero_grad()
        for x, y in window:
            (cross_entropy(model(x), y, reduction="sum") / sum(len(x) for x, _ in window)).backward()
        optimizer.step()


def coupled(watch: Any, steps: int, micro: int) -> None:
    """A loss between the samples of a micro-batch (contrastive)."""
    model = watch(network().to(watch.dtype))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for window in windows(classes(64, watch.dtype), steps, micro):
        optimizer.zero_grad()
        for inputs, _ in window:
            outputs = model(inputs)
            similarity = outputs @ outputs.T
            (cross_entropy(similarity, torch.arange(len(inputs))) / len(window)).backward()
        optimizer.step()


def closure(watch: Any, steps: int, micro: int) -> None:
    """A loop that computes its last micro-batch inside `optimizer.step(closure)`."""
    model = watch(network().to(watch.dtype))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for window in windows(classes(64, watch.dtype), steps, micro):
        optimizer.zero_grad()

        def backward(part: Batch, count: int) -> Tensor:
            loss = cross_entropy(model(part[0]), part[1]) / count
            loss.backward()
            return loss

        for part in window[:-1]:
            backward(part, len(window))
        last, count = window[-1], len(window)
        optimizer.step(lambda last=last, count=count: backward(last, count).item())


def scaled(autocast: torch.dtype, wrong: bool = False) -> Callable[..., None]:
    """A loop in mixed precision, with a loss scaler for fp16."""

    def fit(watch: Any, steps: int, micro: int) -> None:
        torch.manual_seed(0)
        model = watch(nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 3)).to(watch.dtype))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=autocast is torch.float16)  # pyright: ignore
        for window in windows(classes(128, watch.dtype), steps, micro):
            optimizer.zero_grad()
            for inputs, targets in window:
                with torch.autocast("cpu", autocast):
                    loss = cross_entropy(model(inputs), targets)
                scaler.scale(loss / (1 if wrong else len(window))).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 100.0)
            scaler.step(optimizer)
            scaler.update()

    return fit


def parallel(kind: str) -> Callable[..., None]:
    """A loop of DistributedDataParallel on this rank's share of the samples."""

    def fit(watch: Any, steps: int, micro: int) -> None:
        rank, size = dist.get_rank(), dist.get_world_size()
        model = DistributedDataParallel(watch(network().to(watch.dtype)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        inputs, targets = classes(EPOCH * size, watch.dtype)
        for window in windows((inputs[rank::size], targets[rank::size]), steps, micro):
            optimizer.zero_grad()
            count = sum(len(x) for x, _ in window)
            if kind == "divided by steps" and steps > 1:
                count = steps * micro
            for number, (x, y) in enumerate(window):
                last = number == len(window) - 1
                if kind == "not reduced" and steps > 1:
                    last = False
                with nullcontext() if last else model.no_sync():
                    loss = cross_entropy(model(x), y, reduction="sum") / count
                    (loss * size if kind == "added" and steps > 1 else loss).backward()
            optimizer.step()

    return fit


def audited_on_this_rank(kinds: list[str]) -> list[tuple[str, list[list[float]], list[list[int]]]]:
    """By kind of `parallel`: the audit's text, the last counts, and the sizes of the last update."""
    results = []
    for kind in kinds:
        certificate = audit(parallel(kind))
        counts = certificate.counts[-1].counts if certificate.counts else []
        results.append((str(certificate), counts, certificate.subject["micro_batches_by_update"][-1]))
    return results
