"""What a loop changes by hand: the live objects that `state=` names, frozen parameters, and buffers.

Neither the optimizer nor the larger batch's forward pass says what they should be after a window. They must
be what the same loop makes of them when it makes a single micro-batch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .certificate import Cause, Check, excess, first_names
from .evidence import Failure, updates_in_words
from .larger_batch import norm, relative_error
from .micro_batches import passes_of
from .nested import batch_size
from .observation import observe
from .problem import Problem, TrainingState, WholeBatch, copy_in, rows
from .ranks import all_gather, worst
from .rounding import U64, larger_batch_of

IN_ONE = (
    "what the loop changes by hand, against the same loop with one micro-batch: 8 times what another order "
    "of the samples changes, and 8 n u"
)
# Relative error up to which a value may be the same but for rounding; every update is compared afterwards.
CLOSE = 1e-8
NO_SINGLE = "the loop makes {passes} micro-batches of the batch where steps=1 asks for one"


@dataclass
class Snapshot:
    """A loop's model, optimizer, schedule and named state before an update."""

    parts: dict[str, Any]
    outside: dict[str, Tensor]

    @classmethod
    def of(cls, state: TrainingState) -> Snapshot:
        parts = {name: part.state_dict() for name, part in state.parts().items()}
        outside = {name: value.clone() for name, value in state.outside.items()}
        return cls(copy.deepcopy(parts), outside)

    def load_into(self, state: TrainingState) -> None:
        for name, part in state.parts().items():
            part.load_state_dict(copy.deepcopy(self.parts[name]))
        state.outside.update({name: value.clone() for name, value in self.outside.items()})


class HandChanges:
    """Compares what a loop changes by hand with the same loop's single micro-batch, update by update.

    Args:
        names: of the frozen parameters and buffers that the loop changes; the named state is compared too.
    """

    def __init__(self, problem: Problem, names: frozenset[str]) -> None:
        self.problem = problem
        self.names = names
        self._figures: list[tuple[int, float, float, str]] = []
        self._hows: dict[int, str] = {}
        self._passes = 1

    def __bool__(self) -> bool:
        return bool(self.names or self.problem.state)

    def compare(
        self,
        number: int,
        before: Snapshot,
        after: TrainingState,
        batch: WholeBatch,
        changes: Mapping[str, int],
    ) -> None:
        """Compares the state `after` update `number` of `batch`. Calls the loop from `before`. Collective.

        Args:
            changes: how often the update changed each tensor of the named state in place.
        """
        expected, passes, in_one = self.in_one(before, batch)
        order = torch.randperm(batch_size(batch), generator=torch.Generator().manual_seed(number))
        reordered, *_ = self.in_one(before, rows(batch, order.to(self.problem.device)))
        self._passes = max(self._passes, max(all_gather(passes)))
        actual = self.values(after)
        worst_name, figure, bound = "", 0.0, 0.0
        for name, value in expected.items():
            error = relative_error(actual[name], value)
            allowed = 8 * relative_error(reordered[name], value) + 8 * self.problem.samples * U64
            if not worst_name or excess(error, allowed) > excess(figure, bound):
                worst_name, figure, bound = name, error, allowed
        self._figures.append((number, figure, bound, worst_name))
        key = worst_name.removeprefix("state ")
        self._hows[number] = _how(changes.get(key, 0), in_one.get(key, 0))

    def in_one(self, before: Snapshot, batch: WholeBatch) -> tuple[dict[str, Tensor], int, dict[str, int]]:
        """What the loop makes of a single micro-batch of `batch`.

        Returns:
            (the state after it, the forward passes made, how often each tensor was changed in place)
        """
        state = TrainingState(replace(self.problem, steps=1), torch.float64)
        before.load_into(state)
        observation = observe(state, batch)
        return self.values(state), passes_of(observation, batch), observation.outside_changes

    def values(self, state: TrainingState) -> dict[str, Tensor]:
        all_of_it = {**state.parameters(), **state.buffers()}
        changed = {name: all_of_it[name].detach() for name in sorted(self.names)}
        return {**changed, **{f"state {name}": value for name, value in state.outside.items()}}

    def check(self) -> Check | None:
        """The worst figure of all updates. A collective call."""
        if not self._figures:
            return None
        number, figure, bound, name = max(self._figures, key=lambda each: excess(each[1], each[2]))
        figure, bound = worst(all_gather(figure)), max(all_gather(bound))
        failing = [n for n, each, most, _ in self._figures if not each <= most]
        when = updates_in_words(failing, [n for n, *_ in self._figures]) if failing else ""
        at = f"worst at {name}, update {number}" if figure else "no difference"
        how = self._hows[number] if failing else ""
        detail = ", ".join(filter(None, (at, when, how)))
        if self._passes > 1:
            return Check(
                "state", float("inf"), 0.0, "relative", IN_ONE, NO_SINGLE.format(passes=self._passes)
            )
        return Check("state", figure, bound, "relative", IN_ONE, detail)


