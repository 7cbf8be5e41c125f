"""Sample numbers of the rows that a model receives, recognised by content."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..accum.batch import Nested, batch_size, tensors


class SampleIds:
    """Maps rows to their sample numbers in the update's batch, in any order.

    Equal samples get different numbers, in the order in which `find` receives them.

    Args:
        inputs: of the batch.
        numbers: of its rows; 0, 1, 2, ... by default.
    """

    def __init__(self, inputs: Nested, numbers: Sequence[int] | None = None) -> None:
        self._numbers: dict[bytes, list[int]] = {}
        self._occurrences: Counter[bytes] = Counter()
        keys = _keys(inputs) or []
        for number, key in zip(range(len(keys)) if numbers is None else numbers, keys, strict=True):
            self._numbers.setdefault(key, []).append(number)

    def first_equal(self) -> dict[int, int]:
        """Maps every sample to the first sample of equal content."""
        return {number: equal[0] for equal in self._numbers.values() for number in equal}

    def find(self, arguments: Any) -> list[int] | None:
        """The sample numbers of a forward pass's `arguments`; None if a row is not in the batch."""
        keys = _keys(arguments)
        if keys is None or any(key not in self._numbers for key in keys):
            return None
        numbers = []
        for key in keys:
            equal = self._numbers[key]
            numbers.append(equal[self._occurrences[key] % len(equal)])
            self._occurrences[key] += 1
        return numbers


def _keys(batch: Any) -> list[bytes] | None:
    """The content of each row; None without tensors that share their first dimension."""
    try:
        columns = tensors(batch)
        size = batch_size(batch)
    except ValueError:
        return None
    if not size:
        return []
    columns = [column.detach().reshape(size, -1).double().cpu() for column in columns]
    widest = max(column.shape[1] for column in columns)
    # The widest tensors alone: other arguments (a label, lengths) may differ in form.
    wide = [column for column in columns if column.shape[1] == widest]
    return [b"".join(sorted(column[k].numpy().tobytes() for column in wide)) for k in range(size)]
