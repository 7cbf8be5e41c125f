"""The optimizer of a configuration: groups of parameters by name, and several optimizers stepped as one."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..accum.step import give_momentum
from ..config.instantiate import build
from ..errors import UsageError
from .schedules import may_be_fused

Named = list[tuple[str, nn.Parameter]]


def build_optimizer(
    node: Mapping[str, Any], named: Named, modules: Iterable[nn.Module] = (), capturable: bool = False
) -> Optimizer:
    """The optimizer of `node` over the `named` parameters, in groups where `node["groups"]` is not empty.

    Each entry of `groups` is `{params: <pattern or list of patterns>, <setting>: <value>, ...}`. Patterns are
    those of `fnmatch`, matched with the names of `named_parameters()`; the first entry that matches takes the
    parameter. `name` names the group's learning rate in the log. An entry with a `_target_` is an optimizer
    of its own. The other parameters are a group with the settings of `node`.

    Args:
        capturable: ask fused kernels for state on the device, as a recorded graph needs.

    Raises:
        UsageError: naming the key that cannot be built, or an entry that matches no parameter.
    """
    base = {key: value for key, value in node.items() if key != "groups"}
    groups = node.get("groups") or []
    modules = list(modules)
    if not groups:
        return _one(base, "optimizer", named, [], modules, capturable)
    if not isinstance(groups, Sequence) or isinstance(groups, str):
        raise UsageError(
            f"optimizer.groups={groups}: a list is needed, such as [{{params: '*.bias', lr: 0.1}}]"
        )
    rest, taken = _assign(groups, named)
    plain: list[tuple[dict[str, Any], Named]] = []
    separate: list[tuple[str, dict[str, Any], Named]] = []
    for number, (entry, members) in enumerate(zip(groups, taken, strict=True)):
        settings = {key: value for key, value in entry.items() if key != "params"}
        if "_target_" in settings:
            separate.append((f"optimizer.groups.{number}", settings, members))
        else:
            plain.append((settings, members))
    optimizers = []
    if rest or plain:
        optimizers.append(_one(base, "optimizer", rest, plain, modules, capturable))
    for key, settings, members in separate:
        name = settings.pop("name", None)
        optimizer = _one(settings, key, members, [], modules, capturable)
        if name is not None:
            optimizer.param_groups[0]["name"] = name
        optimizers.append(optimizer)
    optimizer = optimizers[0] if len(optimizers) == 1 else CombinedOptimizer(optimizers)
    _check_names(optimizer)
    return optimizer


def _assign(groups: Sequence[Any], named: Named) -> tuple[Named, list[Named]]:
    """The parameters that no entry takes, and those of each."""
    patterns: list[list[str]] = []
    for number, entry in enumerate(groups):
        wanted = entry.get("params") if isinstance(entry, Mapping) else None
        wanted = [wanted] if isinstance(wanted, str) else wanted
        if not wanted or not all(isinstance(pattern, str) for pattern in wanted):
            raise UsageError(
                f"optimizer.groups.{number}={entry}: names no parameters, give params: '*.bias' or a list"
            )
        patterns.append(list(wanted))
    for number, wanted in enumerate(patterns):
        for pattern in wanted:
            if not any(fnmatchcase(name, pattern) for name, _ in named):
                names = ", ".join(name for name, _ in named[:4])
                raise UsageError(
                    f"optimizer.groups.{number}.params={pattern}: matches none of the model's {len(named)} "
                    f"parameters, take their names or patterns of them ({names}, ...)"
                )
    rest: Named = []
    taken: list[Named] = [[] for _ in groups]
    for name, parameter in named:
        matches = (k for k, wanted in enumerate(patterns) if any(fnmatchcase(name, p) for p in wanted))
        first = next(matches, None)
        (rest if first is None else taken[first]).append((name, parameter))
    for number, members in enumerate(taken):
        if not members:
            raise UsageError(
                f"optimizer.groups.{number}.params={groups[number]['params']}: earlier groups take all "
                "parameters that it matches, put it before them"
            )
    return rest, taken


def _one(
    node: Mapping[str, Any],
    key: str,
    rest: Named,
    plain: list[tuple[dict[str, Any], Named]],
    modules: list[nn.Module],
    capturable: bool,
) -> Optimizer:
    """The optimizer of `node` over `rest`, with its own settings, and the `plain` groups."""
    named = [*rest, *(pair for _, members in plain for pair in members)]
    parameters: list[Any] = [parameter for _, parameter in rest]
    if plain:
        first = [{"params": parameters}] if parameters else []
        parameters = first + [
            {"params": [parameter for _, parameter in members], **settings} for settings, members in plain
        ]
    nodes = [{**node, **settings} for settings, _ in plain] or [node]
    values = [parameter for _, parameter in named]
    fused: dict[str, Any] = {}
    if all(may_be_fused(one, values, modules) for one in [node, *nodes]):
        fused = {"fused": True, **({"capturable": True} if capturable else {})}
    optimizer = build(node, key, parameters, named_parameters=named, **fused)
    if not isinstance(optimizer, Optimizer):
        made = type(optimizer).__name__
        raise UsageError(f"{key}._target_={node['_target_']}: a torch.optim.Optimizer is needed, not {made}")
    for settings, _ in plain:
        _check_settings(settings, optimizer.defaults, str(node["_target_"]))
    set_mode([optimizer], "train")
    if needed := required_arguments(optimizer.step):
        raise UsageError(
            f"{key}._target_={node['_target_']}: its step needs a {needed[0]}, which computes the loss again "
            "and which a window of micro-batches does not give; take one without, such as torch.optim.AdamW"
        )
    return optimizer


def _check_settings(settings: Mapping[str, Any], defaults: Mapping[str, Any], target: str) -> None:
    """Refuses settings of a group that the optimizer does not have, or of another type than its own."""
    for setting, value in settings.items():
        if setting == "name":
            continue
        if setting not in defaults:
            names = ", ".join(sorted(defaults))
            raise UsageError(f"optimizer.groups: {setting} is no setting of {target} ({names})")
        if isinstance(defaults[setting], int | float) and not isinstance(value, int | float | Tensor):
            raise UsageError(f"optimizer.groups: {setting}={value} is no number")


def _check_names(optimizer: Optimizer) -> None:
    """Refuses two groups whose learning rates would be logged under one name."""
    names = [str(group.get("name", number)) for number, group in enumerate(optimizer.param_groups)][1:]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"optimizer.groups: {repeated} names two groups, whose rates are logged by name")


def required_arguments(function: Callable[..., Any]) -> list[str]:
    """The names of the parameters of a bound method that have no default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    return [
        p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]


