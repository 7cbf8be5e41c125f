"""Sample numbers of the rows that a model receives, recognised by content."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .nested import batch_size, samples_first, tensors, unwrapped


class SampleIds:
    """Maps rows to their sample numbers in the update's batch, in any order.

    A call may pass more or fewer tensors than the batch has: tensors that are not the batch's are ignored.
    Equal samples get different numbers, in the order in which `find` receives them.

    Args:
        inputs: of the batch.
        numbers: of its rows; 0, 1, 2, ... by default.
        targets: of the batch, which a loop may pass to its model.
    """

    def __init__(self, inputs: Any, numbers: Sequence[int] | None = None, targets: Any = None) -> None:
        size = batch_size(inputs)
        self._numbers = list(range(size)) if numbers is None else list(numbers)
        self._columns: list[_Column] = []
        first: dict[tuple[bytes, ...], int] = {}
        keys = [_keys(_matrix(tensor, 1)) for tensor in samples_first(inputs)]
        # The first sample with the same inputs, by sample index.
        self._first = [first.setdefault(row, index) for index, row in enumerate(zip(*keys, strict=True))]
        for tensor in samples_first([inputs, targets]):
            if len(tensor) == size:
                self._columns.append(_Column(_matrix(tensor, 1)))
        self._uses: Counter[int] = Counter()

    def first_equal(self) -> dict[int, int]:
        """Maps every sample to the first sample of equal inputs."""
        return {self._numbers[index]: self._numbers[first] for index, first in enumerate(self._first)}

    def find(self, arguments: Any) -> list[int] | None:
        """The sample numbers of a call's `arguments`; None if no tensor's rows are those of the batch.

        None too if samples that differ cannot be told apart by the rows that the call has.
        """
        candidates: list[set[int]] | None = None
        # The widest tensors decide where a narrow one (a flag, a position) fits other samples by chance.
        for tensor in sorted(tensors(arguments), key=Tensor.numel, reverse=True):
            rows = self._candidates(tensor)
            if rows is None:
                continue
            if candidates is None:
                candidates = rows
            elif len(rows) == len(candidates):
                candidates = [one & other or one for one, other in zip(candidates, rows, strict=True)]
        if candidates is None or any(len({self._first[index] for index in each}) > 1 for each in candidates):
            return None
        numbers = []
        for each in candidates:
            index = min(each, key=lambda equal: (self._uses[equal], equal))
            self._uses[index] += 1
            numbers.append(self._numbers[index])
        return numbers

    def _candidates(self, tensor: Tensor) -> list[set[int]] | None:
        """The samples that each row of `tensor` may be; None if they are rows of no column of the batch."""
        for rows in _rows(tensor):
            if not len(rows):
                return []
            columns = [column for column in self._columns if column.width == rows.shape[1]]
            keys = _keys(rows) if columns else []
            columns = [column for column in columns if all(key in column.samples for key in keys)]
            if columns:
                return [set().union(*(column.samples[key] for column in columns)) for key in keys]
        return None


class _Column:
    """One tensor of the batch: the indices of its samples by the content of their rows."""

    def __init__(self, rows: Tensor) -> None:
        self.width = rows.shape[1]
        self.samples: dict[bytes, set[int]] = {}
        for index, key in enumerate(_keys(rows)):
            self.samples.setdefault(key, set()).add(index)


def row_count(arguments: Any) -> int:
    """The number of samples of a call, by its first tensor with dimensions; 0 without one."""
    return next((len(_rows(tensor)[-1]) for tensor in tensors(arguments) if _rows(tensor)), 0)


def _rows(tensor: Tensor) -> list[Tensor]:
    """The ways in which a call's `tensor` may hold samples, as matrices with a sample in each row.

    It may be a single sample, or have the samples first. Below `torch.func.vmap` the dimensions that are
    mapped over come before both.
    """
    plain, mapped = unwrapped(tensor)
    if not plain.dim():
        return []
    return [_matrix(plain, count) for count in (mapped, mapped + 1) if count <= plain.dim()]


def _matrix(tensor: Tensor, leading: int) -> Tensor:
    """`tensor` with its `leading` dimensions flattened into rows, and the others into columns."""
    shape = tensor.shape
    return tensor.reshape(math.prod(shape[:leading]), math.prod(shape[leading:]))


def _keys(rows: Tensor) -> list[bytes]:
    """A digest of the content of each row, the same in every dtype that represents it."""
    rows = rows.detach()
    if rows.is_complex():
        rows = torch.view_as_real(rows.resolve_conj()).flatten(1)
    content = (rows.double() + 0.0).cpu().numpy()  # without negative zeros
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in content]
