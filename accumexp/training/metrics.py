"""Metrics by name: accuracy, which needs no further package, and those of torchmetrics."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Accuracy:
    """The fraction of items whose most probable class is their target; ignored items do not count.

    Equals torchmetrics' MulticlassAccuracy with average="micro" to the bit. That one selects the items
    that are not ignored, which waits for the device to count them; and the import of torchmetrics takes
    longer than a short run.

    Shapes: outputs (n, classes, ...), targets (n, ...) of class indices.

    Args:
        ignore_index: the target of ignored items, as in `torch.nn.CrossEntropyLoss`.
        output, target: the key or position of the outputs and targets, where there are several.
    """

    higher_is_better = True

    def __init__(
        self, ignore_index: int = -100, output: str | int | None = None, target: str | int | None = None
    ) -> None:
        self.ignore_index = ignore_index
        self.output = output
        self.target = target
        self.over_ranks = True
        self._counts = torch.zeros(2, dtype=torch.int64)

    def to(self, device: torch.device) -> Accuracy:
        self._counts = self._counts.to(device)
        return self

    def reset(self) -> None:
        self._counts = torch.zeros_like(self._counts)

    def update(self, outputs: Any, targets: Any) -> None:
        outputs = outputs if self.output is None else outputs[self.output]
        targets = targets if self.target is None else targets[self.target]
        valid = targets.long() != self.ignore_index
        correct = (outputs.argmax(1) == targets) & valid
        self._counts += torch.stack([correct.sum(), valid.sum()])

    def compute(self) -> Tensor:
        """Shape (); 0 where every target was ignored. Of all ranks, unless `over_ranks` is false."""
        counts = self._counts.clone()
        if self.over_ranks and dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        correct, total = counts.unbind()
        return correct / total.clamp(min=1)


def is_metric(value: object) -> bool:
    """Whether `value` is a metric of this package or of torchmetrics, which is not imported for it."""
    torchmetrics = sys.modules.get("torchmetrics")
    return isinstance(value, Accuracy) or torchmetrics is not None and isinstance(value, torchmetrics.Metric)


class Metrics:
    """Metrics that are updated and computed together.

    Args:
        metrics: by name; those of torchmetrics share what they count through a MetricCollection.
        device: of what they count.
    """

    def __init__(self, metrics: Mapping[str, Any], device: torch.device | None = None) -> None:
        self._counted = {name: metric for name, metric in metrics.items() if isinstance(metric, Accuracy)}
        others = {name: metric for name, metric in metrics.items() if name not in self._counted}
        self._collection: Any = None
        if others:
            from torchmetrics import MetricCollection

            self._collection = MetricCollection(others)
        for each in (*self._counted.values(), self._collection):
            if each is not None and device is not None:
                each.to(device)

    def items(self) -> Iterator[tuple[str, Any]]:
        yield from self._counted.items()
        if self._collection is not None:
            yield from self._collection.items(keep_base=True, copy_state=False)

    def reset(self) -> None:
        for metric in self._counted.values():
            metric.reset()
        if self._collection is not None:
            self._collection.reset()

    def update(self, outputs: Any, targets: Any) -> None:
        for metric in self._counted.values():
            metric.update(outputs, targets)
        if self._collection is not None:
            self._collection.update(outputs, targets)

    def compute(self) -> dict[str, Any]:
        """The value of every metric by name, over all ranks. Waits for the device."""
        values: dict[str, Any] = {name: metric.compute() for name, metric in self._counted.items()}
        if self._collection is not None:
            with warnings.catch_warnings():
                # A rank without samples updates nothing, and computes from the other ranks' counts.
                warnings.filterwarnings("ignore", message=".*was called before the ``update`` method")
                self._fill_list_states()
                values.update(self._collection.compute())
        return values

    def keep_to_this_process(self) -> None:
        """Computes without the other ranks, which may be elsewhere."""
        for metric in self._counted.values():
            metric.over_ranks = False
        if self._collection is not None:
            for _, metric in self._collection.items(keep_base=True, copy_state=False):
                metric.distributed_available_fn = _not_distributed

    def _fill_list_states(self) -> None:
        """Gives a rank that has seen no sample empty lists' tensors, of the other ranks' dtype and shape.

        torchmetrics gathers what a list holds, and nothing from a rank where it is empty: the ranks'
        collectives would not match.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        states = [
            (metric, name)
            for _, metric in self._collection.items(keep_base=True, copy_state=False)
            for name in metric._defaults
            if isinstance(getattr(metric, name), list)
        ]
        if not states:
            return
        kinds_here = [
            [(value.dtype, value.shape[1:]) for value in getattr(metric, name)[:1]] for metric, name in states
        ]
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, kinds_here)
        for k, (metric, name) in enumerate(states):
            state = getattr(metric, name)
            elsewhere = [kinds[k][0] for kinds in every if kinds[k]]
            if not state and elsewhere:
                dtype, shape = elsewhere[0]
                state.append(torch.empty((0, *shape), dtype=dtype, device=metric.device))


def _not_distributed() -> bool:
    return False