def _how(changes: int, in_one: int) -> str:
    """How the changes of a tensor in an update differ from those of one micro-batch."""
    if not changes or not in_one:
        return ""
    if changes != in_one:
        return f"changed {changes / in_one:.3g} times as often as with one micro-batch"
    return "changed as often as with one micro-batch, but not by the whole window's figures"


def hand_changed(
    problem: Problem, batch: WholeBatch, state: TrainingState, expected: dict[str, Tensor]
) -> frozenset[str]:
    """Frozen parameters and buffers that the loop's first window changes as its single micro-batch does.

    Args:
        batch: of the window, in fp64.
        state: after the window.
        expected: the buffers after the larger batch's forward pass, which does not make the same of them.
    """
    buffers, parameters = state.buffers(), state.parameters()
    bound = 8 * problem.samples * U64
    names = {name for name, value in expected.items() if not relative_error(buffers[name], value) <= bound}
    for name, parameter in copy_in(problem.model, torch.float64).named_parameters():
        if not parameter.requires_grad and relative_error(parameters[name], parameter):
            names.add(name)
    names = set().union(*all_gather(names))
    if not names:
        return frozenset()
    changes = HandChanges(problem, frozenset(names))
    before = Snapshot.of(TrainingState(problem, torch.float64))
    in_one, passes, _ = changes.in_one(before, batch)
    if max(all_gather(passes)) > 1:
        return frozenset()
    actual = changes.values(state)
    alike = {name for name in names if relative_error(actual[name], in_one[name]) <= CLOSE}
    return frozenset(set.intersection(*all_gather(alike)))


def changed_state_cause(problem: Problem, failure: Failure) -> Cause | None:
    """The cause if tensors in `state=` that the gradient depends on change before the last micro-batch."""
    changed = all_gather(failure.observation.changed_outside)[0]
    names = sorted({name for each in changed.values() for name in each})
    outside = dict(failure.observation.outside)
    exact = failure.expected.larger.gradient

    def matters(name: str) -> bool:
        value = outside[name]
        if not value.is_floating_point():
            return False
        waves = torch.arange(value.numel(), device=value.device).add(1).sin().view_as(value)
        moved = value + 0.01 * (1 + value.abs()) * waves.to(value.dtype)
        with problem.outside_as({**outside, name: moved}):
            gradient = larger_batch_of(problem, copy.deepcopy(failure.model), failure.batch).gradient
        off = {key: g.double() - exact[key].double() for key, g in gradient.items()}
        return norm(off) > failure.tolerance * norm(exact)

    names = [name for name in names if matters(name)]
    if failure.precision or not names:
        return None
    places = ", ".join(str(number) for number, each in changed.items() if set(names) & set(each))
    reason = (
        f"the loop changes state {first_names(names)} within the window, before micro-batch {places}, and "
        "the gradient depends on it"
    )
    return failure.cause("state", reason, "", "change it once, after the window's last micro-batch")