class CombinedOptimizer(Optimizer):
    """Optimizers over disjoint sets of parameters, stepped one after the other.

    `param_groups` are those of all, in their order; schedules and `state_dict` see one optimizer.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        super().__init__([{"params": group["params"]} for group in groups], dict(optimizers[0].defaults))
        self.optimizers = list(optimizers)
        self._join()

    def _join(self) -> None:
        """Makes groups and state those of the parts, which then read and write the same objects."""
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        state: defaultdict[Tensor, Any] = defaultdict(dict)
        for optimizer in self.optimizers:
            state.update(optimizer.state)
        self.state = state
        for optimizer in self.optimizers:
            optimizer.state = state

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for optimizer in self.optimizers:
            give_momentum(optimizer)
            optimizer.step()

    def train(self) -> None:
        set_mode(self.optimizers, "train")

    def eval(self) -> None:
        set_mode(self.optimizers, "eval")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        start = 0
        for optimizer in self.optimizers:
            optimizer.state = defaultdict(dict)
            stop = start + len(optimizer.param_groups)
            groups = state_dict["param_groups"][start:stop]
            numbers = {number for group in groups for number in group["params"]}
            state = {number: value for number, value in state_dict["state"].items() if number in numbers}
            optimizer.load_state_dict({"state": state, "param_groups": groups})
            start = stop
        self._join()


def set_mode(optimizers: Iterable[Any], mode: str) -> None:
    """Calls `train` or `eval` of those optimizers that have both, as schedule-free ones do."""
    for optimizer in optimizers:
        if all(callable(getattr(optimizer, name, None)) for name in ("train", "eval")):
            getattr(optimizer, mode)()


@contextmanager
def in_eval_mode(optimizer: Optimizer) -> Iterator[None]:
    """Inside, an optimizer with `train` and `eval` (a schedule-free one) is in eval mode."""
    set_mode([optimizer], "eval")
    try:
        yield
    finally:
        set_mode([optimizer], "train")


def learning_rates(optimizer: Optimizer) -> dict[str, float | Tensor]:
    """The rates by the keys they are logged under; those on a device are copied there."""
    rates: dict[str, float | Tensor] = {}
    for number, group in enumerate(optimizer.param_groups):
        key = f"train/lr/{group.get('name', number)}" if number else "train/lr"
        rate = group["lr"]
        rates[key] = rate.clone() if isinstance(rate, Tensor) else float(rate)
    return rates
