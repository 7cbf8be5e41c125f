"""Samples as data sets give them, separated into the model's inputs, the loss's targets and weights.

A sample or a collated batch is a pair (inputs, targets); a tuple of more, of which one position is the
target; or a dict, named tuple or dataclass, of which one name is the target. The rest are inputs.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.data import default_collate

from ..accum.batch import Nested, batch_size
from ..errors import UsageError, first_line
from .labels import TargetCheck


@dataclass(frozen=True)
class Layout:
    """Which parts of a sample are what.

    Attributes:
        target: the target's name or position. None: the second of a pair, the last of more.
        weight: the name or position of the sample's weight; the targets are then pairs (target, weight).
        inputs: names or positions of the inputs. None: all that is left.
    """

    target: str | int | None = None
    weight: str | int | None = None
    inputs: tuple[str | int, ...] | None = None

    def separate(self, sample: Any, key: str) -> tuple[Any, Any]:
        """(inputs, targets) of a sample or a batch; a single input is passed as it is.

        A single named input that is a dict keeps its name: the items of the model's inputs are its arguments.

        Args:
            key: of the data set, for errors.

        Raises:
            UsageError: if a name or position is missing, or the sample has no parts.
        """
        fields = fields_of(sample, key)
        if self.target is None and self.weight is None and self.inputs is None and len(fields) == 2:
            if not has_names(sample):
                return sample[0], sample[1]
        target, weight, inputs = self._parts(fields, has_names(sample), key)
        if not inputs:
            raise UsageError(f"{key}: {_described(sample, fields)}, of which none is left as the input")
        chosen: Any
        if len(inputs) == 1:
            chosen = fields[inputs[0]]
            if has_names(sample) and isinstance(chosen, Mapping):
                chosen = {inputs[0]: chosen}
        elif has_names(sample):
            chosen = {name: fields[name] for name in inputs}
        else:
            chosen = tuple(fields[position] for position in inputs)
        return chosen, fields[target] if weight is None else (fields[target], fields[weight])

    def with_inputs(self, sample: Any, change: Callable[[Any], Any], key: str) -> Any:
        """`sample` with its inputs replaced by `change(inputs)`; named tuples and dataclasses become dicts.

        Inputs that the sample lacks are left to the collate.
        """
        fields = fields_of(sample, key)
        if self.inputs is not None and (missing := [name for name in self.inputs if name not in fields]):
            there = tuple(name for name in self.inputs if name not in missing)
            return dataclasses.replace(self, inputs=there).with_inputs(sample, change, key)
        inputs, _ = self.separate(sample, key)
        changed = change(inputs)
        if not has_names(sample) and len(fields) == 2 and self == Layout():
            return changed, sample[1]
        _, _, names = self._parts(fields, has_names(sample), key)
        if len(names) == 1 and not (has_names(sample) and isinstance(fields[names[0]], Mapping)):
            fields[names[0]] = changed
        else:
            fields.update(changed if isinstance(changed, Mapping) else zip(names, changed, strict=True))
        return fields if has_names(sample) else tuple(fields.values())

    def _parts(self, fields: dict[Any, Any], named: bool, key: str) -> tuple[Any, Any, list[Any]]:
        weight = None if self.weight is None else _part(self.weight, "weight", fields, named, key)
        if self.target is not None:
            target = _part(self.target, "target", fields, named, key)
        elif named:
            names = ", ".join(map(str, fields))
            raise UsageError(f"data.target=null: the samples of {key} have {names}, name one")
        else:
            target = [position for position in fields if position != weight][-1]
        if target == weight:
            raise UsageError(f"data.weight={self.weight}: is the target too, give another name or position")
        if self.inputs is None:
            inputs = [name for name in fields if name not in (target, weight)]
        else:
            inputs = [_part(name, "inputs", fields, named, key) for name in self.inputs]
        return target, weight, inputs


def _part(part: str | int, what: str, fields: dict[Any, Any], named: bool, key: str) -> Any:
    """The key of `fields` that `part` means."""
    field_key = part
    if not named and isinstance(part, int) and part < 0:
        field_key = part + len(fields)
    if isinstance(field_key, str | int) and field_key in fields and not isinstance(field_key, bool):
        return field_key
    have = ", ".join(map(str, fields)) if named else f"positions 0 to {len(fields) - 1}"
    raise UsageError(f"data.{what}={part}: the samples of {key} have no such part, they have {have}")


def has_names(sample: Any) -> bool:
    return isinstance(sample, Mapping) or hasattr(sample, "_asdict") or dataclasses.is_dataclass(sample)


def fields_of(sample: Any, key: str) -> dict[Any, Any]:
    """The parts of a sample, by name or position."""
    if isinstance(sample, Mapping):
        return dict(sample)
    if hasattr(sample, "_asdict"):
        return sample._asdict()
    if dataclasses.is_dataclass(sample):
        return {field.name: getattr(sample, field.name) for field in dataclasses.fields(sample)}
    if isinstance(sample, tuple | list) and len(sample) > 1:
        return dict(enumerate(sample))
    made = f"a {type(sample).__name__}"
    if isinstance(sample, tuple | list):
        made += f" of {len(sample)}"
    raise UsageError(f"{key}: a sample is a pair (inputs, target), a longer tuple or a dict, not {made}")


def _described(sample: Any, fields: dict[Any, Any]) -> str:
    return (
        f"a sample has {', '.join(map(str, fields))}"
        if has_names(sample)
        else f"a sample has {len(fields)} parts"
    )


@dataclass
class Collate:
    """Makes a batch of raw samples: `collate`, then its inputs and targets, which are checked.

    Attributes:
        key: of the data set, for errors.
        collate: of a list of samples; None for torch's default.
        checks: of the targets.
    """

    key: str
    layout: Layout
    collate: Callable[[list[Any]], Any] | None = None
    checks: list[TargetCheck] = field(default_factory=list)

    def __call__(self, samples: list[Any], numbers: Sequence[int]) -> tuple[Any, Any]:
        """(inputs, targets) of `samples`, whose numbers in the data set are `numbers`.

        Raises:
            UsageError: if they cannot be collated or hold anything but tensors.
        """
        made = self._collated(samples)
        inputs, targets = self.layout.separate(made, self.key if self.collate is None else "data.collate")
        for what, part in (("inputs", inputs), ("target", targets)):
            if other := _no_tensor(part):
                name, kind = other
                where = f"{name or 'the ' + what} is {kind}"
                raise UsageError(
                    f"{self.key}: of a sample {where}, tensors and numbers are needed; leave it out with "
                    "data.inputs, or make tensors in a data.collate"
                )
        try:
            count = batch_size((inputs, targets))
        except ValueError as error:
            raise UsageError(f"{self.key}: {error}; give a data.collate that makes them alike") from error
        if count != len(samples):
            raise UsageError(f"data.collate: gave {count} samples of {len(samples)}, one each is needed")
        if self.layout.weight is not None and targets[1].dim() != 1:
            shape = tuple(targets[1].shape[1:])
            raise UsageError(f"data.weight={self.layout.weight}: one number a sample is needed, not {shape}")
        for check in self.checks:
            check(targets[0] if self.layout.weight is not None else targets, self.key, numbers)
        return inputs, targets

    def _collated(self, samples: list[Any]) -> Any:
        if self.collate is not None:
            try:
                return self.collate(samples)
            except UsageError:
                raise
            except Exception as error:
                raise UsageError(f"data.collate: {type(error).__name__}: {first_line(error)}") from error
        if dataclasses.is_dataclass(samples[0]):
            samples = [fields_of(sample, self.key) for sample in samples]
        if len(samples) and self.layout.inputs is not None and has_names(samples[0]):
            # What is not asked for need not be a tensor.
            kept = {*self.layout.inputs, self.layout.target, self.layout.weight}
            samples = [{k: v for k, v in fields_of(s, self.key).items() if k in kept} for s in samples]
        try:
            return default_collate(samples)
        except (RuntimeError, TypeError, ValueError, KeyError) as error:
            raise UsageError(
                f"{self.key}: the samples cannot be stacked to a batch: {first_line(error)}; give a "
                "data.collate, as accumexp.data.pad for sequences of unequal lengths"
            ) from error


def check_inputs(model: nn.Module, inputs: Nested) -> None:
    """Checks that `model.forward` takes `inputs` by name or number.

    Raises:
        UsageError: naming what is given and what is taken.
    """
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return
    try:
        if isinstance(inputs, Tensor):
            signature.bind(inputs)
        elif isinstance(inputs, Mapping):
            signature.bind(**inputs)
        else:
            signature.bind(*inputs)
    except TypeError as error:
        if isinstance(inputs, Tensor):
            given = "one input"
        else:
            named = isinstance(inputs, Mapping)
            given = ", ".join(map(str, inputs)) if named else f"{len(inputs)} by position"
        takes = ", ".join(signature.parameters) or "nothing"
        raise UsageError(
            f"data.inputs: the samples give {given}, and {type(model).__name__}.forward takes {takes} "
            f"({error}); choose with data.inputs, data.target and data.weight, or rename in a data.collate"
        ) from error


def _no_tensor(part: Any, name: str = "") -> tuple[str, str] | None:
    """The name and type of the first leaf that is no tensor, or None."""
    if isinstance(part, Tensor):
        return None
    if isinstance(part, Mapping):
        children = [(f"{name}.{key}" if name else str(key), value) for key, value in part.items()]
    elif isinstance(part, tuple | list):
        if part and isinstance(part[0], str):
            return name, "a str"
        children = [(f"{name}[{k}]", value) for k, value in enumerate(part)]
    else:
        return name, f"a {type(part).__name__}"
    return next((child for name, value in children if (child := _no_tensor(value, name))), None)


def from_worker(error: UsageError) -> UsageError:
    """The line of an error that a DataLoader worker raised; torch wraps it in the worker's traceback."""
    messages = re.findall(r"^(?:[\w.]*\.)?UsageError: (.*)$", str(error), re.MULTILINE)
    return UsageError(messages[-1]) if messages else error
