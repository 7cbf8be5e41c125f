"""Why weights are not what the optimizer makes of them: changed by hand, moved, or its state changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .certificate import Cause, number
from .evidence import all_updates_in_words
from .float64 import DOUBLE, keep_float64
from .larger_batch import Gradient, dot, norm
from .observation import Observation
from .problem import Problem, WholeBatch, copy_in
from .rounding import perturbed_model

SHOWN = "the optimizer's step was repeated on the same gradient"
# Largest share of a difference that an explanation leaves: an optimizer's decay moves weights too.
LEFT = 0.01


@dataclass
class ChangedWeights:
    """The updates after which weights are not what the optimizer made of them, and the first one's weights.

    Attributes:
        batch, observation: of the first update.
        names: the parameters that differ after it.
        before, expected, actual: weights before the first update, as the optimizer leaves them, and as the
            loop does; empty for a large model.
        optimizer_entries: of the optimizer's state that differ too, such as "momentum_buffer".
        updates: numbers of all such updates.
        compared: numbers of all updates that were compared.
        windows: descriptions of the smaller windows, by update.
    """

    batch: WholeBatch
    observation: Observation
    names: list[str]
    before: Gradient
    expected: Gradient
    actual: Gradient
    optimizer_entries: list[str]
    updates: list[int] = field(default_factory=list)
    compared: list[int] = field(default_factory=list)
    windows: Mapping[int, str] = field(default_factory=dict)

    @property
    def when(self) -> str:
        return all_updates_in_words(self.updates, self.compared, self.windows)

    def difference(self, one: Gradient, other: Gradient) -> Gradient:
        """`one` minus `other`, of the parameters that differ."""
        return {name: one[name].double() - other[name].double() for name in self.names}


def changed_weights_cause(problem: Problem, changed: ChangedWeights, micro_batches: int) -> Cause:
    """The cause if weights change outside the optimizer."""
    names = changed.names
    where = ", ".join(names[:3]) + (f", ... ({len(names)} parameters)" if len(names) > 3 else "")
    frozen = {name for name, p in problem.model.named_parameters() if not p.requires_grad}
    if frozen.issuperset(names):
        how = "otherwise than with a single micro-batch"
        reason = f"the loop changes frozen parameters itself, {changed.when}, {how}"
        advice = "change them once a window, after the optimizer's step, and split the batch into `steps`"
        return Cause("state", where, reason, math.nan, "", advice)
    if problem.perturb is not None:
        reason = f"the weights are not what the optimizer makes of the unmoved ones, {changed.when}"
        moved = _stay_moved(problem, changed)
        reason += (
            ": those that perturb= moved are not moved back before the step"
            if moved
            else ": are they moved back before the step?"
        )
        advice = "restore the weights that perturb= has moved, then step"
        return Cause("weights", where, reason, math.nan, SHOWN, advice)
    if changed.optimizer_entries:
        entries = ", ".join(changed.optimizer_entries)
        reason = f"the optimizer's {entries} is changed or lost beside its steps, {changed.when}"
        if _without_state(problem, changed):
            reason += ": the update is that of an optimizer without state"
        advice = "leave the optimizer's state to its steps, and load it with the weights"
        return Cause("optimizer state", where, reason, math.nan, SHOWN, advice)
    reason = _by_hand(changed, micro_batches)
    advice = "leave weights to the optimizer, or change them by an option of it (weight_decay)"
    return Cause("weights", where, reason, math.nan, SHOWN, advice)


def _by_hand(changed: ChangedWeights, micro_batches: int) -> str:
    """How the loop changes the weights itself, and when."""
    first = f" in update {changed.updates[0]}" if len(changed.updates) > 1 else ""
    reason = f"the loop changes the weights itself, beside the optimizer, {changed.when}"
    if not changed.actual:
        return reason
    difference = changed.difference(changed.actual, changed.expected)
    size = norm(difference)
    for weights in (changed.before, changed.expected):
        base = {name: weights[name].double() for name in changed.names}
        square = norm(base) ** 2
        factor = dot(base, difference) / (square or 1.0)
        left = norm({name: difference[name] - factor * base[name] for name in changed.names})
        if square and left <= 1e-6 * size:
            shrunk = 1 + factor
            times = f"{shrunk:.6g} ({first.strip()})" if first else f"{shrunk:.6g}"
            reason = f"weights are multiplied by {times} beside the optimizer, {changed.when}"
            if 0 < shrunk < 1 and micro_batches > 1:
                each = 1 - shrunk ** (1 / micro_batches)
                by_hand = f"as decay by hand of {each:.3g} in each of {micro_batches} micro-batches makes it"
                reason += f": {by_hand}"
            return reason
    of = norm({name: changed.expected[name].double() for name in changed.names}) or 1.0
    reason += f", by {number(size / of)} of their norm{first}"
    clamped = _clamped(changed)
    return f"{reason}: {clamped}" if clamped else reason


def _clamped(changed: ChangedWeights) -> str:
    """To what the loop clamps the weights, in words; "" if it does not."""
    pairs = [(changed.actual[name], changed.expected[name]) for name in changed.names]
    limit = max(float(actual.abs().max()) for actual, _ in pairs)
    if all(torch.equal(actual, expected.clamp(-limit, limit)) for actual, expected in pairs):
        return f"no element is larger than {limit:.4g} after it"
    if all(torch.equal(actual, expected.clamp(min=0)) for actual, expected in pairs):
        return "no element is negative after it"
    return ""


def _stay_moved(problem: Problem, changed: ChangedWeights) -> bool:
    """Whether what `Problem.perturb` adds to the weights is still in them after the step."""
    if not changed.before:
        return False
    model = _model_with(problem, changed.before)
    moved = dict(perturbed_model(problem, model, changed.batch).named_parameters())
    added = changed.difference({name: p.detach() for name, p in moved.items()}, changed.before)
    difference = changed.difference(changed.actual, changed.expected)
    return norm({name: g - added[name] for name, g in difference.items()}) <= LEFT * norm(difference)


def _without_state(problem: Problem, changed: ChangedWeights) -> bool:
    """Whether the first update is what an optimizer makes of its gradient that has made no step before."""
    observation = changed.observation
    if not changed.before or observation.gradient is None:
        return False
    model = _model_with(problem, changed.before)
    optimizer = problem.optimizer(list(model.parameters()))
    for group, rate in zip(optimizer.param_groups, observation.rates, strict=False):
        if not isinstance(group["lr"], Tensor):
            group["lr"] = rate
    for name, parameter in model.named_parameters():
        gradient = observation.received.get(name, observation.gradient.get(name))
        if gradient is not None and name not in observation.absent:
            parameter.grad = gradient.to(parameter)
    with keep_float64(DOUBLE, problem.narrowing):
        optimizer.step()
    made = {name: p.detach() for name, p in model.named_parameters()}
    off = norm(changed.difference(made, changed.actual))
    return off <= 1e-9 * norm(changed.difference(changed.actual, changed.expected))


def _model_with(problem: Problem, weights: Gradient) -> torch.nn.Module:
    """The problem's model in fp64 with these `weights`."""
    model = copy_in(problem.model, DOUBLE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model
