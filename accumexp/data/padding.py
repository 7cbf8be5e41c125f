"""A collate that pads sequences of unequal lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import UsageError
from .samples import Layout, fields_of, has_names


@dataclass(frozen=True)
class Pad:
    """See `pad`."""

    value: float
    target_value: float
    mask: str | None
    layout: Layout

    def __call__(self, samples: Sequence[Any]) -> Any:
        named = has_names(samples[0])
        rows = [fields_of(sample, "data.collate") for sample in samples]
        target = self.layout.target
        if not named:
            places = [place for place in rows[0] if place != self._place(self.layout.weight, rows[0])]
            target = places[-1] if target is None else self._place(target, rows[0])
        columns: dict[Any, Any] = {}
        for name in rows[0]:
            fill = self.target_value if name == target else self.value
            columns[name] = _padded([row[name] for row in rows], fill)
        if self.mask is not None:
            if not named:
                raise UsageError(f"data.collate.mask={self.mask}: names an input, but the samples are tuples")
            columns[self.mask] = _mask([row[name] for row in rows] for name in rows[0] if name != target)
        return columns if named else tuple(columns.values())

    @staticmethod
    def _place(place: Any, parts: Mapping[Any, Any]) -> Any:
        return place + len(parts) if isinstance(place, int) and place < 0 else place


def pad(
    value: float = 0,
    target_value: float = -100,
    mask: str | None = None,
    target: str | int | None = None,
    weight: str | int | None = None,
) -> Pad:
    """A collate that pads sequences along their first dimension to the longest of the batch.

    Args:
        value: fills inputs.
        target_value: fills a target that is a sequence; give the `ignore_index` of the loss.
        mask: the name of an input to add to dict samples, (n, longest) int64: 1 on the elements of the
            sample's first input that is a sequence, 0 on those that are filled in.
        target, weight: names or positions in the sample, `data.target` and `data.weight` by default.
    """
    return Pad(value, target_value, mask, Layout(target, weight))


def _padded(column: list[Any], fill: float) -> Any:
    first = column[0]
    if isinstance(first, str):
        return column
    if isinstance(first, Mapping):
        return {name: _padded([each[name] for each in column], fill) for name in first}
    if isinstance(first, tuple | list) and not all(isinstance(v, int | float) for v in first):
        return tuple(_padded(list(each), fill) for each in zip(*column, strict=True))
    return _stacked([torch.as_tensor(each) for each in column], fill)


def _stacked(parts: list[Tensor], fill: float) -> Tensor:
    if not parts[0].dim():
        return torch.stack(parts)
    return pad_sequence(parts, batch_first=True, padding_value=fill)


def _mask(columns: Any) -> Tensor:
    for column in columns:
        if isinstance(column[0], str | Mapping):
            continue
        parts = [torch.as_tensor(each) for each in column]
        if parts[0].dim():
            return _stacked([torch.ones(len(part), dtype=torch.int64) for part in parts], 0)
    raise UsageError("data.collate.mask: no input is a sequence, leave it out")
