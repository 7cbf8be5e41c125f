"""Data sets that are tensors in memory."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from ..accum.batch import Nested, batch_size, map_tensors


class InMemory(Dataset[Any]):
    """A `TensorDataset` of nested tensors, which is made resident without being read sample by sample.

    Args:
        inputs, targets: of all samples, (samples, ...), nested as the model and the loss take them.

    Raises:
        ValueError: if the tensors differ in their first dimension.
    """

    def __init__(self, inputs: Nested, targets: Nested) -> None:
        self._samples = batch_size((inputs, targets))
        self.inputs = inputs
        self.targets = targets

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        inputs, targets = (map_tensors(lambda t: t[index], batch) for batch in (self.inputs, self.targets))
        return inputs, targets
